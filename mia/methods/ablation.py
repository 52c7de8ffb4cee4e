"""Ablation: what breaks without a head. Attention knockout: without one look of it.

Sources: zero and mean ablation of heads as in Olsson et al. 2022 (arXiv 2209.11895) and Wang
et al. 2022 (arXiv 2211.00593), resampling as in Chan et al. 2022, "Causal Scrubbing", attention
knockout as in Geva et al. 2023 (arXiv 2304.14767), sec. 4.

| in the papers                 | here                                                     |
|-------------------------------|----------------------------------------------------------|
| head (l, h)                   | `(layer, head)`, written 3.5; `parse_heads`              |
| zero / mean / resample        | `head_edits(how=…)`, at `head_out`, before W_O           |
| M[r, c] = -inf, row r col c   | `Block`: query r may not look at key c; `block_edits`    |
| p(answer) clean and ablated   | `head_sweep`: log-probabilities                          |

Where we deviate: Geva et al. block windows of layers for whole spans, here any queries, keys,
layers and heads. `resample` without a file draws from the same prompt's other tokens, where
causal scrubbing draws from other inputs (`resample-from` takes those).

Zero at `head_out` and zero at `attn_pattern` leave the same nothing: W_O's bias, where a model
has one, stays in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.edits import Edit, Function, Tokens
from mia.errors import RangeError, UsageError
from mia.measure.losses import AnswerLogProb
from mia.request import Capture, Request
from mia.sites import Site, parse_layers

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Array = npt.NDArray[np.float32]
#: layer -> heads
Heads = Mapping[int, Sequence[int]]
WAYS = ("zero", "mean", "resample")


# -- which heads ------------------------------------------------------------------------


def parse_heads(text: str, n_layer: int, n_head: int, what: str = "heads") -> dict[int, list[int]]:
    """`3.5,4.0,7.*`, ranges too: `3..7.2`, `3.0-4`, `*.*`. Raises `UsageError` or `RangeError`."""
    shown = f"{what} {text!r}"
    out: dict[int, set[int]] = {}
    for part in (p.strip() for p in text.split(",")):
        m = re.fullmatch(r"(.+?)\.(\*|(\d+)(?:[-:](\d+))?)", part)
        if m is None:
            raise UsageError(f"{shown}: {part!r} is not LAYER.HEAD, like 3.5 or 7.*")
        first, last = (0, n_head - 1) if m[3] is None else (int(m[3]), int(m[4] or m[3]))
        if not first <= last < n_head:
            raise RangeError(f"{shown}: head {m[2]} is out of range; 0 to {n_head - 1}")
        for layer in parse_layers(m[1], n_layer, shown):
            out.setdefault(layer, set()).update(range(first, last + 1))
    return {layer: sorted(heads) for layer, heads in sorted(out.items())}


def all_but(kept: Heads, n_head: int) -> dict[int, list[int]]:
    """The other heads of the layers that have one to keep."""
    return {i: [h for h in range(n_head) if h not in kept[i]] for i in kept}


# -- edits -----------------------------------------------------------------------------


def head_edits(
    model: Model,
    heads: Heads,
    *,
    how: str = "zero",
    source: Mapping[int, Array] | None = None,
    tokens: Tokens = None,
    n_tokens: int | None = None,
    rng: np.random.Generator | None = None,
) -> list[Edit]:
    """Edits that take these heads' outputs away.

    Args:
        how: "zero"; "mean" puts the mean over the rows of `source`; "resample" puts one of its
            rows, drawn for each token.
        source: by layer `head_out` rows (n_rows, n_head × head_dim), see `head_outputs`.
        tokens: where; all tokens and generated ones by default.
        n_tokens, rng: of the prompt, and what draws: for "resample" only. Where `source` has a
            row for each token of the prompt, no token is given its own.
    """
    if how not in WAYS:
        raise UsageError(f"unknown way to ablate {how!r}; known: {', '.join(WAYS)}")
    heads = {layer: list(h) for layer, h in heads.items() if h}
    if how == "zero":
        return [Edit(Site("head_out", i), "zero", tokens=tokens, heads=h) for i, h in heads.items()]
    drawn: Sequence[int] = ()
    if how == "resample":
        if rng is None or n_tokens is None:
            raise UsageError("resampling needs a random generator and the number of tokens")
        n_rows = min((len(a) for a in (source or {}).values()), default=0)
        drawn = _draw(n_tokens, n_rows, rng)
    edits = []
    for layer, chosen in heads.items():
        if source is None or layer not in source:
            raise UsageError(f"{how} ablation needs outputs of the heads of layer {layer}")
        rows = _of_heads(source[layer], chosen, model, layer)
        site = Site("head_out", layer)
        if how == "mean":
            edits.append(Edit(site, "mean", rows, tokens=tokens, heads=chosen))
            continue
        assert n_tokens is not None and rng is not None
        at = Edit(site, "zero", tokens=tokens).positions(n_tokens)
        values = rows[[drawn[i] for i in at]]
        edits.append(Edit(site, "replace", values, tokens=at, generated=False, heads=chosen))
        if tokens is None:
            later = rows[rng.integers(len(rows))]
            edits.append(Edit(site, "replace", later, tokens=[], generated=True, heads=chosen))
    return edits


def head_outputs(model: Model, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, Array]:
    """`head_out` of a prompt by layer, (n_tokens, n_head × head_dim): a source to ablate with."""
    sites = [Site("head_out", i) for i in layers]
    result = model.run([Request(tokens, captures=[Capture(sites)], logits=None)])[0]
    return {i: result.captures[s] for i, s in zip(layers, sites, strict=True)}


def pattern_edits(heads: Heads, *, tokens: Tokens = None) -> list[Edit]:
    """These heads look nowhere: their attention weights are zero, rows no longer sum to 1."""
    return [
        Edit(Site("attn_pattern", i), "zero", tokens=tokens, heads=list(h))
        for i, h in heads.items()
        if h
    ]


def _of_heads(rows: Array, heads: Sequence[int], model: Model, layer: int) -> Array:
    """(n_rows, len(heads) × head_dim) of (n_rows, n_head × head_dim)."""
    width = model.n_head * model.head_dim
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
        raise UsageError(
            f"head_out.{layer} has rows of {width} here, what is given has shape {rows.shape}"
        )
    by_head = rows.reshape(len(rows), model.n_head, -1)
    return by_head[:, list(heads)].reshape(len(rows), -1)


def _draw(n: int, n_rows: int, rng: np.random.Generator) -> list[int]:
    """A row for each of n tokens; of as many rows as tokens a shuffle in which none keeps its own."""
    if n_rows != n:
        return [int(i) for i in rng.integers(max(n_rows, 1), size=n)]
    if n == 1:
        raise UsageError("a prompt of one token has no other token to resample from")
    order = rng.permutation(n)
    after = np.empty(n, np.intp)
    after[order] = np.roll(order, 1)  # one cycle through all
    return [int(i) for i in after]


# -- knockout ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Queries that may not look at keys: positions of the prompt.

    Attributes:
        generated: generated tokens, too, may not look at these keys.
        heads: by layer; None for all of the model.
    """

    queries: list[int]
    keys: list[int]
    generated: bool = False
    heads: Heads | None = None


