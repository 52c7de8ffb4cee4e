"""Which of the file's matrices write what a block adds to the residual.

Found in the graph, from the site's node back to the products whose sum it is. Behind a product there may
be a bias, a scale for each dimension, or a norm (gemma2's post-norms); experts write through the weights of
the router, which are one number for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mia.engine.graph import Topology
from mia.errors import ModelError
from mia.llama import Node
from mia.sites import Site

_SAME = ("RESHAPE", "VIEW", "CONT", "PERMUTE", "CPY", "DUP")


@dataclass(frozen=True)
class Writer:
    """A tensor whose product, or whose rows, a site is a sum of.

    Attributes:
        tensor: its name in the file.
        kind: "matrix"; "experts" (one matrix for each); "table" (rows are looked up); "bias".
        scales: vectors of the file that what it writes is multiplied with.
        normed: whether a norm stands behind it.
    """

    tensor: str
    kind: str
    scales: tuple[str, ...] = ()
    normed: bool = False


def writers(topology: Topology, site: Site) -> list[Writer]:
    """The tensors that write a site: `attn_out.i`, `mlp_out.i`, or `resid_pre.0` (the embedding).

    Raises:
        ModelError: the model has no such site, or something else than products is in it.
    """
    node = topology.sites.get(site)
    if node is None:
        raise ModelError(topology.absence(site))
    found: dict[Writer, None] = {}
    seen: set[tuple[int, tuple[str, ...], bool]] = set()
    stack: list[tuple[int, tuple[str, ...], bool]] = [(topology.nodes[node.index].addr, (), False)]
    while stack:
        item = stack.pop()
        if item not in seen:
            seen.add(item)
            for step in _step(topology, site, *item):
                if isinstance(step, Writer):
                    found[step] = None
                else:
                    stack.append(step)
    return sorted(found, key=lambda w: (w.kind == "bias", w.tensor))


_Step = tuple[int, tuple[str, ...], bool]


def _step(
    topology: Topology, site: Site, addr: int, scales: tuple[str, ...], normed: bool
) -> list[Writer | _Step]:
    n = topology.node(addr)
    name = topology.node(n.src[0]).name if n.src else n.name

    def on(a: int, *more: str, norm: bool = False) -> _Step:
        return a, (*scales, *more), normed or norm

    graph = topology.graph
    if graph.is_added(n):
        raise ModelError(f"{site} has a LoRA adapter in it; open the model without")
    if n.op in ("MUL_MAT", "MUL_MAT_ID") and graph.is_weight(n.src[0]):
        return [Writer(name, "matrix" if n.op == "MUL_MAT" else "experts", scales, normed)]
    if n.op == "GET_ROWS" and not graph.picks_outputs(n) and topology.is_leaf(n.src[0]):
        return [Writer(name, "table", scales, normed)]
    if n.op in ("ADD", "ADD_ID"):
        first, second = n.src[:2]
        if graph.is_weight(first):
            first, second = second, first
        if graph.is_weight(second):
            bias = graph.node(graph.root(second)).name
            return [on(first), Writer(bias, "bias", scales, normed)]
        return [on(first), on(second)]
    if n.op == "MUL":
        by = topology.node(n.src[1])
        if by.ne[0] == 1:
            return [on(n.src[0])]
        if topology.is_leaf(by.addr) and prod(by.ne) == n.ne[0]:
            return [on(n.src[0], by.name)]
    if n.op == "RMS_NORM":
        return [on(n.src[0], norm=True)]
    if (n.op == "SCALE" and not n.param_f32(1)) or n.op in _SAME or graph.picks_outputs(n):
        return [on(n.src[0])]
    raise ModelError(f"{site} is not a sum of products with the file's matrices: it has {_op(n)}")


def _op(n: Node) -> str:
    return f"{n.op} ({n.name})" if n.name else n.op
