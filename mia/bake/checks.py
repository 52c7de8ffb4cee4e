"""Does what was baked do what the edit does? KL divergences of next-token distributions.

On each text, at every token: KL(edit || baked), beside what the edit does, KL(plain || edit), and the noise of
the model's arithmetic, KL(edit || edit of rows changed by 1e-5) (`mia.measure.noise`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Floats
from mia.edits import Edit
from mia.measure.losses import log_softmax
from mia.measure.noise import nudge
from mia.progress import Progress
from mia.request import Request

if TYPE_CHECKING:
    from mia.model import Model

#: a bake is refused if KL(edit || baked) is above SHARE · KL(plain || edit) + NOISES · noise + LEAST
SHARE, NOISES, LEAST = 0.05, 3.0, 1e-6
#: neutral texts that are read, and tokens of each
_TEXTS, _TOKENS = 8, 40

#: runs requests on what was baked
Run = Callable[[Sequence[Request]], Sequence[Any]]


@dataclass(frozen=True)
class Check:
    """Mean KL divergences in nats per token.

    Attributes:
        texts: which: "neutral", the text that comes with mia, or "prompts", the user's.
        n_texts, n_tokens: how many.
        plain_edit: KL(plain || edit), what the edit does.
        edit_baked: KL(edit || baked), how far the file is from it.
        plain_baked: KL(plain || baked).
        noise: KL(edit || edit) where rows are changed by 1e-5.
        same_top: the share of tokens behind which edit and file have the same likeliest token.
    """

    texts: str
    n_texts: int
    n_tokens: int
    plain_edit: float
    edit_baked: float
    plain_baked: float
    noise: float
    same_top: float

    @property
    def limit(self) -> float:
        return SHARE * self.plain_edit + NOISES * self.noise + LEAST

    @property
    def passed(self) -> bool:
        return bool(self.edit_baked <= self.limit)

    @property
    def says_nothing(self) -> bool:
        """Whether the edit does no more than noise, so that anything would pass."""
        return self.plain_edit <= NOISES * self.noise + LEAST

    def document(self) -> dict[str, Any]:
        return {
            k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()
        }


def neutral_texts(model: Model) -> list[list[int]]:
    """The beginnings of paragraphs of the text that comes with mia, as tokens."""
    from mia.datasets.shipped import read_lines

    lines = list(read_lines("neutral").values())[:_TEXTS]
    most = min(_TOKENS, model.n_ctx)
    return [ids for line in lines if (ids := model.ids(line)[:most])]


def edit_kl(
    model: Model, texts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Edit]]
) -> list[float]:
    """KL(plain || edit), the mean over all tokens of the texts, for each list of edits."""
    total, count = np.zeros(len(candidates)), 0
    for text in texts:
        requests = [Request(text, edits, logits="all") for edits in ((), *candidates)]
        plain, *edited = (
            log_softmax(r.logits) for r in model.run(requests) if r.logits is not None
        )
        total += [_kl(plain, e) for e in edited]
        count += len(plain)
    return [float(t / count) for t in total]


def check(
    model: Model,
    run: Run,
    edits: Sequence[Edit],
    name: str,
    texts: Sequence[Sequence[int]],
    bar: Progress | None = None,
) -> Check:
    """Compares the edited model with what was baked.

    Args:
        run: runs what was baked.
        name: what the texts are called.
    """
    sums, count = np.zeros(5), 0
    nudged = Edit("resid_pre.0", nudge(0))
    for i, text in enumerate(texts):
        # never alone: by itself an addition would run as a control vector, as the file does
        variants = [(), tuple(edits), (nudged, *edits)]
        results = model.run([Request(text, e, logits="all") for e in variants])
        plain, edit, noisy = (log_softmax(r.logits) for r in results if r.logits is not None)
        baked = log_softmax(run([Request(text, logits="all")])[0].logits)
        same = float((edit.argmax(1) == baked.argmax(1)).sum())
        sums += [_kl(plain, edit), _kl(edit, baked), _kl(plain, baked), _kl(edit, noisy), same]
        count += len(plain)
        if bar is not None:
            bar(i + 1, len(texts))
    return Check(name, len(texts), count, *(float(s / count) for s in sums))


def _kl(p: Floats, q: Floats) -> float:
    """The sum over rows of KL(p || q), of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum())
