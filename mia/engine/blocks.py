"""One block's parts, found from the sum that its output is.

Names alone are not enough: `ffn_out-3` may be the MLP's output or its sum with the residual,
`attn_norm-3` what the MLP reads, `Qcur-3` a query before its rotation. What a block computes is
in the graph: its output `l_out-i` is a sum. One term is the residual that came in; one is computed
from the heads `kqv_out-i`; and the rest is the MLP. What the products of these terms read are the
norms, and what attention multiplies are queries, keys and values.

    l_out = + ── + ── resid_pre          resid_mid is the sum that another term is computed from;
            │    └── attn_out            in a parallel block there is none
            └── mlp_out
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from mia.engine.nodes import Graph

_NORMS = ("NORM", "RMS_NORM", "L2_NORM", "GROUP_NORM")
#: operations between the heads and W_O that keep each head apart
_GATES = ("MUL", "SCALE")
#: the note of heads that a gate has changed
GATED = "after its gate"


@dataclass(frozen=True, slots=True)
class Part:
    """A node of a block, or why there is none.

    Attributes:
        index: the node's index in the graph, or None.
        note: how the part differs from what its name says; for no node why there is none.
        scale: what the node's numbers are multiplied with to be the part's.
    """

    index: int | None
    note: str = ""
    scale: float = 1.0


@dataclass(slots=True, eq=False)
class _Term:
    """A term of the sum: a node, and for a sum its terms."""

    addr: int  # through picked rows and like shapes: see Graph.whole
    terms: list[_Term] = field(default_factory=list)

    def leaves(self) -> Iterator[_Term]:
        if not self.terms:
            yield self
        for term in self.terms:
            yield from term.leaves()

    def all(self) -> Iterator[_Term]:
        """This one and what is below it, from the top."""
        yield self
        for term in self.terms:
            yield from term.all()


def block_end(graph: Graph, layer: int, n_layer: int) -> int | None:
    """Index of the sum at the end of a block: `l_out-i`, or where that is something else, what the
    first norm of the next block reads."""
    named = graph.named.get(f"l_out-{layer}")
    if named is not None and _is_sum(graph, named):
        return named
    names = (f"norm-{layer + 1}",) if layer + 1 < n_layer else ("norm", "result_norm")
    norm = graph.find(lambda n: n.name in names and n.op in _NORMS)
    if norm is None:
        return None
    end = graph.index.get(graph.root(graph.nodes[norm].src[0]))
    return end if end is not None and _is_sum(graph, end) else None


def _is_sum(graph: Graph, index: int) -> bool:
    n = graph.nodes[index]
    inner, _ = _unscaled(graph, n.addr)
    added = graph.node(inner)
    return added.op == "ADD" and not graph.is_added(added) and n.ne[2] == n.ne[3] == 1


def _unscaled(graph: Graph, addr: int) -> tuple[int, list[float | str]]:
    """What is behind the scales at the end of a block: a node, and the factors: numbers, or names of
    weights."""
    factors: list[float | str] = []
    while not graph.is_leaf(addr):
        n = graph.node(addr)
        if n.op == "SCALE" and not n.param_f32(1):
            factors.append(n.param_f32(0))
        elif n.op == "MUL" and graph.is_leaf(n.src[1]):
            factors.append(graph.node(n.src[1]).name)
        else:
            break
        addr = n.src[0]
    return addr, factors


class Block:
    """The parts of one block.

    Args:
        pre: index of the end of the block before; None for the first block.
        end: index of this block's end; None if it is not known.
        n_tokens: of the batch that showed the graph.
    """

    def __init__(
        self, graph: Graph, layer: int, *, pre: int | None, end: int | None, n_tokens: int
    ):
        self._graph, self.layer = graph, layer
        #: what the sum at the end is multiplied with
        self.factors: list[float | str] = []
        self._end = end
        self._n_tokens = n_tokens
        self._pre_given = None if pre is None else graph.nodes[pre].addr
        self._sum: _Term | None = None
        if end is not None:
            inner, self.factors = _unscaled(graph, graph.nodes[end].addr)
            self._sum = self._expand(inner, top=True)

    @property
    def is_known(self) -> bool:
        """Whether the block's output is a sum with the residual that came in."""
        return bool(self._terms)

    # -- the residual stream ------------------------------------------------------------

    def resid_pre(self) -> Part:
        if self._pre is not None:
            return Part(self._graph.index[self._pre])
        if self.layer > 0:
            return Part(None, "the end of the block before is not known")
        return Part(None, "the block's output is not a sum with its input")

    def resid_post(self) -> Part:
        if self._end is None:
            return Part(None, "the block's end is not a sum")
        return Part(self._end)

    def attn_out(self) -> Part:
        if self._kqv is None:
            return Part(None, "this block has no softmax attention")
        if not self._terms:
            return self._no_sum()
        return self._one(
            self._attention, "attention adds", "beside another mixer" if self.is_mixed else ""
        )

    def resid_mid(self) -> Part:
        if not self._terms:
            return self._no_sum()
        if self._mid is not None:
            return Part(self._graph.index[self._mid.addr])
        if self._kqv is None or not self._attention or not self._mlp:
            return Part(None, "this block is not a mixer followed by an MLP")
        return Part(None, "attention and MLP both read resid_pre")

    def mlp_out(self) -> Part:
        if not self._terms:
            return self._no_sum()
        return self._one(
            self._mlp,
            "the MLP adds",
            "something else is added behind it" if self.is_followed else "",
        )

    @staticmethod
    def _no_sum() -> Part:
        return Part(None, "the block's output is not a sum of residual, attention and MLP")

    def _expand(self, addr: int, *, top: bool = False) -> _Term:
        """The sum at `addr`; a bias, a control vector or an adapter's part is no term of its own."""
        graph = self._graph
        addr = graph.whole(addr)
        if addr == self._pre_given or graph.is_leaf(addr) or graph.node(addr).op != "ADD":
            return _Term(addr)
        if graph.is_added(graph.node(addr)):
            return _Term(addr)
        a, b = graph.node(addr).src[:2]
        if graph.is_weight(b) or graph.is_weight(a):
            if not top:
                return _Term(addr)
            return self._expand(a if graph.is_weight(b) else b, top=True)
        return _Term(addr, [self._expand(a), self._expand(b)])

    @cached_property
    def _pre(self) -> int | None:
        """The residual that came in. In the first block: the largest term that others are computed
        from, and that is not computed from others itself."""
        if self._pre_given is not None or self._sum is None or self.layer > 0:
            return self._pre_given
        leaves = {t.addr for t in self._sum.leaves()}
        above = {addr: self._graph.upstream([addr]) & leaves - {addr} for addr in leaves}
        sources = {addr for addr in leaves if not above[addr]}
        for term in self._sum.all():
            below = {t.addr for t in term.leaves()}
            if below <= sources and term.addr in self._graph.upstream(leaves - below):
                term.terms.clear()  # a sum of embeddings is one term here
                return term.addr
        return None

    @cached_property
    def _terms(self) -> list[_Term]:
        """The terms of the block's output; none if the residual that came in is not among them."""
        if self._sum is None or self._pre is None:
            return []
        leaves = list(self._sum.leaves())
        return leaves if any(t.addr == self._pre for t in leaves) else []

    @cached_property
    def _mid(self) -> _Term | None:
        """The smallest sum within the sum that another term is computed from."""
        if self._sum is None or not self._terms or self._pre is None:
            return None
        mid = None
        for term in self._sum.all():
            if term is self._sum or not term.terms:
                continue
            below = {t.addr for t in term.leaves()}
            others = [t.addr for t in self._terms if t.addr not in below]
            if self._pre in below and term.addr in self._graph.upstream(others, self._pre):
                mid = term
        return mid

    @cached_property
    def _attention(self) -> list[_Term]:
        """The terms that are computed from the heads, and not from a sum with the residual."""
        if self._kqv is None:
            return []
        heads = self._graph.nodes[self._kqv].addr
        among = self._terms if self._mid is None else self._mid.leaves()
        return [
            t
            for t in among
            if t.addr != self._pre and heads in self._graph.upstream([t.addr], self._pre or 0)
        ]

    @cached_property
    def _mlp(self) -> list[_Term]:
        if self._mid is None and not self._attention:
            return [t for t in self._terms if t.addr != self._pre and not self._mixes(t)]
        if self._mid is None:
            return [t for t in self._terms if t.addr != self._pre and t not in self._attention]
        return [t for t in self._behind if self._reads_mid_alone(t)]

    @cached_property
    def _behind(self) -> list[_Term]:
        """The terms that are added behind the sum in the middle."""
        inner = [] if self._mid is None else list(self._mid.leaves())
        return [t for t in self._terms if t.addr != self._pre and t not in inner]

    def _reads_mid_alone(self, term: _Term) -> bool:
        """Whether a term is computed from the sum in the middle, and from no larger one."""
        assert self._mid is not None and self._sum is not None
        above = self._graph.upstream([term.addr], self._pre or 0)
        larger = {t.addr for t in self._sum.all() if t.terms and self._mid in t.all()}
        return self._mid.addr in above and not (larger - {self._mid.addr}) & above

    @property
    def is_followed(self) -> bool:
        """Whether something else is added behind the MLP."""
        return self._mid is not None and 0 < len(self._mlp) < len(self._behind)

    def _mixes(self, term: _Term) -> bool:
        """Whether a term reads a memory: keys and values, or a state."""
        graph = self._graph
        sources = (
            s for addr in graph.upstream([term.addr], self._pre or 0) for s in graph.node(addr).src
        )
        return any(graph.is_leaf(s) and graph.node(s).name.startswith("cache_") for s in sources)

    @property
    def is_mixed(self) -> bool:
        """Whether something else is added beside attention, before the MLP."""
        if self._mid is None or not self._attention:
            return False
        return len(self._attention) + 1 < len(list(self._mid.leaves()))

    def _one(self, terms: list[_Term], what: str, note: str) -> Part:
        """The node that is the sum of exactly these terms."""
        assert self._sum is not None
        if not terms:
            return Part(None, f"nothing in this block is what {what}")
        for term in self._sum.all():
            if all(leaf in terms for leaf in term.leaves()):
                if len(list(term.leaves())) < len(terms):
                    return Part(None, f"what {what} is {len(terms)} terms, added one by one")
                notes = (note, self._scaling(term.addr))
                return Part(self._graph.index[term.addr], "; ".join(filter(None, notes)))
        return Part(None, f"nothing in this block is what {what}")

    def _scaling(self, addr: int) -> str:
        """What is done to a part before it is added."""
        n = self._graph.node(addr)
        if n.op == "SCALE":
            return f"after the residual multiplier {n.param_f32(0):g}"
        while n.op == "MUL" and self._graph.is_weight(n.src[1]):
            n = self._graph.node(n.src[0])
        return "after the norm behind it" if n.op in _NORMS else ""

    # -- what is read ---------------------------------------------------------------------

    def attn_norm(self) -> Part:
        """What the products of attention, or of another mixer, read."""
        read = (self._query, self._key, self._value)
        starts = [self._graph.nodes[i].addr for i in read if i is not None]
        if not starts:
            among = self._terms if self._mid is None else list(self._mid.leaves())
            starts = [t.addr for t in among if t.addr != self._pre and self._mixes(t)]
            if self._terms and not starts:
                return Part(None, "nothing in this block mixes tokens")
        part = self._norm(starts, self._pre, "attention" if self._kqv else "the mixer")
        if part.index is None or not self.is_mixed or self._mid is None or self._pre is None:
            return part
        others = [t.addr for t in self._mid.leaves() if t not in self._attention]
        reads = self._graph.first_reads([a for a in others if a != self._pre], self._pre)
        alone = self._graph.nodes[part.index].addr not in reads
        return Part(
            part.index, "read by attention only, not by the mixer beside it" if alone else ""
        )

    def mlp_norm(self) -> Part:
        """What the products of the MLP read."""
        stop = self._pre if self._mid is None else self._mid.addr
        part = self._norm([t.addr for t in self._mlp], stop, "the MLP")
        if part.index is not None and part.index == self.attn_norm().index:
            return Part(None, "the MLP reads attn_norm")
        return part

    def _norm(self, starts: list[int], stop: int | None, who: str) -> Part:
        if not starts or stop is None:
            return Part(None, f"where {who} begins is not known")
        reads = self._graph.first_reads(starts, stop)
        if len(reads) != 1:
            return Part(None, f"{who} reads {len(reads)} nodes")
        addr = reads.pop()
        if addr == stop:
            return Part(None, f"{who} reads the residual as it is, without a norm")
        if self._graph.is_leaf(addr):
            return Part(None, f"what {who} reads is not in the graph")
        return Part(self._graph.index[addr])

    # -- attention ---------------------------------------------------------------------

    def q(self) -> Part:
        if self._query is None:
            return self._no_attention()
        n = self._graph.nodes[self._query]
        if n.op == "SCALE" and not n.param_f32(1):
            above = self._graph.heads_above(n.src[0], self._n_tokens)
            if not self._graph.is_leaf(above):
                return Part(self._graph.index[above], self._latent("queries"))
        return Part(self._query, self._latent("queries"))

    def k(self) -> Part:
        if self._key is None:
            return self._no_attention("keys")
        return Part(self._key, self._latent("keys"))

    def v(self) -> Part:
        if self._value is None:
            return self._no_attention("values")
        return Part(self._value, self._latent("values"))

    def attn_scores(self) -> Part:
        if self._softmax is None:
            return self._no_attention()
        softmax = self._graph.nodes[self._softmax]
        scale, alibi = softmax.param_f32(0), softmax.param_f32(1)
        note = "before ALiBi's distances are taken off" if alibi else ""
        return Part(self._graph.index.get(softmax.src[0]), note, scale)

    def attn_pattern(self) -> Part:
        if self._softmax is None:
            return self._no_attention()
        sinks = len(self._graph.nodes[self._softmax].src) > 2
        return Part(
            self._softmax, "rows sum to less than 1: the rest is the sink's" if sinks else ""
        )

    def head_out(self) -> Part:
        """What W_O reads: the heads side by side, after a gate if they have one."""
        if self._kqv is None:
            return Part(None, "this block has no softmax attention")
        graph, index = self._graph, self._kqv
        while True:
            users = graph.readers(graph.nodes[index].addr)
            if len(users) != 1:
                return Part(self._kqv)
            user = graph.nodes[users[0]]
            if user.op == "MUL_MAT":
                return Part(index, GATED if index != self._kqv else "")
            same = user.ne == graph.nodes[index].ne
            if user.op not in (*_GATES, "RESHAPE", "CONT") or not same:
                norm = "before the norm in front of W_O" if user.op in _NORMS else ""
                return Part(self._kqv, norm)
            index = users[0]

    def _no_attention(self, what: str = "") -> Part:
        if self._kqv is None:
            return Part(None, "this block has no softmax attention")
        if what and self._query is not None:
            return Part(None, f"this block reads the {what} of another block")
        return Part(None, "flash attention is on" if not what else f"no {what} are in the graph")

    @cached_property
    def cache_layer(self) -> int | None:
        """The layer whose cached keys attention reads: its own, but where layers share them."""
        addr = self._keys
        if addr is None:
            return None
        name = self._graph.node(self._graph.root(addr)).name
        number = name.removeprefix("cache_k_l").split()[0]
        return int(number) if name.startswith("cache_k_l") and number.isdigit() else None

    @property
    def latent(self) -> bool:
        """Whether queries, keys and values are latents (MLA): one key that all heads read, and
        values that are a part of it."""
        return f"cache_v_l{self.layer}" not in self._graph.stores and self._store("k") is not None

    def _latent(self, what: str) -> str:
        if not self.latent:
            return ""
        if what == "queries":
            return "against latents (MLA): what is multiplied with them, not with keys of a head"
        return f"latents (MLA): {what} of all heads are made of them, and keys and values change as one"

    @cached_property
    def _kqv(self) -> int | None:
        """The heads side by side: by their name, or as what becomes of the values."""
        graph = self._graph
        named = graph.named.get(f"kqv_out-{self.layer}")
        if named is not None or self._end is None or self._pre is None:
            return named
        kernels = [
            graph.index[addr]
            for addr in graph.upstream([graph.nodes[self._end].addr], self._pre)
            if self._is_kernel(addr)
        ]
        if len(kernels) != 1:
            return None
        index = kernels[0]
        while True:
            users = graph.readers(graph.nodes[index].addr)
            if len(users) != 1 or graph.nodes[users[0]].op not in ("PERMUTE", "CONT", "RESHAPE"):
                return index
            index = users[0]

    def _is_kernel(self, addr: int) -> bool:
        n = self._graph.node(addr)
        if n.op.startswith("FLASH_ATTN"):
            return True
        right = self._graph.root(n.src[1]) if n.op == "MUL_MAT" else addr
        return right != addr and self._graph.node(right).op == "SOFT_MAX"

    @cached_property
    def _kernel(self) -> int | None:
        """The node that turns values into heads: the last product of attention, or all of it."""
        if self._kqv is None:
            return None
        graph, addr = self._graph, self._graph.nodes[self._kqv].addr
        for _ in range(12):
            if graph.is_leaf(addr):
                return None
            if self._is_kernel(addr):
                return graph.index[addr]
            n = graph.node(addr)
            addr = n.src[1] if n.op == "MUL_MAT" else n.src[0]
        return None

    @cached_property
    def _softmax(self) -> int | None:
        if self._kernel is None or self._graph.nodes[self._kernel].op != "MUL_MAT":
            return None
        return self._graph.index.get(self._graph.root(self._graph.nodes[self._kernel].src[1]))

    @cached_property
    def _reads(self) -> tuple[int, int] | None:
        """Addresses of the keys and queries that attention multiplies."""
        graph = self._graph
        if self._kernel is None:
            return None
        n = graph.nodes[self._kernel]
        if self._softmax is None:
            return n.src[1], n.src[0]
        # through scaling, soft-capping and biases to the product of keys and queries
        addr = graph.nodes[self._softmax].src[0]
        while not graph.is_leaf(addr) and graph.node(addr).op != "MUL_MAT":
            addr = graph.node(addr).src[0]
        if graph.is_leaf(addr):
            return None
        return graph.node(addr).src[0], graph.node(addr).src[1]

    @property
    def _keys(self) -> int | None:
        return None if self._reads is None else self._reads[0]

    @cached_property
    def _query(self) -> int | None:
        if self._reads is None:
            return None
        return self._graph.index.get(self._graph.heads_above(self._reads[1], self._n_tokens))

    def _store(self, kind: str) -> int | None:
        addr = self._graph.stores.get(f"cache_{kind}_l{self.layer}")
        if addr is None:
            return None
        return self._graph.index.get(self._graph.heads_above(addr, self._n_tokens))

    @cached_property
    def _key(self) -> int | None:
        return None if self._kqv is None else self._store("k")

    @cached_property
    def _value(self) -> int | None:
        if self._kqv is None:
            return None
        return self._store("k" if self.latent else "v")