def parse_block(text: str, n_tokens: int, n_layer: int, n_head: int) -> Block:
    """`5->0`, `3..7->0,1`, `-1->*@2..4` (layers) or `5->0@3.2,4.*` (heads).

    `5..->0` is query 5 and all that come after it, generated ones too.
    Raises `UsageError` or `RangeError` naming the valid range.
    """
    m = re.fullmatch(r"\s*([^>@]+?)\s*->\s*([^>@]+?)\s*(?:@\s*(.+))?", text)
    if m is None:
        raise UsageError(f"--block {text!r} is not QUERIES->KEYS, like 5->0 or 3..7->0,1@2..4")
    open_end = m[1].endswith("..") or m[1] in ("*", "all")
    queries = _positions(f"{m[1]}-1" if m[1].endswith("..") else m[1], n_tokens, text)
    keys = _positions(m[2], n_tokens, text)
    if not open_end and not any(k <= q for q in queries for k in keys):
        raise UsageError(
            f"--block {text!r}: no query sees these keys; a token looks at itself and back"
        )
    heads: dict[int, list[int]] | None = None
    if m[3] is not None:
        try:
            layers = parse_layers(m[3], n_layer, f"--block {text}")
            heads = {layer: list(range(n_head)) for layer in layers}
        except RangeError:
            if not re.search(r"\d\.(\d|\*)|\*\.", m[3]):
                raise
            heads = parse_heads(m[3], n_layer, n_head, f"--block {text!r}: heads")
    return Block(queries, keys, open_end, heads)


