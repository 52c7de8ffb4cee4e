"""Two files of one model side by side: two quantizations, a finetune.

Sources: the statistics of `llama-perplexity`'s KL divergence (llama.cpp, tools/perplexity) for the
predictions; the logit lens, nostalgebraist 2020, in both models; activation patching between models
for the blame (`mia.methods.blame`).

| in llama.cpp's tool                          | here                                            |
|----------------------------------------------|-------------------------------------------------|
| the base, kept in a file                     | `a`                                             |
| the model, Q                                 | `b`                                             |
| chunks of n_ctx tokens                       | `window`                                        |
| the second half of a chunk is scored         | the same; all of a text of less than two windows|
| the first token of a chunk becomes the BOS   | the same, if the text begins with one           |
| base log-probabilities in 16 bits            | the same (`mia.measure.divergence`)             |

Layers are compared at the scored tokens, the lens at some of them, spread evenly. The lens of each
model is its own. Captures are held for one window at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, BoolArray, Floats, norms
from mia.errors import UsageError
from mia.measure.divergence import Divergence, KlTo, Packed, Positions, compare, pack
from mia.methods.blame import NULL, blame as find_blame
from mia.methods.diff_reports import LISTED, DiffReport, LayerDiff
from mia.methods.transfer import Made, sweep_on_other, vector_on_both
from mia.models.tensor_diff import tensor_pairs
from mia.notices import notice
from mia.progress import Progress, step
from mia.request import Capture, Request, Result
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

#: tokens of a window; tokens at which the lens is read, and of which the blame is run
WINDOW, LENS_TOKENS, BLAME_TOKENS = 512, 64, 64
#: tokens that a vector is tried on
STEER_TOKENS = 64
#: logit rows in memory at a time, and floats of a lens's scores
_ROWS, _SCORES = 64, 16 << 20


def diff(
    a: Model,
    b: Model,
    text: str | Sequence[int],
    *,
    window: int = WINDOW,
    lens_tokens: int = LENS_TOKENS,
    blame_tokens: int = BLAME_TOKENS,
    null: int = NULL,
    made: Made | None = None,
    k: int = LISTED,
) -> DiffReport:
    """Compares two files of one model: tensors, layers, predictions, and where the difference comes in.

    Args:
        a: the base.
        b: what differs from it.
        text: a text, which `a` tokenizes, or token ids.
        window: tokens of a window; at most the context.
        lens_tokens: at how many of the scored tokens the lens is read, 0 for none.
        blame_tokens: of how many of the text's first tokens the blame is run, 0 for no blame.
        null: changes by 1e-5 that measure the blame's noise floor in each model.
        made: a vector or a sweep of the base, which is tried on both.
        k: how many places of the blame the text lists.

    Raises:
        UsageError: the models differ in vocabulary, layers or width, the window has no room, or what
            was made does not fit.
        SiteError: a model has no `resid_post` in some layer.
    """
    check_comparable(a, b)
    if window < 4:
        raise UsageError(f"a window of {window} tokens is too short; it has at least 4")
    ids = a.ids(text)
    windows = _windows(a, b, ids, window)
    with step("comparing tensors") as bar:
        tensors = tensor_pairs(_weights_file(a), _weights_file(b), progress=bar)
    chosen = _spread([len(w.positions) for w in windows], lens_tokens)
    with step("reading both models") as bar:
        parts = [
            _compare_window(a, b, w, at, _part(bar, i, len(windows)))
            for i, (w, at) in enumerate(zip(windows, chosen, strict=True))
        ]
    blamed = None
    if blame_tokens:
        blamed = find_blame(a, b, *_start(windows, ids, blame_tokens), null=null)
    steered = swept = None
    if made is not None and made.steer is not None:
        start = _start(windows, ids, STEER_TOKENS)
        steered = vector_on_both(a, b, *start, made.steer, coeff=made.coeff, layers=made.layers)
    if made is not None and made.sweep is not None:
        swept = sweep_on_other(a, b, made.sweep)
    return DiffReport(
        facts=a.facts,
        other=b.facts,
        tokens=a.token_rows(ids),
        window=max(len(w.tokens) for w in windows),
        n_windows=len(windows),
        whole=windows[0].positions[0] == 0,
        n_lens=sum(map(len, chosen)),
        end=Divergence(Positions.joined([p.end for p in parts])),
        layers=_layers([p.layers for p in parts]),
        tensors=tensors,
        blame=blamed,
        steered=steered,
        swept=swept,
        k=k,
    )


def check_comparable(a: Model, b: Model) -> None:
    """Raises `UsageError` if two models have another vocabulary, number of layers or width."""
    sizes = [
        ("layers", a.n_layer, b.n_layer),
        ("dimensions of the residual", a.n_embd, b.n_embd),
        ("tokens in the vocabulary", a.n_vocab, b.n_vocab),
    ]
    others = [f"{x:,} and {y:,} {name}" for name, x, y in sizes if x != y]
    if not others and a.tokenizer_hash != b.tokenizer_hash:
        others = ["other texts of the same number of tokens"]
    if others:
        raise UsageError(f"{a.name} and {b.name} cannot be compared: they have {'; '.join(others)}")


def _weights_file(model: Model) -> Path:
    return model.path if model.copy is None else model.copy.path


# -- windows --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """Tokens that are read together, and the positions that are scored."""

    tokens: list[int]
    positions: range

    @property
    def targets(self) -> list[int]:
        """The tokens that follow the scored ones, as far as they are in the window."""
        return self.tokens[self.positions.start + 1 : self.positions.stop + 1]


def _windows(a: Model, b: Model, ids: list[int], size: int) -> list[_Window]:
    room = min(a.n_ctx, b.n_ctx)
    if size > room:
        size = room
        if len(ids) >= 2 * size:
            notice(f"window reduced to the context size, {room}")
    if len(ids) >= 2 * size:
        n = len(ids) // size
        parts = [ids[i * size : (i + 1) * size] for i in range(n)]
        if a.has_bos(ids):  # as llama.cpp does: a window is as long as the others
            parts = [[ids[0], *part[1:]] for part in parts]
        # the last one's next token is in the next window, which begins without it
        return [_Window(part, range(size // 2, size - 1)) for part in parts]
    if len(ids) <= room:
        return [_Window(ids, range(len(ids)))]
    halves = [ids[:room], ids[room:]]
    return [_Window(part, range(len(part))) for part in halves]


def _start(windows: Sequence[_Window], ids: list[int], n: int) -> tuple[list[int], range]:
    """The text's first n tokens, no more than a window, and those that are scored: all of a whole short
    text, else the second half."""
    short = ids[: min(n, len(windows[0].tokens))]
    whole = windows[0].positions[0] == 0 and len(short) == len(ids)
    return short, range(0 if whole else len(short) // 2, len(short))


def _spread(lengths: Sequence[int], n: int) -> list[list[int]]:
    """At most n of all scored positions, evenly; for each window their places among its own."""
    total = sum(lengths)
    n = min(n, total)
    chosen = [int((i + 0.5) * total / n) for i in range(n)]
    out, start = [], 0
    for length in lengths:
        out.append([i - start for i in chosen if start <= i < start + length])
        start += length
    return out


def _part(bar: Progress | None, i: int, n: int) -> Progress | None:
    if bar is None:
        return None
    return lambda done, total: bar(i * total + done, n * total)


# -- one window -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _LayerNumbers:
    """Of the scored tokens of a window, or of all: (n_layer, n) each, of the lens (n_layer, n_lens)."""

    cosine: Floats
    error: Floats
    lens_kl: Floats
    lens_same: BoolArray


@dataclass(frozen=True, eq=False)
class _Part:
    end: Positions
    layers: _LayerNumbers


def _compare_window(
    a: Model, b: Model, window: _Window, lens_at: list[int], bar: Progress | None
) -> _Part:
    blocks = _blocks(window)
    base = _run(a, window, [pack] * len(blocks))
    packed = [r.value for r in base]
    measures = [
        _Against(p, window.tokens[s + 1 : e + 1]) for p, (s, e) in zip(packed, blocks, strict=True)
    ]
    other = _run(b, window, measures, bar)
    end = Positions.joined([r.value for r in other])
    return _Part(end, _compare_layers(a, b, base[-1], other[-1], lens_at))


@dataclass(frozen=True, eq=False)
class _Against:
    """A metric: logits of some positions beside the base's."""

    base: Packed
    targets: Sequence[int]

    def __call__(self, logits: Array) -> Positions:
        return compare(self.base, logits, self.targets)


