"""Head scores: which heads look at the previous token, at the same token, or at what followed it.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (induction and
previous-token heads); Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv
2209.11895), the prefix-matching score on repeated random tokens; Wang et al. 2022 (arXiv
2211.00593), sec. 3 and app. H, duplicate-token heads and the same scores as average attention.

For a head with pattern A over tokens t_0 … t_(n-1):

| score       | mean over these queries i            | of                                          |
|-------------|--------------------------------------|---------------------------------------------|
| previous    | all but the first                    | A[i, i-1]                                   |
| duplicate   | those with an earlier j, t_j = t_i   | sum of A[i, j] over all such j              |
| induction   | those with one, and j+1 < i          | sum of A[i, j+1] over all such j            |
| entropy     | all but the first                    | -sum A ln A, in nats; 0 is one key, ln n all|

Where we deviate: the papers score on random tokens said twice only; here a prompt of one's own
may be scored, where a token may come more often than twice, hence the sums. On random tokens
drawn without replacement the two agree. Olsson et al. also ask what a head writes (copying);
`attribution` and `ablation` answer that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.measure.losses import MeanLoss
from mia.methods.attention import maps_of, maps_request
from mia.request import Request

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Array = npt.NDArray[np.float32]
SCORES = ("previous", "duplicate", "induction", "entropy")


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of every head, each (n_layer, n_head); NaN where no query counts (no token is
    repeated). Of several prompts: the mean, and in `spread` the standard deviation."""

    previous: Array
    duplicate: Array
    induction: Array
    entropy: Array
    spread: dict[str, Array]

    def top(self, score: str, n: int) -> list[tuple[int, int, float]]:
        """The n heads with the largest score, best first: (layer, head, score)."""
        if score not in SCORES:
            raise UsageError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
        a = getattr(self, score)
        order = np.argsort(-a, axis=None, kind="stable")[:n]
        return [(int(i // a.shape[1]), int(i % a.shape[1]), float(a.flat[i])) for i in order]


def head_scores(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    edits: Sequence[Edit] = (),
    progress: Progress | None = None,
) -> HeadScores:
    """Scores every head on prompts (token ids), all in one run."""
    if not prompts:
        raise UsageError("no prompt to score heads on")
    requests = [maps_request(model, p, edits=edits) for p in prompts]
    results = model.run(requests, progress=progress)
    each: dict[str, list[Array]] = {name: [] for name in SCORES}
    for request, result in zip(requests, results, strict=True):
        maps = maps_of(model, request, result)
        for name, a in score_pattern(maps.weights, maps.tokens).items():
            each[name].append(a)
        result.captures.clear()
    spread = {name: np.std(a, axis=0) for name, a in each.items()}
    return HeadScores(**{name: np.mean(a, axis=0) for name, a in each.items()}, spread=spread)


def score_pattern(weights: Array, tokens: Sequence[int]) -> dict[str, Array]:
    """The four scores of patterns (…, n_query, n_key) over these tokens, each of shape (…)."""
    n = len(tokens)
    same = np.equal.outer(tokens, tokens) & np.tri(n, k=-1, dtype=bool)  # (query, earlier key)
    after = np.zeros_like(same)
    after[:, 1:] = same[:, :-1]  # the key behind an earlier occurrence …
    after &= np.tri(n, k=-1, dtype=bool)  # … which is not the query itself
    repeated, followed = same.any(1), after.any(1)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy = -(weights * logs).sum(-1)  # (…, n_query)
    missing = np.full(weights.shape[:-2], np.nan, np.float32)
    return {
        "previous": np.diagonal(weights, -1, -2, -1).mean(-1) if n > 1 else missing,
        "duplicate": (weights * same).sum(-1)[..., repeated].mean(-1)
        if repeated.any()
        else missing,
        "induction": (weights * after).sum(-1)[..., followed].mean(-1)
        if followed.any()
        else missing,
        "entropy": entropy[..., 1:].mean(-1) if n > 1 else missing,
    }


def repeated_random(
    model: Model, n: int, *, rng: np.random.Generator, bos: bool = True
) -> list[int]:
    """Token ids: n random tokens, the same n again, and a BOS in front where there is one.

    The tokens are all different, and none is a control token or unknown to the tokenizer.
    """
    if n < 2:
        raise RangeError(f"{n} random tokens cannot be repeated; give at least 2")
    pool = np.flatnonzero([_is_text(model.piece(t)) for t in range(model.n_vocab)])
    if n > len(pool):
        raise RangeError(f"{n} random tokens are more than the vocabulary's {len(pool)}")
    half = [int(t) for t in rng.choice(pool, n, replace=False)]
    front = [model.bos_token] if bos and model.bos_token >= 0 else []
    return [*front, *half, *half]


def _is_text(piece: str) -> bool:
    control = piece.startswith("<") and piece.endswith(">") and len(piece) > 2
    return bool(piece) and not control


def copy_loss(
    model: Model,
    prompts: Sequence[Sequence[int]],
    variants: Sequence[Sequence[Edit]],
) -> Array:
    """How well repeated tokens are copied: mean loss (nats per token) over the second copy of
    each prompt, its first token left out (nothing yet tells that it is a copy).

    All prompts of `repeated_random` under all lists of edits, in one run: (n_variants, n_prompts).
    """
    requests = []
    for edits in variants:
        for p in prompts:
            at = range(len(p) - len(p) // 2, len(p) - 1)  # these predict the rest of the copy
            targets = [p[i + 1] for i in at]
            requests.append(Request(p, list(edits), logits=at, metric=MeanLoss(targets)))
    values = [r.value for r in model.run(requests)]
    return np.asarray(values, np.float32).reshape(len(variants), len(prompts))