def _positions(text: str, n_tokens: int, shown: str) -> list[int]:
    out: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        if part in ("*", "all"):
            out.extend(range(n_tokens))
            continue
        m = re.fullmatch(r"(-?\d+)(?:(?:\.\.|:)(-?\d+))?", part)
        if m is None:
            raise UsageError(
                f"--block {shown!r}: {part!r} is not a token index, a range like 3..7 or a list"
            )
        first, last = int(m[1]), int(m[1] if m[2] is None else m[2])
        for i in (first, last):
            if not -n_tokens <= i < n_tokens:
                raise RangeError(
                    f"--block {shown!r}: token index {i} is out of range; 0 to {n_tokens - 1}"
                )
        if last % n_tokens < first % n_tokens:
            raise RangeError(f"--block {shown!r}: the range {part} runs backwards")
        out.extend(range(first % n_tokens, last % n_tokens + 1))
    return out


def block_edits(model: Model, block: Block) -> list[Edit]:
    """Edits of the scores before the softmax, so that what is left still sums to 1.

    A query that all its keys are taken from is refused while running, as `UsageError`.
    """
    heads = block.heads or {i: range(model.n_head) for i in range(model.n_layer)}
    return [
        Edit(
            Site("attn_scores", layer),
            _blind_to(block.keys, len(chosen)),
            tokens=block.queries,
            generated=block.generated,
            heads=list(chosen),
        )
        for layer, chosen in heads.items()
    ]


def _blind_to(keys: Sequence[int], n_heads: int) -> Function:
    at = np.asarray(keys, np.intp)

    def edit(rows: Array) -> Array:  # (1, n_heads × n_keys): keys 0 to the query's own position
        scores = rows.reshape(n_heads, -1)
        scores[:, at[at < scores.shape[1]]] = -np.inf
        return rows

    return edit


# -- the answer ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sweep:
    """What each head is worth to an answer.

    Attributes:
        clean: the answer's log-probability (nats), its tokens summed.
        ablated: (n_layer, n_head) the same without each head; NaN where it was not asked for.
    """

    clean: float
    ablated: Array

    @property
    def drop(self) -> Array:
        """(n_layer, n_head): clean - ablated; large where the answer needs the head."""
        return np.float32(self.clean) - self.ablated


def head_sweep(
    model: Model,
    tokens: Sequence[int],
    answer: Sequence[int],
    *,
    heads: Heads | None = None,
    edits_of: Callable[[int, int], Sequence[Edit]] | None = None,
    edits: Sequence[Edit] = (),
    progress: Progress | None = None,
) -> Sweep:
    """Takes one head away after the other, all in one planned run.

    Args:
        answer: token ids that should follow the prompt.
        heads: which; all by default.
        edits_of: (layer, head) -> its ablation. By default zero at the tokens whose logits
            make the answer: the prompt's last, and the answer's but for its last.
        edits: other changes, made in every run.
    """
    if not len(answer):
        raise UsageError("the answer is empty")
    whole = [*tokens, *answer[:-1]]
    at = range(len(tokens) - 1, len(whole))

    def zero(layer: int, head: int) -> list[Edit]:
        return head_edits(model, {layer: [head]}, tokens=at)

    make = edits_of or zero
    wanted = heads or {i: range(model.n_head) for i in range(model.n_layer)}
    pairs = [(layer, h) for layer in wanted for h in wanted[layer]]

    metric = AnswerLogProb(answer)
    requests = [Request(whole, list(edits), logits=at, metric=metric)]
    requests += [Request(whole, [*edits, *make(*p)], logits=at, metric=metric) for p in pairs]
    results = model.run(requests, progress=progress)
    ablated = np.full((model.n_layer, model.n_head), np.nan, np.float32)
    for (layer, h), result in zip(pairs, results[1:], strict=True):
        ablated[layer, h] = result.value
    return Sweep(results[0].value, ablated)
