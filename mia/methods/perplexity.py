"""Perplexity of a text, plain and under edits.

    print(measure(Model("smollm2"), text, Changes(steer=["love.gguf"])))

Perplexity is exp of the mean negative log-probability per token. Values of one text differ
between programs by the context that each token is predicted from:

| who                      | windows           | scored in each                             |
|--------------------------|-------------------|--------------------------------------------|
| here                     | 256, no overlap   | all tokens but the first                   |
| here, `stride` N         | N tokens further  | the last N (in the first window as above)  |
| llama-perplexity         | 512, no overlap   | the second half                            |
| the usual sliding window | N tokens further  | the last N, as `stride`                    |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.losses import TokenLoss
from mia.methods.changes import Changes
from mia.notices import notice
from mia.progress import Progress, step
from mia.request import Request, one_or_more
from mia.show.report import Report
from mia.show.text import rounded

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model


#: logit rows in memory at a time
_BLOCK = 64
#: tokens of a window
WINDOW = 256


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of one text.

    Attributes:
        nll: (n_scored,) negative log-probability of each token that was scored, in nats.
        window: tokens of a window, no more than the context.
        n_windows: how many were read.
    """

    nll: Array
    window: int
    n_windows: int

    @property
    def value(self) -> float:
        return float(np.exp(self.nll.mean(dtype=np.float64)))


def perplexity(
    model: Model,
    tokens: Sequence[int],
    *,
    edits: Edit | Sequence[Edit] = (),
    window: int = WINDOW,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text, in windows of as many tokens as the context allows, up to `window`.

    A BOS that the text begins with is put before every window. Windows do not overlap, and the
    first token of each is not scored, so the tokens after it are predicted from little context.

    Args:
        stride: each window begins this many tokens after the one before, and all but the first
            score only their last `stride` tokens (the last window those that are left).

    Raises:
        UsageError: fewer than two tokens, a window of less than two, a stride longer than a
            window, or token-specific edits of a text of several windows.
    """
    if len(tokens) < 2 or window < 2:
        raise UsageError(f"a perplexity needs two tokens; there are {min(len(tokens), window)}")
    edits = one_or_more(edits, Edit)
    window = min(window, model.n_ctx)
    windows = _windows(list(tokens), window, model.bos_token, stride)
    if len(windows) > 1 and any(e.tokens is not None for e in edits):
        raise UsageError(
            f"token-specific edits need a text that fits in one window; {len(tokens)} tokens are "
            f"{len(windows)} windows of up to {window}"
        )
    requests = [r for w, n_scored in windows for r in _requests(w, n_scored, edits)]
    results = model.run(requests, progress=progress)
    return Perplexity(np.concatenate([r.value for r in results]), window, len(windows))


def _windows(
    tokens: list[int], size: int, bos: int, stride: int | None
) -> list[tuple[list[int], int]]:
    """Each window, and how many of its last tokens are scored."""
    head, body = (tokens[:1], tokens[1:]) if tokens[0] == bos else ([], tokens)
    room = size - len(head)
    step = room if stride is None else stride
    if not 1 <= step <= room:
        raise UsageError(f"a stride of {step} is out of range; a window has room for 1 to {room}")
    out: list[tuple[list[int], int]] = []
    done = 0  # tokens of the body that windows have reached
    for start in range(0, len(body), step):
        window = head + body[start : start + room]
        end = min(start + room, len(body))
        n_scored = min(end - done, len(window) - 1)
        if n_scored:
            out.append((window, n_scored))
        done = end
        if done == len(body):
            break
    return out


def _requests(tokens: Sequence[int], n_scored: int, edits: Sequence[Edit]) -> list[Request]:
    """A window as requests that are prefixes of one another: the same rows are decoded, and no
    more than a block of logits is held."""
    first = len(tokens) - 1 - n_scored
    if any(e.tokens is not None for e in edits):
        ends = [len(tokens)]  # positions may count from the text's end
    else:
        ends = [*range(first + _BLOCK, len(tokens) - 1, _BLOCK), len(tokens)]
    out = []
    for start, end in zip([first, *ends], ends, strict=False):
        stop = min(end, len(tokens) - 1)
        targets = np.asarray(tokens[start + 1 : stop + 1])
        out.append(
            Request(tokens[:end], edits, logits=slice(start, stop), metric=TokenLoss(targets))
        )
    return out


# -- the experiment ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PerplexityReport(Report):
    """The perplexity of a text, plain and under changes.

    Attributes:
        n_tokens: of the text.
        changed: under the changes, if there are any.
        about: what the document says of the changes.
    """

    facts: ModelFacts
    n_tokens: int
    unchanged: Perplexity
    changed: Perplexity | None
    stride: int | None
    about: dict[str, Any]

    @property
    def ratio(self) -> float | None:
        """Changed over unchanged."""
        return None if self.changed is None else self.changed.value / self.unchanged.value

    def document(self) -> dict[str, Any]:
        p = self.unchanged
        document = {
            "model": self.facts.document(),
            "n_tokens": self.n_tokens,
            "n_scored": len(p.nll),
            "window": p.window,
            "stride": self.stride,
            "n_windows": p.n_windows,
            "perplexity": rounded(p.value),
            **self.about,
        }
        if self.changed is not None:
            document |= {"changed": rounded(self.changed.value), "ratio": rounded(self.ratio)}
        return document

    def rows(self) -> list[dict[str, Any]]:
        """The loss of each token that was scored, in nats."""
        columns = {"nll": self.unchanged.nll.tolist()}
        if self.changed is not None:
            columns["nll_changed"] = self.changed.nll.tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def plain(self) -> str:
        p = self.unchanged
        windows = f", {p.n_windows} windows of up to {p.window}" if p.n_windows > 1 else ""
        text = f"perplexity {p.value:.3f} over {len(p.nll)} tokens{windows}"
        if self.changed is None:
            return text
        return f"{text}\nchanged    {self.changed.value:.3f}, {self.ratio:.3f} times as much"


def measure(
    model: Model,
    text: str | Sequence[int],
    changes: Changes | None = None,
    *,
    window: int = WINDOW,
    stride: int | None = None,
) -> PerplexityReport:
    """The perplexity of a text, and under changes if there are any; see `perplexity`.

    Args:
        text: a text or token ids.

    Raises:
        UsageError: as `perplexity`, or changes that do not fit.
    """
    ids, changes = model.ids(text), changes or Changes()
    steering, about = changes.steering(model)
    edits = [*changes.prompt_edits(model, ids), *steering]
    if window > model.n_ctx:
        notice(f"window reduced to the context size, {model.n_ctx}")
    # the changed one first: what cannot be measured is refused before any work
    changed = None
    if edits:
        with step("reading, changed") as bar:
            changed = perplexity(
                model, ids, edits=edits, window=window, stride=stride, progress=bar
            )
    with step("reading") as bar:
        unchanged = perplexity(model, ids, window=window, stride=stride, progress=bar)
    return PerplexityReport(model.facts, len(ids), unchanged, changed, stride, about)
