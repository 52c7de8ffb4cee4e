"""From a graph's nodes to sites: by name if llama.cpp gives a reliable one, else by structure.

Names alone are not enough. `Qcur-3` names three nodes (the site is the last, after RoPE),
`ffn_out-3` may be the MLP's output or its sum with the residual, and `attn_out-3` exists in
a quarter of the architectures. The residual stream is reliable: `l_out-i` is the end of
block i, it is a sum, and attention enters it through the one matrix product that reads
`kqv_out-i`. So the names `l_out` and `kqv_out` are the anchors, and the sums between them
give the rest.

A site of `mia.sites.SITES` is the last node with its llama.cpp name, unless `_SEARCHES` has
a method for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from mia.llama import Node, describe
from mia.sites import KINDS, SITES, Site, SiteKind

#: ops that only look at the same numbers in another shape, or take some rows of them
_PASS = ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "CONT", "GET_ROWS", "DUP", "CPY")


@dataclass(frozen=True, slots=True)
class SiteNode:
    """Where a site lies in a graph.

    `layout`: "rows" `(n_rows, width)`, "heads" `(n_rows, n_head, head_dim)`, or
    "pattern" `(n_head, n_rows, n_cells)`. `outputs_only`: the node has rows only
    for tokens whose logits were asked for (the end of the last block). `shape` is that
    of one row: `(width,)`, `(n_head, head_dim)`, or `(n_head,)` for a pattern, whose
    keys grow with the sequence. `scale`: what the node's numbers are multiplied with
    to be the site's (scores, which the softmax scales).
    """

    index: int
    layout: str
    outputs_only: bool
    shape: tuple[int, ...]
    scale: float = 1.0

    def read_shape(self, n_keys: int) -> tuple[int, ...]:
        """The shape of a captured row: heads flattened, patterns (n_head, n_keys)."""
        return (self.shape[0], n_keys) if self.layout == "pattern" else (prod(self.shape),)


class Topology:
    """One graph's nodes in order, and the sites in it. Indices, not addresses: the same
    topology comes back at other addresses when llama.cpp builds the graph anew."""

    def __init__(self, nodes: Sequence[Node], *, n_layer: int, n_head: int):
        self.nodes = nodes
        self.n_layer = n_layer
        self._n_head = n_head
        self._index = {n.addr: i for i, n in enumerate(nodes)}
        self._skippable: dict[int, list[int]] = {}
        self._named: dict[str, int] = {n.name: i for i, n in enumerate(nodes)}  # the last wins
        self._leaves: dict[int, Node] = {}
        self._users: dict[int, list[int]] = defaultdict(list)
        for i, n in enumerate(nodes):
            for s in n.src:
                self._users[s].append(i)
        self._outputs_only = self._propagate_outputs()
        self.sites: dict[Site, SiteNode] = {}
        self._resolve()

    def same_as(self, addrs_nodes: Sequence[Node]) -> bool:
        """True where other nodes form this graph again, at whatever addresses."""
        return len(addrs_nodes) == len(self.nodes) and all(
            a.name == b.name and a.op == b.op for a, b in zip(addrs_nodes, self.nodes, strict=True)
        )

    # -- small steps through the graph --------------------------------------

    def node(self, addr: int) -> Node:
        """The node or leaf (weight, input) at an address of this graph."""
        i = self._index.get(addr)
        if i is not None:
            return self.nodes[i]
        if addr not in self._leaves:
            self._leaves[addr] = describe(addr)
        return self._leaves[addr]

    def is_leaf(self, addr: int) -> bool:
        return addr not in self._index

    def root(self, addr: int) -> int:
        """Walks up through ops that only reshape or pick rows."""
        while True:
            n = self.node(addr)
            if self.is_leaf(addr) or n.op not in _PASS or not n.src:
                return addr
            if n.op == "GET_ROWS" and not self._picks_outputs(n):
                return addr  # an embedding is looked up: numbers begin here
            addr = n.src[0]

    def _picks_outputs(self, n: Node) -> bool:
        return (
            n.op == "GET_ROWS" and self.is_leaf(n.src[1]) and self.node(n.src[1]).name == "out_ids"
        )

    def _propagate_outputs(self) -> list[bool]:
        flags: list[bool] = []
        for n in self.nodes:
            flags.append(
                self._picks_outputs(n)
                or any(flags[self._index[s]] for s in n.src if s in self._index)
            )
        return flags

    # -- resolution ----------------------------------------------------------

    def _resolve(self) -> None:
        for kind in SITES:
            if not kind.layered and not kind.block_end:
                self._place(kind, None)
        for layer in range(self.n_layer):
            for kind in SITES:
                if kind.layered:
                    self._place(kind, layer)
        for kind in SITES:
            if not kind.layered and kind.block_end:
                self._place(kind, None)

    def _place(self, kind: SiteKind, layer: int | None) -> None:
        """Adds a site if the graph has a node for it."""
        search = _SEARCHES.get(kind.name)
        index = self._named_node(kind, layer) if search is None else search(self, layer or 0)
        if index is None:
            return
        layout, shape = self._row(kind, layer, self.nodes[index].ne)
        scale = self._softmax_scale(layer) if kind.name == "attn_scores" else 1.0
        self.sites[Site(kind.name, layer)] = SiteNode(
            index, layout, self._outputs_only[index], shape, scale
        )

    def _named_node(self, kind: SiteKind, layer: int | None) -> int | None:
        """The last node with one of the llama.cpp names of the site."""
        suffix = "" if layer is None else f"-{layer}"
        indices = (self._named.get(name + suffix) for name in kind.llama)
        return next((i for i in indices if i is not None), None)

    def _row(
        self, kind: SiteKind, layer: int | None, ne: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]]:
        """Layout and shape of one row, for `SiteNode`."""
        if kind.by_key:
            return "pattern", (ne[2],)
        # the traced graph has two rows, which tells (head_dim, n_head, 2) from (width, 2)
        if kind.headed and ne[2] > 1:
            return "heads", (ne[1], ne[0])
        if kind.headed and kind.shape[0] == "n_head":
            q = self.sites.get(Site("q", layer))
            n_head = q.shape[0] if q is not None and q.layout == "heads" else self._n_head
            return "rows", (n_head, ne[0] // n_head)
        return "rows", (ne[0],)

    def _site_index(self, name: str, layer: int) -> int | None:
        """The node of a site that is resolved already."""
        node = self.sites.get(Site(name, layer))
        return None if node is None else node.index

    def _embedding(self, _: int) -> int | None:
        """The node that looks up the token embeddings."""
        return next(
            (
                i
                for i, n in enumerate(self.nodes)
                if n.op == "GET_ROWS" and "token_embd" in self.node(n.src[0]).name
            ),
            None,
        )

    def _block_input(self, layer: int) -> int | None:
        """The output of the block before; for the first block what its norm reads."""
        if layer > 0:
            return self._named.get(f"l_out-{layer - 1}")
        norm = self._named.get("attn_norm-0")
        while norm is not None:
            n = self.nodes[norm]
            if n.op in ("RMS_NORM", "NORM"):
                return self._index.get(self.root(n.src[0]))
            norm = self._index.get(n.src[0])
        return next(
            (self._named[x] for x in ("inp_scaled", "inpL", "embd") if x in self._named), None
        )

    def _scores(self, layer: int) -> int | None:
        """What the softmax of the attention reads."""
        softmax = self._named.get(f"kq_soft_max-{layer}")
        if softmax is None or self.nodes[softmax].op != "SOFT_MAX":
            return None
        return self._index.get(self.nodes[softmax].src[0])

    def _softmax_scale(self, layer: int | None) -> float:
        return self.nodes[self._named[f"kq_soft_max-{layer}"]].param_f32(0)

    def _attention_output(self, layer: int) -> int | None:
        """What attention adds to the residual."""
        return self._attention(layer)[0]

    def _residual_middle(self, layer: int) -> int | None:
        """The sum of the block's input and what attention adds."""
        return self._attention(layer)[1]

    def _attention(self, layer: int) -> tuple[int | None, int | None]:
        """What attention adds to the residual, and the sum. Follows the product that reads
        the heads forward through bias, post-norm and scaling until it meets the residual."""
        heads, pre = self._site_index("head_out", layer), self._site_index("resid_pre", layer)
        product = None if heads is None else self._product_after(heads)
        if product is None:
            return self._named.get(f"attn_out-{layer}"), self._named.get(f"ffn_inp-{layer}")
        pre_addr = self.nodes[pre].addr if pre is not None else 0
        index = result = product  # `result`: the last node that still has attention's rows
        while True:
            users = [u for u in self._users[self.nodes[index].addr] if u > index]
            if len(users) != 1:
                return result, None
            user = self.nodes[users[0]]
            others = [s for s in user.src if s != self.nodes[index].addr]
            if user.op == "ADD" and others and self.root(others[0]) == pre_addr:
                return result, users[0]
            continues = user.op in ("GET_ROWS", "RMS_NORM", "NORM", "SCALE", "RESHAPE") or (
                user.op in ("ADD", "MUL") and bool(others) and self.is_leaf(others[0])
            )
            if not continues or user.src[0] != self.nodes[index].addr:
                return result, None
            index = users[0]
            if user.op != "GET_ROWS":
                result = index

    def _product_after(self, index: int) -> int | None:
        """The matrix product that reads a node, directly or through a reshape or scale."""
        for _ in range(4):
            users = [u for u in self._users[self.nodes[index].addr] if u > index]
            product = next((u for u in users if self.nodes[u].op == "MUL_MAT"), None)
            if product is not None:
                return product
            if len(users) != 1:
                return None
            index = users[0]
        return None

    def _mlp_output(self, layer: int) -> int | None:
        """The other term of the sum that makes `l_out`."""
        mid, post = self._site_index("resid_mid", layer), self._named.get(f"l_out-{layer}")
        if post is None or mid is None:
            return self._named_mlp_output(layer, post)
        mid_addr = self.nodes[mid].addr
        index: int | None = post
        while index is not None and self.nodes[index].op == "ADD":
            a, b = self.nodes[index].src[:2]
            if self.root(a) == mid_addr:
                return self._index.get(b)
            if self.root(b) == mid_addr:
                return self._index.get(a)
            # a control vector is added after the sum
            if self.is_leaf(b):
                index = self._index.get(a)
            elif self.is_leaf(a):
                index = self._index.get(b)
            else:
                break
        return self._named_mlp_output(layer, post)

    def _named_mlp_output(self, layer: int, post: int | None) -> int | None:
        for name in (f"ffn_moe_out-{layer}", f"ffn_out-{layer}"):
            index = self._named.get(name)
            if index is not None and index != post:
                return index
        return None

    # -- what people ask ------------------------------------------------------

    def about(self, name: str) -> str:
        """`SiteKind.about` with this model's sizes; empty if the graph does not show them."""
        first = {site.name: node for site, node in reversed(self.sites.items())}
        if not {"q", "k", "head_out"} <= first.keys():
            return ""
        n_head, head_dim = first["head_out"].shape
        n_head_kv = first["k"].shape[0] if first["k"].layout == "heads" else n_head
        shared = f", each read by {n_head // n_head_kv} query heads" if n_head_kv < n_head else ""
        return KINDS[name].about.format(
            n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, kv_shared=shared
        )

    # -- what the engine asks -------------------------------------------------

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
            at = self._index.get(stack.pop())
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


#: sites whose node has no reliable name; a search may use the sites above it in `SITES`
_SEARCHES: dict[str, Callable[[Topology, int], int | None]] = {
    "embed": Topology._embedding,
    "resid_pre": Topology._block_input,
    "attn_scores": Topology._scores,
    "attn_out": Topology._attention_output,
    "resid_mid": Topology._residual_middle,
    "mlp_out": Topology._mlp_output,
}
