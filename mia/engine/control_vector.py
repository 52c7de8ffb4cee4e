"""When llama.cpp's own control vector takes the place of edits: it costs nothing.

It adds a vector at the end of a block, to all tokens of all sequences of a context. So it serves
if the edits of a run are nothing but such additions and every request has the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array
from mia.edits import Edit
from mia.engine.finite import check_edited
from mia.errors import UsageError
from mia.request import Request
from mia.sites import Site, parse

if TYPE_CHECKING:
    from mia.engine.graph import Topology


def blocks_with_vector(topology: Topology) -> list[int]:
    """The blocks in which llama.cpp adds a control vector. It does right before it names the sum at
    the block's end; some architectures leave it out in some blocks, without a word."""
    ends = ((i, topology.sites.get(Site("resid_post", i))) for i in range(1, topology.n_layer))
    return [i for i, at in ends if at and topology.nodes[at.index].name == f"l_out-{i}"]


def is_control_vector(edit: Edit, site: Site) -> bool:
    """Whether llama.cpp's control vector does the same: an add, at all tokens, at a block's end."""
    return (
        edit.op == "add"
        and site.name == "resid_post"
        and (site.layer or 0) >= 1  # llama.cpp has none for the first block
        and edit.tokens is None
        and edit.on_generated
        and edit.heads is None
        and edit.dims is None
        and not edit.keep_norm
        and np.ndim(edit.coeff) == 0
        and edit.value is not None
        and np.ndim(edit.value) == 1
    )


def shared_edits(
    requests: Sequence[Request], n_layer: int, blocks: Collection[int]
) -> list[tuple[Edit, Site]]:
    """The edits of all requests, each with its site, if a control vector can take their place;
    none if it cannot. Equal edits are the same objects. `blocks`: those that have the vector."""
    edits = requests[0].edits
    if not edits or any(r.captures or len(r.edits) != len(edits) for r in requests):
        return []
    if any(a is not b for r in requests for a, b in zip(r.edits, edits, strict=True)):
        return []
    pairs = [(e, parse(e.site, n_layer)) for e in edits]
    same = all(is_control_vector(e, s) and s.layer in blocks for e, s in pairs)
    return pairs if same else []


def directions(edits: Sequence[tuple[Edit, Site]], *, n_layer: int, n_embd: int) -> Array:
    """The edits summed up: (n_layer - 1, n_embd), for blocks 1 and above.

    Raises `UsageError` if a value has another width, or a sum is not finite.
    """
    out = np.zeros((n_layer - 1, n_embd), np.float32)
    for edit, site in edits:
        value = np.asarray(edit.value, np.float32)
        if value.shape != (n_embd,):
            raise UsageError(
                f"{site} has rows of {n_embd} here, the edit's value has {value.shape[-1]}"
            )
        assert site.layer is not None
        with np.errstate(over="ignore", invalid="ignore"):
            out[site.layer - 1] += np.asarray(edit.coeff, np.float32) * value
        check_edited(out[site.layer - 1], site)
    return out
