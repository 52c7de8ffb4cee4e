"""Perplexity of a text, plain and under edits.

Perplexity is exp of the mean negative log-probability per token. The graph of Turner
et al. 2023 (arXiv 2308.10248, section 4: "weddings") is `by_layer`: the ratio of the
steered to the plain perplexity of each text, against the layer of the injection.
Where we deviate: the paper scores documents by the mean over sentences of GPT-2's
log-probabilities with a BOS; here a BOS is put where the model asks for one, or where
`bos` is true, and ratios are geometric means over texts.

Values of one text differ between programs by what each token is given to look back at:

| who                      | windows           | scored in each                             |
|--------------------------|-------------------|--------------------------------------------|
| here                     | 256, no overlap   | all tokens but the first                   |
| here, `stride` N         | N tokens further  | the last N (in the first window as above)  |
| llama-perplexity         | 512, no overlap   | the second half                            |
| the usual sliding window | N tokens further  | the last N, as `stride`                    |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.losses import TokenLoss
from mia.request import Request

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Array = npt.NDArray[np.float32]

#: logit rows held at a time
_BLOCK = 64


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
    edits: Sequence[Edit] = (),
    window: int = 256,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text, in windows of as many tokens as the context allows, up to `window`.

    A BOS that the text begins with is put before every window. Windows do not overlap, and the
    first token of each is not scored; so the tokens after it have little to look back at.

    Args:
        stride: windows begin so many tokens after one another, and all but the first score
            only their last `stride` tokens (the last window those that are left).

    Raises:
        UsageError: fewer than two tokens, a window of less than two, a stride longer than a
            window, or edits at some tokens only of a text of several windows.
    """
    if len(tokens) < 2 or window < 2:
        raise UsageError(f"a perplexity needs two tokens; there are {min(len(tokens), window)}")
    window = min(window, model.n_ctx)
    windows = _windows(list(tokens), window, model.bos_token, stride)
    if len(windows) > 1 and any(e.tokens is not None for e in edits):
        raise UsageError(
            f"changes at some tokens only need a text of one window; {len(tokens)} tokens are "
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


@dataclass(frozen=True, slots=True)
class LayerSweep:
    """Steered over plain perplexity by injection layer.

    Attributes:
        layers: (n_layers,) list.
        log_ratio: (n_layers, n_texts) natural log of the ratio of each text.
        skipped: texts left out, having less than two tokens.
    """

    layers: list[int]
    log_ratio: Array
    skipped: int = 0

    @property
    def n_texts(self) -> int:
        return int(self.log_ratio.shape[1])

    @property
    def ratio(self) -> Array:
        """(n_layers,) geometric mean over texts."""
        return np.exp(self.log_ratio.mean(1))

    def interval(self, rng: np.random.Generator, n: int = 1000) -> Array:
        """(n_layers, 2) 95 % interval of the mean, by bootstrap over texts."""
        picks = rng.integers(0, self.log_ratio.shape[1], (n, self.log_ratio.shape[1]))
        means = self.log_ratio[:, picks].mean(-1)  # (n_layers, n)
        return np.exp(np.percentile(means, [2.5, 97.5], axis=1).T).astype(np.float32)


def by_layer(
    model: Model,
    texts: Sequence[Sequence[int]],
    edits: Callable[[int, int], Sequence[Edit]],
    layers: Sequence[int],
    *,
    progress: Progress | None = None,
) -> LayerSweep:
    """How steering at each layer changes the perplexity of each text, in one call of the model.

    Args:
        edits: (layer, n_tokens) -> the edits of a text of so many tokens.

    Raises:
        UsageError: no text has two tokens, or one is longer than the context.
    """
    for i, tokens in enumerate(texts):
        if len(tokens) > model.n_ctx:
            raise UsageError(f"text {i} has {len(tokens)} tokens; the context holds {model.n_ctx}")
    ready = [t for t in texts if len(t) > 1]
    if not ready:
        raise UsageError("no text has two tokens to score")
    requests, at = [], []
    for i, layer in enumerate([None, *layers]):
        for j, tokens in enumerate(ready):
            made = () if layer is None else edits(layer, len(tokens))
            targets = np.asarray(tokens[1:])
            requests.append(
                Request(tokens, made, logits=slice(0, len(tokens) - 1), metric=TokenLoss(targets))
            )
            at.append((i, j))
    nll = np.empty((len(layers) + 1, len(ready)))
    for (i, j), r in zip(at, model.run(requests, progress=progress), strict=True):
        nll[i, j] = r.value.mean()
    return LayerSweep(list(layers), (nll[1:] - nll[0]).astype(np.float32), len(texts) - len(ready))
