"""Head scores: which heads attend to the previous token, to the same token, or to what followed it.

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

Deviation: the papers score on repeated random tokens only. Here any prompt may be scored, in
which a token may come more than twice, hence the sums; on random tokens drawn without replacement
the two agree. Olsson et al. also ask what a head writes (copying): `attribution` and `ablation`
answer that, and the copy control here: the loss on the second copy without the best induction
heads, beside the loss without as many random others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mia.arrays import Array
from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.measure.losses import MeanLoss
from mia.methods.attention import maps_of, maps_request
from mia.methods.head_ablation import head_edits
from mia.progress import step
from mia.ranges import Head, every_head, top_heads
from mia.request import Request, one_or_more
from mia.show.report import Report
from mia.show.text import rounded

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.methods.changes import Changes
    from mia.model import Model
    from mia.progress import Progress

Score = Literal["previous", "duplicate", "induction", "entropy"]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of every head, each (n_layer, n_head); NaN where no query counts (no token is
    repeated). Of several prompts: the mean, and in `spread` the standard deviation."""

    previous: Array
    duplicate: Array
    induction: Array
    entropy: Array
    spread: dict[str, Array]

    def __getitem__(self, score: str) -> Array:
        """A score by its name, (n_layer, n_head). Raises `UsageError`."""
        if score not in SCORES:
            raise UsageError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
        a: Array = getattr(self, score)
        return a

    def top(self, score: str, n: int) -> list[Head]:
        """At most n heads with the largest score, best first; heads without a score are left
        out."""
        return top_heads(self[score], n)


def head_scores(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    edits: Edit | Sequence[Edit] = (),
    progress: Progress | None = None,
) -> HeadScores:
    """Scores every head on prompts (token ids), all in one run."""
    if not prompts:
        raise UsageError("no prompt to score heads on")
    requests = [maps_request(model, p, edits=edits) for p in prompts]
    results = model.run(requests, progress=progress)
    scores: dict[str, list[Array]] = {name: [] for name in SCORES}  # one of each prompt
    for request, result in zip(requests, results, strict=True):
        maps = maps_of(model, request, result)
        for name, a in score_pattern(maps.weights, maps.tokens).items():
            scores[name].append(a)
        result.captures.clear()
        result.by_capture.clear()
    spread = {name: np.std(a, axis=0) for name, a in scores.items()}
    return HeadScores(**{name: np.mean(a, axis=0) for name, a in scores.items()}, spread=spread)


