"""Edits that ablate heads: zero, mean and resampling. The sources are those of
`mia.methods.ablation`, which runs them.

Zero at `head_out` and zero at `attn_pattern` are the same: in both W_O's bias stays, if the model
has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array
from mia.edits import Edit, Tokens
from mia.errors import UsageError
from mia.ranges import Head, by_layer
from mia.request import Capture, Request
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

WAYS = ("zero", "mean", "resample")


def head_edits(
    model: Model,
    heads: Iterable[Head],
    *,
    how: str = "zero",
    source: Mapping[int, Array] | None = None,
    tokens: Tokens = None,
    n_tokens: int | None = None,
    rng: np.random.Generator | None = None,
) -> list[Edit]:
    """Edits that ablate heads at `head_out`.

    Args:
        how: "zero"; "mean" puts the mean over the rows of `source`; "resample" puts one of its
            rows, drawn for each token.
        source: layer -> `head_out` rows (n_rows, n_head × head_dim), see `head_outputs`.
        tokens: where; all tokens and generated ones by default.
        n_tokens: of the prompt, for "resample".
        rng: what draws, for "resample". If `source` has a row for each token of the prompt, no
            token is given its own.
    """
    if how not in WAYS:
        raise UsageError(f"unknown way to ablate {how!r}; known: {', '.join(WAYS)}")
    layers = by_layer(heads)
    if how == "zero":
        return [
            Edit(Site("head_out", i), "zero", tokens=tokens, heads=h) for i, h in layers.items()
        ]
    drawn: Sequence[int] = ()
    if how == "resample":
        if rng is None or n_tokens is None:
            raise UsageError("resampling needs a random generator and the number of tokens")
        n_rows = min((len(a) for a in (source or {}).values()), default=0)
        drawn = _draw(n_tokens, n_rows, rng)
    edits = []
    for layer, chosen in layers.items():
        if source is None or layer not in source:
            raise UsageError(f"{how} ablation needs outputs of the heads of layer {layer}")
        rows = _of_heads(source[layer], chosen, model, layer)
        site = Site("head_out", layer)
        if how == "mean":
            edits.append(Edit(site, "mean", rows, tokens=tokens, heads=chosen))
            continue
        assert n_tokens is not None and rng is not None
        positions = Edit(site, "zero", tokens=tokens).positions(n_tokens)
        values = rows[[drawn[i] for i in positions]]
        edits.append(Edit(site, "replace", values, tokens=positions, generated=False, heads=chosen))
        if tokens is None:
            later = rows[rng.integers(len(rows))]
            edits.append(Edit(site, "replace", later, tokens=[], generated=True, heads=chosen))
    return edits


def head_outputs(model: Model, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, Array]:
    """layer -> `head_out` of a prompt, (n_tokens, n_head × head_dim): a `source` of `head_edits`."""
    sites = [Site("head_out", i) for i in layers]
    result = model.run([Request(tokens, captures=[Capture(sites)], logits=None)])[0]
    return {i: result.captures[s] for i, s in zip(layers, sites, strict=True)}


def pattern_edits(heads: Iterable[Head], *, tokens: Tokens = None) -> list[Edit]:
    """These heads attend to nothing: their attention weights are zero, rows no longer sum to 1."""
    return [
        Edit(Site("attn_pattern", i), "zero", tokens=tokens, heads=h)
        for i, h in by_layer(heads).items()
    ]


def _of_heads(rows: Array, heads: Sequence[int], model: Model, layer: int) -> Array:
    """(n_rows, len(heads) × head_dim) of (n_rows, n_head × head_dim)."""
    width = model.n_head * model.head_dim
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
        raise UsageError(f"head_out.{layer} has rows of {width} here, got shape {rows.shape}")
    by_head = rows.reshape(len(rows), model.n_head, -1)
    return by_head[:, list(heads)].reshape(len(rows), -1)


def _draw(n: int, n_rows: int, rng: np.random.Generator) -> list[int]:
    """A row for each of n tokens. If there are as many rows as tokens, a permutation in which no
    token keeps its own."""
    if n_rows != n:
        return [int(i) for i in rng.integers(max(n_rows, 1), size=n)]
    if n == 1:
        raise UsageError("a prompt of one token has no other token to resample from")
    order = rng.permutation(n)
    after = np.empty(n, np.intp)
    after[order] = np.roll(order, 1)  # one cycle through all
    return [int(i) for i in after]
