"""From a graph's nodes to sites.

A block's sites are found by structure, from two names that are the same in every architecture:
`l_out-i`, the end of block i, and `kqv_out-i`, the heads (see `mia.engine.blocks`). A site that
structure does not decide is the last node with its llama.cpp name; whether it is what the name
says is checked by `mia.models.claims`, as is everything else here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from mia.engine.blocks import Block, Part, block_end
from mia.engine.nodes import LOOKS, Graph
from mia.engine.routes import Routes
from mia.llama import Node
from mia.sites import KINDS, SITES, Site, SiteKind


@dataclass(frozen=True, slots=True)
class SiteNode:
    """Where a site lies in a graph.

    `layout`: "rows" `(n_rows, width)`, "heads" `(n_rows, n_head, head_dim)`,
    "pattern" `(n_head, n_rows, n_cells)`, or "chosen" `(n_rows, n_expert_used)`. `outputs_only`: the node has rows only
    for tokens whose logits were asked for (the end of the last block). `shape` is that
    of one row: `(width,)`, `(n_head, head_dim)`, or `(n_head,)` for a pattern, whose
    keys grow with the sequence. `scale`: what the node's numbers are multiplied with
    to be the site's (scores, which the softmax scales). `ids`: of a "chosen" node, the index of
    the node with the expert that each of its numbers is of.
    """

    index: int
    layout: str
    outputs_only: bool
    shape: tuple[int, ...]
    scale: float = 1.0
    ids: int = -1

    def read_shape(self, n_keys: int) -> tuple[int, ...]:
        """The shape of a captured row: heads flattened, patterns (n_head, n_keys)."""
        return (self.shape[0], n_keys) if self.layout == "pattern" else (prod(self.shape),)


class Topology:
    """One graph's nodes in order, and the sites in it. Indices, not addresses: the same
    topology comes back at other addresses when llama.cpp builds the graph anew.

    Attributes:
        sites: where each site lies.
        missing: why this graph has no such site, for those of its blocks.
        notes: how a site differs from what its name says elsewhere.
        by_name: sites of a block that only their names tell.
        factors: what the sum at the end of a block is multiplied with, by layer.
        cache_layers: the layer whose keys a layer attends to, where it is known.
        mixed: layers in which something else is added to the residual beside attention.
        followed: layers in which something else is added behind the MLP.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        n_layer: int,
        n_head: int,
        n_tokens: int = 2,
        refused: Mapping[Site, str] | None = None,
    ):
        """`n_tokens`: of the batch that showed the graph; `refused`: sites that are not what their
        names say, and why; not offered."""
        self.nodes, self.n_layer = nodes, n_layer
        self._n_head, self._n_tokens = n_head, n_tokens
        self.graph = Graph(nodes)
        self._routes = Routes(self.graph)
        self._skippable: dict[int, list[int]] = {}
        self._stores: dict[int, int] = {}
        self._outputs_only = self.graph.outputs_only()
        self.sites: dict[Site, SiteNode] = {}
        self.missing: dict[Site, str] = {}
        self.notes: dict[Site, str] = {}
        self.by_name: set[Site] = set()
        self.mixed: set[int] = set()
        self.followed: set[int] = set()
        self.factors: dict[int, list[float | str]] = {}
        self.cache_layers: dict[int, int] = {}
        self._resolve()
        for site, why in (refused or {}).items():
            self.refuse(site, why)

    def same_as(self, addrs_nodes: Sequence[Node]) -> bool:
        """True where other nodes form this graph again, at whatever addresses."""
        return len(addrs_nodes) == len(self.nodes) and all(
            a.name == b.name and a.op == b.op for a, b in zip(addrs_nodes, self.nodes, strict=True)
        )

    def node(self, addr: int) -> Node:
        """The node or leaf (weight, input) at an address of this graph."""
        return self.graph.node(addr)

    def is_leaf(self, addr: int) -> bool:
        return self.graph.is_leaf(addr)

    def refuse(self, site: Site, why: str) -> None:
        """Takes a site back that is not what its name says."""
        if self.sites.pop(site, None) is not None:
            self.missing[site] = why

    # -- resolution ----------------------------------------------------------

    def _resolve(self) -> None:
        for kind in SITES:
            if not kind.layered and not kind.block_end:
                self._place(kind, None, self._whole_model(kind))
        before = None
        for layer in range(self.n_layer):
            end = block_end(self.graph, layer, self.n_layer)
            block = Block(self.graph, layer, pre=before, end=end, n_tokens=self._n_tokens)
            for kind in SITES:
                if kind.layered:
                    self._place(kind, layer, self._part(kind, layer, block))
            if block.is_mixed:
                self.mixed.add(layer)
            if block.is_followed:
                self.followed.add(layer)
            if block.factors:
                self.factors[layer] = block.factors
            if block.cache_layer is not None:
                self.cache_layers[layer] = block.cache_layer
            before = end
        for kind in SITES:
            if not kind.layered and kind.block_end:
                self._place(kind, None, self._named(kind, None))

    def _part(self, kind: SiteKind, layer: int, block: Block) -> Part:
        """What structure says; where it does not say what a block is made of, names."""
        if kind.name in _OF_ROUTE:
            return self._routes.part(kind.name, layer)
        by_structure = _OF_BLOCK.get(kind.name)
        if by_structure is None:
            return self._named(kind, layer)
        part = by_structure(block)
        if part.index is None and not block.is_known and not kind.residual:
            named = self._named(kind, layer)
            if named.index is not None:
                self.by_name.add(Site(kind.name, layer))
                return named
        return part

    def _whole_model(self, kind: SiteKind) -> Part:
        return self._embedding() if kind.name == "embed" else self._named(kind, None)

    def _named(self, kind: SiteKind, layer: int | None) -> Part:
        """The last node with one of the llama.cpp names of the site."""
        suffix = "" if layer is None else f"-{layer}"
        indices = (self.graph.named.get(name + suffix) for name in kind.llama)
        index = next((i for i in indices if i is not None), None)
        return Part(index, "" if index is not None else "llama.cpp has no such node")

    def _embedding(self) -> Part:
        """The node that looks up the token embeddings."""
        index = self.graph.find(
            lambda n: n.op == "GET_ROWS" and "token_embd" in self.node(n.src[0]).name
        )
        if index is None:
            return Part(None, "the graph looks up no token embeddings")
        while added := [
            u
            for u in self.graph.users[self.nodes[index].addr]
            if self.graph.is_added(self.nodes[u]) and self.nodes[u].src[0] == self.nodes[index].addr
        ]:
            index = added[0]
        users = [self.nodes[u] for u in self.graph.users[self.nodes[index].addr]]
        scaled = next((u for u in users if u.op == "SCALE"), None)
        factor = "" if scaled is None else f"before its scale of {scaled.param_f32(0):g}"
        return Part(index, factor)

    def _place(self, kind: SiteKind, layer: int | None, part: Part) -> None:
        """Adds a site if the graph has a node for it."""
        site = Site(kind.name, layer)
        if part.index is None:
            self.missing[site] = part.note
            return
        if part.note:
            self.notes[site] = part.note
        layout, shape = self._row(kind, layer, self.nodes[part.index].ne)
        ids = -1
        if kind.name == "expert_weights":  # of those chosen; the site has one for each expert
            assert layer is not None
            route = self._routes.by_layer[layer]
            layout, shape, ids = "chosen", (route.n_expert,), route.ids
        self.sites[site] = SiteNode(
            part.index, layout, self._outputs_only[part.index], shape, part.scale, ids
        )

    def _row(
        self, kind: SiteKind, layer: int | None, ne: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]]:
        """Layout and shape of one row, for `SiteNode`."""
        if kind.by_key:
            return "pattern", (ne[2],)
        # the scouted graph has two rows, which tells (head_dim, n_head, 2) from (width, 2)
        in_heads = ne[2] > 1 if self._n_tokens > 1 else ne[1] > 1
        if kind.headed and in_heads:
            return "heads", (ne[1], ne[0])
        if kind.headed:
            n_head = self._heads_side_by_side(kind, layer, ne[0])
            return "rows", (n_head, ne[0] // n_head)
        return "rows", (ne[0],)

    def _heads_side_by_side(self, kind: SiteKind, layer: int | None, width: int) -> int:
        """How many heads a row has whose node does not tell: as many as the queries, or as many of the
        queries' width as it holds; keys and values of another width are one head's (one for all queries,
        Shazeer 2019, or what they are made of, DeepSeek 2024)."""
        q = self.sites.get(Site("q", layer))
        if q is not None and q.layout != "heads":
            q = None
        if kind.shape[0] == "n_head":
            return self._n_head if q is None else q.shape[0]
        return 1 if q is None or width % q.shape[1] else width // q.shape[1]

    def absence(self, site: Site) -> str:
        """A line that says why there is no such site."""
        why = self.missing.get(site)
        reason = f" ({why})" if why else ""
        have = ", ".join(dict.fromkeys(s.name for s in self.sites))
        return f"this model has no site {site}{reason}; it has {have}"

    def gate(self, layer: int) -> str:
        """What makes scores of a router's logits: "softmax", "sigmoid" or "sqrt_softplus"."""
        return self._routes.by_layer[layer].gate

    # -- what people ask ------------------------------------------------------

    def about(self, name: str) -> str:
        """`SiteKind.about` with this model's sizes; empty if the graph does not show them."""
        first = {site.name: node for site, node in reversed(self.sites.items())}
        if not {"q", "k", "head_out"} <= first.keys():
            return ""
        n_head, head_dim = first["head_out"].shape
        n_head_kv = first["k"].shape[0]
        if name in ("k", "v") and name in first:
            head_dim = first[name].shape[1]  # of latent ones wider than the heads' outputs
        shared = f", each read by {n_head // n_head_kv} query heads" if n_head_kv < n_head else ""
        return KINDS[name].about.format(
            n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, kv_shared=shared
        )

    # -- what the engine asks -------------------------------------------------

    @property
    def has_residuals(self) -> bool:
        """Whether the end of every block is a site, so that a run can start behind it."""
        return all(Site("resid_post", i) in self.sites for i in range(self.n_layer))

    @cached_property
    def cell_inputs(self) -> dict[int, tuple[int, int]]:
        """layer -> (index of the node that stores its keys, address of the cells it stores to)."""
        out: dict[int, tuple[int, int]] = {}
        for i, n in enumerate(self.nodes):
            if n.op == "SET_ROWS" and n.name.startswith("cache_k_l"):
                layer = int(n.name.removeprefix("cache_k_l").split()[0])
                cells = next(s for s in n.src if self.is_leaf(s) and self.node(s).type == "i64")
                out[layer] = (i, cells)
        return out

    def skippable_below(self, layer: int) -> list[int]:
        """Indices of the nodes that need not run where `resid_post.(layer-1)` is already known:
        all before it, but for those that something after it still reads."""
        found = self._skippable.get(layer)
        if found is not None:
            return found
        known = self.sites[Site("resid_post", layer - 1)].index
        needed: set[int] = set()
        stack = [s for n in self.nodes[known + 1 :] for s in n.src]
        while stack:
            at = self.graph.index.get(stack.pop())
            if at is None or at >= known or at in needed:
                continue
            needed.add(at)
            stack.extend(self.nodes[at].src)
        found = [i for i in range(known + 1) if i not in needed]
        self._skippable[layer] = found
        return found

    @cached_property
    def skippable_tail(self) -> list[int]:
        """Indices of the unembedding, which need not run where no logits are wanted."""
        norm = self.sites.get(Site("final_norm"))
        return [] if norm is None else list(range(norm.index + 1, len(self.nodes)))

    def last_store(self, n_blocks: int) -> int:
        """Index of the node behind which the first `n_blocks` blocks store nothing that a later decode
        attends to; -1 for none."""
        last = self._stores.get(n_blocks)
        if last is None:
            end = len(self.nodes)
            if n_blocks < self.n_layer:
                below = (
                    s.index
                    for site, s in self.sites.items()
                    if site.layer is not None and site.layer < n_blocks
                )
                end = max(below, default=-1)
            last = self._stores[n_blocks] = max(
                (i for i in self.graph.writes if i <= end), default=-1
            )
        return last

    @cached_property
    def keeps_state(self) -> bool:
        """Whether a memory is read before it is written, as a recurrent one is: each decode needs
        what the last one left in every block."""
        written: dict[int, int] = {}  # the memory -> index of its last write
        for i in self.graph.writes:
            written[self.nodes[i].view_src] = i
        return any(
            written.get(self.graph.memory(s), -1) > i
            for i, n in enumerate(self.nodes)
            if n.op not in LOOKS and i not in self.graph.writes
            for s in n.src
        )


#: sites of a block that structure decides
_OF_BLOCK: dict[str, Callable[[Block], Part]] = {
    "resid_post": Block.resid_post,
    "resid_pre": Block.resid_pre,
    "attn_norm": Block.attn_norm,
    "mlp_norm": Block.mlp_norm,
    "q": Block.q,
    "k": Block.k,
    "v": Block.v,
    "attn_scores": Block.attn_scores,
    "attn_pattern": Block.attn_pattern,
    "head_out": Block.head_out,
    "attn_out": Block.attn_out,
    "resid_mid": Block.resid_mid,
    "mlp_out": Block.mlp_out,
}
#: sites of a layer of experts
_OF_ROUTE = ("router", "router_choice", "experts", "expert_weights")
