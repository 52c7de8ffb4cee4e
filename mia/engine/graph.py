"""From a graph's nodes to sites: by name where llama.cpp gives one, else by structure.

Names alone do not do. `Qcur-3` is given three times (the last, after RoPE, is
meant), `ffn_out-3` may be the MLP's output or its sum with the residual, and
`attn_out-3` exists in a quarter of the architectures. What is certain is the
residual stream: `l_out-i` is the end of block i, it is a sum, and attention
comes into it through the one matrix product that reads `kqv_out-i`. So the
names `l_out` and `kqv_out` are the anchors, and the sums between them tell the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mia.llama.ggml import Node, describe
from mia.sites import BY_KEY, Site

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

    def _add(self, name: str, layer: int | None, index: int | None) -> None:
        if index is None:
            return
        ne, layout, scale = self.nodes[index].ne, "rows", 1.0
        shape: tuple[int, ...] = (ne[0],)
        if name == "attn_scores":
            softmax = self.nodes[self._named[f"kq_soft_max-{layer}"]]
            scale = softmax.param_f32(0)
        if name in BY_KEY:
            layout, shape = "pattern", (ne[2],)
        elif name in ("q", "k", "v"):
            # two rows are traced, so that (head_dim, n_head, 2) and (width, 2) differ
            if ne[2] > 1:
                layout, shape = "heads", (ne[1], ne[0])
        elif name == "head_out":
            q = self.sites.get(Site("q", layer))
            n_head = q.shape[0] if q is not None and q.layout == "heads" else self._n_head
            shape = (n_head, ne[0] // n_head)
        self.sites[Site(name, layer)] = SiteNode(
            index, layout, self._outputs_only[index], shape, scale
        )

    def _resolve(self) -> None:
        named = self._named.get
        embed = next(
            (
                i
                for i, n in enumerate(self.nodes)
                if n.op == "GET_ROWS" and "token_embd" in self.node(n.src[0]).name
            ),
            None,
        )
        self._add("embed", None, embed)
        for i in range(self.n_layer):
            self._resolve_block(i)
        self._add("final_norm", None, named("result_norm"))
        self._add("logits", None, named("result_output"))

    def _resolve_block(self, i: int) -> None:
        named = self._named.get
        pre = self._block_input(i)
        self._add("resid_pre", i, pre)
        self._add("attn_norm", i, named(f"attn_norm-{i}"))
        self._add("mlp_norm", i, named(f"ffn_norm-{i}"))
        for site, name in (("q", "Qcur"), ("k", "Kcur"), ("v", "Vcur")):
            self._add(site, i, named(f"{name}-{i}"))
        softmax = named(f"kq_soft_max-{i}")
        if softmax is not None and self.nodes[softmax].op == "SOFT_MAX":
            self._add("attn_scores", i, self._index.get(self.nodes[softmax].src[0]))
        self._add("attn_pattern", i, softmax)
        self._add("head_out", i, named(f"kqv_out-{i}"))
        attn, mid = self._attention_output(i, pre)
        self._add("attn_out", i, attn)
        self._add("resid_mid", i, mid)
        post = named(f"l_out-{i}")
        self._add("mlp_out", i, self._mlp_output(i, mid, post))
        self._add("resid_post", i, post)

    def _block_input(self, i: int) -> int | None:
        """`l_out-(i-1)`; for the first block what its norm reads."""
        if i > 0:
            return self._named.get(f"l_out-{i - 1}")
        norm = self._named.get("attn_norm-0")
        while norm is not None:
            n = self.nodes[norm]
            if n.op in ("RMS_NORM", "NORM"):
                return self._index.get(self.root(n.src[0]))
            norm = self._index.get(n.src[0])
        return next(
            (self._named[x] for x in ("inp_scaled", "inpL", "embd") if x in self._named), None
        )

    def _attention_output(self, i: int, pre: int | None) -> tuple[int | None, int | None]:
        """What attention adds to the residual, and the sum. Follows the product that reads
        the heads forward through bias, post-norm and scaling until it meets the residual."""
        heads = self._named.get(f"kqv_out-{i}")
        if heads is None:
            return self._named.get(f"attn_out-{i}"), self._named.get(f"ffn_inp-{i}")
        pre_addr = self.nodes[pre].addr if pre is not None else 0
        at = self._product_after(heads)
        if at is None:
            return self._named.get(f"attn_out-{i}"), self._named.get(f"ffn_inp-{i}")
        result = at  # the last node that still has the rows that attention has
        while True:
            users = [u for u in self._users[self.nodes[at].addr] if u > at]
            if len(users) != 1:
                return result, None
            user = self.nodes[users[0]]
            others = [s for s in user.src if s != self.nodes[at].addr]
            if user.op == "ADD" and others and self.root(others[0]) == pre_addr:
                return result, users[0]
            steps = user.op in ("GET_ROWS", "RMS_NORM", "NORM", "SCALE", "RESHAPE") or (
                user.op in ("ADD", "MUL") and bool(others) and self.is_leaf(others[0])
            )
            if not steps or user.src[0] != self.nodes[at].addr:
                return result, None
            at = users[0]
            if user.op != "GET_ROWS":
                result = at

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

    def _mlp_output(self, i: int, mid: int | None, post: int | None) -> int | None:
        """The other term of the sum that makes `l_out-i`."""
        if post is None or mid is None:
            return self._last_named_before(i, post)
        mid_addr = self.nodes[mid].addr
        at: int | None = post
        while at is not None and self.nodes[at].op == "ADD":
            a, b = self.nodes[at].src[:2]
            if self.root(a) == mid_addr:
                return self._index.get(b)
            if self.root(b) == mid_addr:
                return self._index.get(a)
            # a control vector is added after the sum
            at = (
                self._index.get(a)
                if self.is_leaf(b)
                else self._index.get(b)
                if self.is_leaf(a)
                else None
            )
        return self._last_named_before(i, post)

    def _last_named_before(self, i: int, post: int | None) -> int | None:
        for name in (f"ffn_moe_out-{i}", f"ffn_out-{i}"):
            at = self._named.get(name)
            if at is not None and at != post:
                return at
        return None

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