def _blocks(window: _Window) -> list[tuple[int, int]]:
    """The scored positions in blocks of `_ROWS`, as (start, stop)."""
    start, stop = window.positions.start, window.positions.stop
    return [(i, min(i + _ROWS, stop)) for i in range(start, stop, _ROWS)]


def _run(
    model: Model, window: _Window, metrics: Sequence[Any], bar: Progress | None = None
) -> list[Result]:
    """A window as requests that are prefixes of one another, so that no more than a block of logits is
    held; the last one reads the residuals."""
    blocks = _blocks(window)
    requests = []
    for (start, stop), metric in zip(blocks, metrics, strict=True):
        last = stop == window.positions.stop
        tokens = window.tokens if last else window.tokens[:stop]
        captures = [Capture("resid_post", window.positions)] if last else []
        requests.append(Request(tokens, (), captures, logits=range(start, stop), metric=metric))
    return model.run(requests, progress=bar)


def _compare_layers(
    a: Model, b: Model, base: Result, other: Result, lens_at: list[int]
) -> _LayerNumbers:
    """The residuals that both models' last requests have read, layer by layer."""
    cosine, error, rows, other_rows = [], [], [], []
    for site in (Site("resid_post", i) for i in range(a.n_layer)):
        x, y = base.captures[site], other.captures[site]  # (n_positions, n_embd)
        size, size_b = norms(x), norms(y)
        products = np.einsum("pe,pe->p", x, y, dtype=np.float64)
        lengths = size * size_b
        cosine.append(np.divide(products, lengths, out=np.ones(len(x)), where=lengths > 0))
        error.append(norms(y - x) / np.where(size > 0, size, 1))
        rows.append(x[lens_at])
        other_rows.append(y[lens_at])
    kl, same = _lens(a, b, np.concatenate(rows), np.concatenate(other_rows))
    shape = (a.n_layer, len(lens_at))
    return _LayerNumbers(np.stack(cosine), np.stack(error), kl.reshape(shape), same.reshape(shape))