def score_pattern(weights: Array, tokens: Sequence[int]) -> dict[str, Array]:
    """The four scores of patterns (…, n_query, n_key) over these tokens, each of shape (…)."""
    n = len(tokens)
    same = np.equal.outer(tokens, tokens) & np.tri(n, k=-1, dtype=bool)  # (query, earlier key)
    after = np.zeros_like(same)
    after[:, 1:] = same[:, :-1]  # the key that follows an earlier occurrence
    after &= np.tri(n, k=-1, dtype=bool)  # but not the query itself
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
    pool = np.flatnonzero(
        [_is_text(model.token_bytes(t).decode(errors="replace")) for t in range(model.n_vocab)]
    )
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
    each prompt. The first token of a copy is left out: nothing before it says that a copy begins.

    All prompts of `repeated_random` under all lists of edits, in one run.

    Returns:
        (n_variants, n_prompts).
    """
    requests = []
    for edits in variants:
        for p in prompts:
            queries = range(len(p) - len(p) // 2, len(p) - 1)  # these predict the rest of the copy
            loss = MeanLoss([p[i + 1] for i in queries])
            requests.append(Request(p, list(edits), logits=queries, metric=loss))
    values = [r.value for r in model.run(requests)]
    return np.asarray(values, np.float32).reshape(len(variants), len(prompts))


@dataclass(frozen=True, eq=False)
class CopyControl:
    """The loss on the second copy under ablations: of nothing, of the best induction heads, and
    of as many random other heads, several times.

    Attributes:
        heads: those ablated, a list for each row.
        loss: (n_rows,) nats per token.
    """

    heads: list[list[Head]]
    loss: Array

    def document(self) -> dict[str, Any]:
        factors = self.loss / self.loss[0]
        random = factors[2:]
        return {
            "loss": [
                {
                    "what": what,
                    "heads": [h.document() for h in heads],
                    "nats": rounded(nats),
                    "factor": rounded(factor),
                }
                for what, heads, nats, factor in zip(
                    self._names(), self.heads, self.loss, factors, strict=True
                )
            ],
            "random_factor": {
                "least": rounded(random.min()),
                "median": rounded(np.median(random)),
                "most": rounded(random.max()),
            },
        }

    def lines(self) -> list[str]:
        document = self.document()
        lines = []
        for row, heads in zip(document["loss"], self.heads, strict=True):
            loss = f"{row['nats']:.3f} (×{row['factor']:.2f})"
            which = " ".join(map(str, heads))
            lines.append(f"loss on the copy, {row['what']}: {loss} {which}".rstrip())
        random = document["random_factor"]
        lines.append(
            f"factor of the random ones: {random['least']:.2f} to {random['most']:.2f}, "
            f"median {random['median']:.2f}"
        )
        return lines

    def _names(self) -> list[str]:
        n = len(self.heads[1])
        random = [f"without {n} random"] * (len(self.heads) - 2)
        return ["whole model", f"without the top {n}", *random]


def copy_control(
    model: Model,
    prompts: Sequence[Sequence[int]],
    scores: HeadScores,
    n: int,
    *,
    draws: int = 5,
    edits: Edit | Sequence[Edit] = (),
    rng: np.random.Generator,
) -> CopyControl:
    """The loss on the second copy without the n best induction heads, and without n random others.

    Args:
        prompts: of `repeated_random`.
        draws: how many times n other heads are drawn.
        edits: other changes, made in every run.

    Raises:
        UsageError: there are no n other heads.
    """
    best = scores.top("induction", n)
    others = [h for h in every_head(model.n_layer, model.n_head) if h not in best]
    if not 0 < n <= len(others):
        raise UsageError(
            f"{n} heads cannot be compared with {n} others; the model has "
            f"{model.n_layer * model.n_head} heads"
        )
    drawn = [
        [others[i] for i in sorted(rng.choice(len(others), n, replace=False))] for _ in range(draws)
    ]
    ablated = [[], best, *drawn]
    edits = one_or_more(edits, Edit)
    variants = [[*edits, *head_edits(model, heads)] for heads in ablated]
    return CopyControl(ablated, copy_loss(model, prompts, variants).mean(1))


# -- the experiment --------------------------------------------------------------------


@dataclass(frozen=True)
class RandomRepeats:
    """Prompts of n random tokens, repeated once, with a BOS in front where there is one."""

    n: int
    prompts: int = 8
    seed: int = 0
    bos: bool = True


@dataclass(frozen=True, eq=False)
class Heads(Report):
    """Scores of every head.

    Attributes:
        tokens: of the first prompt.
        n_prompts: how many prompts the scores are the mean of.
        score: the one that a picture and a terminal show; k: how many heads the text lists.
        copying: the loss on the copy, where that was asked for.
        repeats: the random prompts, if the prompts were these.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    n_prompts: int
    scores: HeadScores
    score: Score
    k: int
    copying: CopyControl | None = None
    repeats: RandomRepeats | None = None

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "prompts": self.n_prompts,
            "scores": {name: rounded(self.scores[name]) for name in SCORES},
            "top": {name: self._top(name) for name in SCORES},
            **({} if self.copying is None else {"copying": self.copying.document()}),
        }

    def rows(self) -> list[dict[str, Any]]:
        n_layer, n_head = self.scores.previous.shape
        return [
            head.document(**{name: float(self.scores[name][head]) for name in SCORES})
            for head in every_head(n_layer, n_head)
        ]

    def plain(self) -> str:
        lines = []
        for name in SCORES:
            top = [f"{t['layer']}.{t['head']} {t['score']:.3f}" for t in self._top(name)]
            lines.append(f"{name}: {' | '.join(top) or 'no token of the prompt is repeated'}")
        return "\n".join(lines + ([] if self.copying is None else self.copying.lines()))

    def table(self, width: int) -> RenderableType:
        """One score as coloured cells, then the text."""
        from rich.console import Group

        from mia.show.grid import grid

        return Group(grid(self.scores[self.score], self.score, width), super().table(width))

    def plot(self, path: str | Path) -> None:
        """Draws one score as a heatmap, layers down, heads across."""
        from mia.show import plots

        title = f"{self.facts.name} · {self.score}"
        if self.repeats is not None:
            title += f" · {self.repeats.n} random tokens twice, {self.n_prompts} prompts"
        a = self.scores[self.score]
        plots.save(plots.heatmap(a, x="head", y="layer", bar=self.score, title=title), path)

    def _top(self, name: str) -> list[dict[str, Any]]:
        score, spread = self.scores[name], self.scores.spread[name]
        return [
            head.document(score=rounded(score[head]), sd=rounded(spread[head]))
            for head in self.scores.top(name, self.k)
        ]


def heads(
    model: Model,
    prompt: str | Sequence[int] | RandomRepeats,
    *,
    k: int = 10,
    score: Score = "induction",
    ablate_top: int = 0,
    draws: int = 5,
    changes: Changes | None = None,
) -> Heads:
    """Previous-token, duplicate-token and induction scores of every head, and its entropy.

    Args:
        prompt: a text, token ids, or repeated random tokens.
        k: how many heads the text lists.
        score: the one that a picture shows.
        ablate_top: N, for the loss on the second copy without the best N induction heads, and
            without N random others (`copy_control`); 0 leaves this out.
        draws: how many times the others are drawn.
        changes: made in every run.

    Raises:
        UsageError: an unknown score, or no copy to compute a loss on.
    """
    repeats = prompt if isinstance(prompt, RandomRepeats) else None
    if score not in SCORES:
        raise UsageError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
    if ablate_top and repeats is None:
        raise UsageError("the loss on a copy needs a prompt of repeated random tokens")
    rng = np.random.default_rng(0 if repeats is None else repeats.seed)
    if isinstance(prompt, RandomRepeats):
        prompts = [
            repeated_random(model, prompt.n, rng=rng, bos=prompt.bos) for _ in range(prompt.prompts)
        ]
    else:
        prompts = [model.ids(prompt)]
    edits = [] if changes is None else changes.edits(model, prompts[0])
    with step("scoring") as bar:
        scores = head_scores(model, prompts, edits=edits, progress=bar)
    copying = None
    if ablate_top:
        copying = copy_control(
            model, prompts, scores, ablate_top, draws=draws, edits=edits, rng=rng
        )
    return Heads(
        facts=model.facts,
        tokens=model.token_rows(prompts[0]),
        n_prompts=len(prompts),
        scores=scores,
        score=score,
        k=k,
        copying=copying,
        repeats=repeats,
    )
