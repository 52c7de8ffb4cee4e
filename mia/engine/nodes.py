"""A graph's nodes in order, and small steps between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod

from mia.llama import Node, describe

#: operations that only look at the same numbers in another shape, or take some rows of them
_SHAPES = ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "CONT", "DUP", "CPY")
#: operations that compute nothing
LOOKS = ("NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE")
_PASS = (*_SHAPES, "GET_ROWS")
_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")


#: how llama.cpp's scheduler calls a copy that it makes for another device
_COPY = re.compile(r"[^#]+#(.+?)(?:#\d*)?")


def _original_name(name: str) -> str:
    match = _COPY.fullmatch(name)
    return match[1] if match else name


def without_copies(nodes: Sequence[Node]) -> list[Node]:
    """The nodes of a graph that several devices compute, as one device's: what reads a copy reads
    the node that was copied. Only the copy's name tells which one that is."""
    known, latest, out = {n.addr for n in nodes}, dict[str, int](), []

    def original(addr: int) -> int:
        if addr in known or not (match := _COPY.fullmatch(describe(addr).name)):
            return addr
        return latest.get(match[1], addr)  # a copy of an input stays a leaf

    for n in nodes:
        src = tuple(original(s) for s in n.src)
        out.append(n if src == n.src else replace(n, src=src))
        latest[n.name] = n.addr
    return out


