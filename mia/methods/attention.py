"""Attention maps: what each head of each layer looks at.

Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; the per-head reading is Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits". Weighting by the norm of
the value is Kobayashi et al. 2020 (arXiv 2004.10102), "Attention is Not Only a Weight".

| in the papers                | here                                                     |
|------------------------------|----------------------------------------------------------|
| A^h, softmax(QK^T/sqrt(d))   | `AttentionMaps.weights[layer, h]`, (n_query, n_key)      |
| query i, key j               | positions in the prompt; j > i is 0                      |
| v_j^h                        | `v`, (n_head_kv, head_dim) per token                     |
| alpha_ij ||f(x_j)||          | `value_weighted`: A_ij^h times the norm of v_j^h         |

Where we deviate: Kobayashi et al. take the norm after W_O, of what a head would write; we take
it of the value itself, which W_O has not turned yet (`attribution` has what heads write).

With grouped queries head h reads key and value head h // (n_head / n_head_kv).

Patterns exist only where attention is not fused: a run that reads them has flash
attention off, other runs have it on wherever the cache allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.errors import UsageError
from mia.request import Capture, Request, Result
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The attention of some layers over one prompt.

    Attributes:
        tokens: the prompt's token ids.
        layers: which layers, in order.
        weights: (len(layers), n_head, n_query, n_key); a query's weights sum to 1, keys are
            by position. With `value_weighted` each is times the norm of the value it moves,
            and rows no longer sum to 1.
        value_weighted: which of the two.
    """

    tokens: list[int]
    layers: list[int]
    weights: Array
    value_weighted: bool = False

    def __getitem__(self, head: tuple[int, int]) -> Array:
        """The map of one head, `maps[layer, head]`: (n_query, n_key)."""
        layer, h = head
        if layer not in self.layers or not 0 <= h < self.weights.shape[1]:
            raise UsageError(
                f"there is no map of layer {layer}, head {h}; layers {', '.join(map(str, self.layers))}, "
                f"heads 0 to {self.weights.shape[1] - 1}"
            )
        return self.weights[self.layers.index(layer), h]


def attention_maps(
    model: Model,
    tokens: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    edits: Sequence[Edit] = (),
    value_weighted: bool = False,
) -> AttentionMaps:
    """Runs a prompt and reads where every head looks.

    Args:
        layers: which; all by default.
        edits: changes while it runs.
        value_weighted: multiply each weight by the norm of the value that it moves.
    """
    request = maps_request(model, tokens, layers=layers, edits=edits, values=value_weighted)
    result = model.run([request])[0]
    return maps_of(model, request, result, value_weighted=value_weighted)


def maps_request(
    model: Model,
    tokens: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    edits: Sequence[Edit] = (),
    values: bool = False,
) -> Request:
    """The request behind `attention_maps`, to be run together with others."""
    wanted = range(model.n_layer) if layers is None else layers
    names = ("attn_pattern", "v") if values else ("attn_pattern",)
    sites = [Site(name, i) for i in wanted for name in names]
    return Request(list(tokens), list(edits), [Capture(sites)], logits=None)


def maps_of(
    model: Model, request: Request, result: Result, *, value_weighted: bool = False
) -> AttentionMaps:
    """The maps in the result of a `maps_request`."""
    layers = [s.layer for s in result.captures if s.name == "attn_pattern" and s.layer is not None]
    # captured as (n_query, n_head, n_key)
    weights = np.stack([result.captures[Site("attn_pattern", i)] for i in layers]).swapaxes(1, 2)
    if value_weighted:
        norms = [
            value_norms(result.captures[Site("v", i)], model.n_head_kv, model.n_head)
            for i in layers
        ]
        weights = weights * np.stack(norms)[:, :, None, :]
    tokens = [int(t) for t in request.tokens]
    return AttentionMaps(tokens, layers, np.ascontiguousarray(weights), value_weighted)


def value_norms(v: Array, n_head_kv: int, n_head: int) -> Array:
    """||v_j^h|| for each head h and key j: (n_head, n_key), from rows (n_key, n_head_kv × head_dim)."""
    norms = np.linalg.norm(v.reshape(len(v), n_head_kv, -1), axis=-1).T  # (n_head_kv, n_key)
    return np.repeat(norms, n_head // n_head_kv, axis=0).astype(np.float32)
