"""Contexts that are kept between runs, and the graphs that each of them has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mia.engine import limits
from mia.engine.graph import SiteNode, Topology
from mia.engine.kept import Kept
from mia.engine.nodes import without_copies
from mia.errors import SiteError
from mia.llama import Context, ContextParams, LlamaModel, describe, is_output
from mia.sites import Site

#: graphs that a session remembers: llama.cpp has a handful, at addresses that change now and then
_VARIANTS = 8
#: contexts that are kept open: one that reads or edits, and one that does not
_SESSIONS = 2


@dataclass(slots=True, eq=False)
class Variant:
    """A topology at the addresses where it was last seen.

    `lasting`: indices of the nodes whose numbers stay until the next decode."""

    addrs: list[int]
    topology: Topology
    lasting: frozenset[int] = frozenset()


class Session:
    """A context together with what is known of its graphs."""

    def __init__(self, context: Context, refused: Mapping[Site, str], kept: Kept | None = None):
        """`refused`: sites that are not what they say, and why; `kept`: what is known of blocks'
        inputs that are to be kept."""
        self.context, self._refused = context, refused
        self.kept = kept or Kept()
        self.kept.begin(context)
        #: whether the last run may have left numbers that are not finite (see finite.py)
        self.unread_edits = False
        #: the graph that is expected first
        self.variants: list[Variant] = []
        self._with_outputs = True
        self._last: dict[bool, Variant] = {}
        if context.tracer is not None:
            self._scout()

    @property
    def topology(self) -> Topology:
        """The graph seen last."""
        return self.variants[0].topology

    def _scout(self) -> None:
        """Shows the tracer both graphs, by decodes of two tokens that compute nothing."""
        assert self.context.tracer is not None
        for with_outputs in (False, True):
            self.turn_to(with_outputs)
            self.context.tracer.expect((), {}, (), lambda index, addr: None)
            self.context.decode([0, 0], [0, 1], [0, 0], [with_outputs] * 2)
            self.learn(2)
            self.context.clear()

    def keep_inputs(self) -> None:
        """Keeps the inputs of blocks at which runs have stopped often (see kept.py)."""
        if self.kept.grow(self.context):
            for variant in self.variants:
                variant.addrs = []  # the topologies are the same, at new addresses
            self._scout()
            self.variants = [variant for variant in self.variants if variant.addrs]
            self.turn_to(True)

    def turn_to(self, with_outputs: bool) -> None:
        """Expects the graph that was last seen for batches with, or without, outputs: llama.cpp
        keeps one of each, at addresses of their own."""
        self._with_outputs = with_outputs
        variant = self._last.get(with_outputs)
        if variant is not None and variant in self.variants:
            self._put_first(variant)

    def learn(self, n_tokens: int) -> None:
        """Expects the graph that the tracer has just seen, of a batch of so many tokens."""
        assert self.context.tracer is not None
        addrs = list(self.context.tracer.seen)
        variant = next((v for v in self.variants if v.addrs == addrs), None)
        if variant is None:
            topology = self._topology_of(addrs, n_tokens)
            variant = Variant(addrs, topology, _lasting(addrs, topology))
        self._last[self._with_outputs] = variant
        self._put_first(variant)

    def _topology_of(self, addrs: list[int], n_tokens: int) -> Topology:
        nodes = without_copies([describe(a) for a in addrs])
        for variant in self.variants:
            if variant.topology.same_as(nodes):
                return variant.topology
        model = self.context.model
        topology = Topology(
            nodes,
            n_layer=model.n_layer,
            n_head=model.n_head,
            n_tokens=n_tokens,
            refused=self._refused,
        )
        for node in nodes:  # looked at now, as a topology may outlive the memory that it is of
            for source in node.src:
                topology.node(source)
        return topology

    def _put_first(self, variant: Variant) -> None:
        if not self.variants or self.variants[0] is not variant:
            others = [v for v in self.variants if v is not variant]
            self.variants = [variant, *others[: _VARIANTS - 1]]

    def site(self, site: Site) -> SiteNode:
        """Raises `SiteError` naming the sites that this graph has."""
        node = self.topology.sites.get(site)
        if node is None:
            raise SiteError(self.topology.absence(site))
        return node

    def refuse(self, refused: Mapping[Site, str]) -> None:
        """Takes sites back, in every graph."""
        self._refused = refused
        for variant in self.variants:
            for site, why in refused.items():
                variant.topology.refuse(site, why)

    def close(self) -> None:
        self.context.close()


def _lasting(addrs: Sequence[int], topology: Topology) -> frozenset[int]:
    """Outputs of the graph that no other node looks at or changes in place."""
    outputs = (i for i, addr in enumerate(addrs) if is_output(addr))
    viewed = {n.view_src for n in topology.nodes}
    return frozenset(
        i for i in outputs if not (n := topology.nodes[i]).view_src and n.addr not in viewed
    )


class Sessions:
    """The open sessions of one model, by whether they have a callback and use fused attention."""

    def __init__(self, model: LlamaModel, *, kv_type: str, threads: int):
        self._model, self._kv_type, self._threads = model, kv_type, threads
        self._refused: Mapping[Site, str] = {}
        #: (callback, flash) -> the session, the one used last at the end
        self.open: dict[tuple[bool, bool], Session] = {}
        #: flash -> the graph that was asked for last
        self.topologies: dict[bool, Topology] = {}

    def get(
        self,
        *,
        callback: bool,
        flash: bool,
        n_cells: int = 1,
        n_sequences: int = 1,
        stops: Mapping[int, int] | None = None,
    ) -> Session:
        """A session that is large enough; kept between runs, grown when it must be.

        `stops`: at how many decodes the coming run captures the inputs of blocks."""
        key = callback, flash
        n_ctx = -(-n_cells // 256) * 256
        session = self.open.pop(key, None)
        kept = Kept() if session is None else session.kept
        kept.note(stops or {})
        if session is not None:
            params = session.context.params
            if params.n_ctx < n_ctx or params.n_seq < n_sequences:
                n_ctx, n_sequences = max(n_ctx, params.n_ctx), max(n_sequences, params.n_seq)
                session.close()
                session = None
        if session is None:
            while len(self.open) >= _SESSIONS:
                self.open.pop(next(iter(self.open))).close()
            params = ContextParams(
                n_ctx=n_ctx,
                n_ubatch=min(limits.UBATCH, n_ctx),
                n_seq=n_sequences,
                flash=flash,
                kv_type=self._kv_type,
                threads=self._threads,
                callback=callback,
            )
            session = Session(Context(self._model, params), self._refused, kept)
        self.open[key] = session
        try:
            session.keep_inputs()
        except BaseException:  # Ctrl-C too: what it knows of its graphs is no longer so
            self.open.pop(key).close()
            raise
        session.turn_to(True)  # the graph that has every site is the one that is asked
        return session

    def apart(self) -> Sessions:
        """Sessions like these for a run that stays open: no other run grows or closes them."""
        sessions = Sessions(self._model, kv_type=self._kv_type, threads=self._threads)
        sessions.refuse(self._refused)
        return sessions

    def refuse(self, refused: Mapping[Site, str]) -> None:
        """Takes sites back that are not what they say, in every session from now on."""
        self._refused = refused
        self.topologies.clear()
        for session in self.open.values():
            session.refuse(refused)

    def close(self) -> None:
        for session in self.open.values():
            session.close()
        self.open.clear()