class Graph:
    """Nodes by index and by address. A source that is no node is a leaf: a weight or an input."""

    def __init__(self, nodes: Sequence[Node]):
        self.nodes = nodes
        self.index = {n.addr: i for i, n in enumerate(nodes)}
        self.named: dict[str, int] = {n.name: i for i, n in enumerate(nodes)}  # the last wins
        self.users: dict[int, list[int]] = defaultdict(list)
        self._leaves: dict[int, Node] = {}
        for i, n in enumerate(nodes):
            for s in n.src:
                self.users[s].append(i)

    @cached_property
    def stores(self) -> dict[str, int]:
        """Name of a cache tensor, as `cache_k_l3`, -> address of what is stored there."""
        return {
            n.name.split()[0]: n.src[0]
            for n in self.nodes
            if n.op == "SET_ROWS" and n.name.startswith("cache_")
        }

    @cached_property
    def writes(self) -> frozenset[int]:
        """Indices of the nodes that write to memory which outlives a decode: keys and values, states."""
        return frozenset(
            i
            for i, n in enumerate(self.nodes)
            if n.view_src and n.view_src not in self.index and n.op not in LOOKS
        )

    def memory(self, addr: int) -> int:
        """The tensor whose memory a tensor looks at: itself if it looks at none."""
        return self.node(addr).view_src or addr

    def node(self, addr: int) -> Node:
        """The node or leaf at an address of this graph."""
        i = self.index.get(addr)
        if i is not None:
            return self.nodes[i]
        if addr not in self._leaves:
            leaf = describe(addr)
            self._leaves[addr] = replace(leaf, name=_original_name(leaf.name))
        return self._leaves[addr]

    def is_leaf(self, addr: int) -> bool:
        return addr not in self.index

    def is_weight(self, addr: int) -> bool:
        """Whether a leaf is looked at, directly or in another shape, as the file's matrices are."""
        return self.is_leaf(self.root(addr))

    def is_added(self, n: Node) -> bool:
        """Whether a node adds what a LoRA adapter makes of a product's input to the product."""
        if n.op != "ADD" or len(n.src) < 2 or self.is_leaf(n.src[1]):
            return False
        scaled = self.node(n.src[1])
        if scaled.op != "SCALE" or self.is_leaf(scaled.src[0]):
            return False
        product = self.node(scaled.src[0])
        return product.op in _PRODUCTS and self.node(product.src[0]).name.endswith(".lora_b")

    def adapted(self) -> set[str]:
        """Names of the weights to whose products, or rows, adapters add something."""
        leaves = (self.node(s).name for n in self.nodes for s in n.src[:1] if self.is_leaf(s))
        return {n.removesuffix(".lora_a") for n in leaves if n.endswith(".lora_a")}

    def readers(self, addr: int) -> list[int]:
        """Indices of the nodes that read a node, without the products of LoRA adapters."""
        return [
            i
            for i in self.users[addr]
            if not (
                self.nodes[i].op in _PRODUCTS
                and self.node(self.nodes[i].src[0]).name.endswith(".lora_a")
            )
        ]

    def picks_outputs(self, n: Node) -> bool:
        """Whether a node takes the rows whose logits were asked for."""
        return (
            n.op == "GET_ROWS" and self.is_leaf(n.src[1]) and self.node(n.src[1]).name == "out_ids"
        )

    def root(self, addr: int) -> int:
        """Walks up through operations that only reshape or pick rows of outputs."""
        while True:
            n = self.node(addr)
            if self.is_leaf(addr) or n.op not in _PASS or not n.src:
                return addr
            if n.op == "GET_ROWS" and not self.picks_outputs(n):
                return addr  # an embedding is looked up: numbers begin here
            addr = n.src[0]

    def whole(self, addr: int) -> int:
        """Walks up while the source has the same shape, or all rows of it."""
        while not self.is_leaf(addr):
            n = self.node(addr)
            same = n.op in _SHAPES and n.src and self.node(n.src[0]).ne == n.ne
            if not same and not self.picks_outputs(n):
                break
            addr = n.src[0]
        return addr

    def upstream(self, starts: Iterable[int], stop: int = 0) -> set[int]:
        """Addresses of all nodes that the starts are computed from, themselves included, down to
        `stop`, which is not passed."""
        out: set[int] = set()
        stack = list(starts)
        while stack:
            addr = stack.pop()
            if addr in out or self.is_leaf(addr):
                continue
            out.add(addr)
            if addr != stop:
                stack.extend(self.node(addr).src)
        return out

    def first_reads(self, starts: Iterable[int], stop: int) -> set[int]:
        """What the first products with the file's matrices between `stop` and `starts` read."""
        known: dict[int, frozenset[int]] = {stop: frozenset()}

        def reads(addr: int) -> frozenset[int]:
            if addr in known or self.is_leaf(addr):
                return known.get(addr, frozenset())
            n = self.node(addr)
            known[addr] = frozenset()
            if n.op in _PRODUCTS and self.is_weight(n.src[0]):
                out = reads(n.src[1]) or frozenset({self.root(n.src[1])})
                for s in n.src[2:]:
                    out |= reads(s)
            else:
                out = frozenset[int]().union(*(reads(s) for s in n.src))
            known[addr] = out
            return out

        return set().union(*(reads(s) for s in starts))

    def heads_above(self, addr: int, n_tokens: int) -> int:
        """The node that has, for each token, the numbers at `addr`: the highest one of the same
        size, shaped in heads if there is one."""
        size = prod(self.node(addr).ne)
        best, heads = addr, 0
        while not self.is_leaf(addr):
            n = self.node(addr)
            if n.ne[2] == n_tokens and n.ne[3] == 1 and n.ne[1] > 1:
                heads = addr
            elif n.ne[1] == n_tokens and n.ne[2] == n.ne[3] == 1:
                best = addr
            if n.op == "PAD":  # layers with fewer heads are filled up to the widest
                addr, heads = n.src[0], 0
                best, size = addr, prod(self.node(addr).ne)
                continue
            if n.op not in _SHAPES or not n.src or prod(self.node(n.src[0]).ne) != size:
                break
            addr = n.src[0]
        return heads or best

    def outputs_only(self) -> list[bool]:
        """For each node, whether it has rows only for tokens whose logits were asked for."""
        flags: list[bool] = []
        for i, n in enumerate(self.nodes):
            before = (self.index.get(s, i) for s in n.src)  # a cast names itself as a source
            flags.append(self.picks_outputs(n) or any(flags[j] for j in before if j < i))
        return flags

    def find(self, test: Callable[[Node], bool]) -> int | None:
        """Index of the first node that passes a test."""
        return next((i for i, n in enumerate(self.nodes) if test(n)), None)