def _lens(a: Model, b: Model, x: Array, y: Array) -> tuple[Floats, BoolArray]:
    """KL(a ‖ b) of the lens, and whether its best token is the same, for rows (n, n_embd) of each."""
    kl, same = np.empty(len(x)), np.empty(len(x), bool)
    size = max(1, _SCORES // a.n_vocab)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        scores = a.lens.logits(x[part]), b.lens.logits(y[part])
        kl[part] = KlTo(scores[0])(scores[1])
        same[part] = scores[0].argmax(1) == scores[1].argmax(1)
    return kl, same


def _layers(parts: Sequence[_LayerNumbers]) -> list[LayerDiff]:
    """The windows together."""
    cosine, error, kl, same = (
        np.concatenate([getattr(p, name) for p in parts], axis=1)
        for name in ("cosine", "error", "lens_kl", "lens_same")
    )
    has_lens = kl.shape[1] > 0
    return [
        LayerDiff(
            layer=i,
            cosine=float(cosine[i].mean()),
            cosine_worst=float(cosine[i].min()),
            error=float(error[i].mean()),
            error_worst=float(error[i].max()),
            lens_kl=float(kl[i].mean()) if has_lens else None,
            lens_same=float(same[i].mean()) if has_lens else None,
        )
        for i in range(len(cosine))
    ]
