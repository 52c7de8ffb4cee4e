"""Contexts that are kept between runs, and the graphs that each of them has shown."""

from __future__ import annotations

from dataclasses import dataclass

from mia.engine import limits
from mia.engine.graph import SiteNode, Topology
from mia.errors import SiteError
from mia.llama import Context, ContextParams, LlamaModel, describe
from mia.sites import Site

#: graphs that a session remembers: llama.cpp has a handful, at addresses that change now and then
_VARIANTS = 8
#: contexts that are kept open: one that reads or edits, and one that does not
_SESSIONS = 2


@dataclass(slots=True, eq=False)
class Variant:
    """A topology at the addresses where it was last seen."""

    addrs: list[int]
    topology: Topology


class Session:
    """A context together with what is known of its graphs."""

    def __init__(self, context: Context):
        self.context = context
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
        """Shows the tracer the graph, by a decode of two tokens that computes nothing."""
        self.context.decode([0, 0], [0, 1], [0, 0], [True, True])
        self.context.clear()
        self.learn()

    def turn_to(self, with_outputs: bool) -> None:
        """Expects the graph that was last seen for batches with, or without, outputs: llama.cpp
        keeps one of each, at addresses of their own."""
        self._with_outputs = with_outputs
        variant = self._last.get(with_outputs)
        if variant is not None and variant in self.variants:
            self._put_first(variant)

    def learn(self) -> None:
        """Expects the graph that the tracer has just seen."""
        assert self.context.tracer is not None
        addrs = list(self.context.tracer.seen)
        variant = next((v for v in self.variants if v.addrs == addrs), None)
        if variant is None:
            variant = Variant(addrs, self._topology_of(addrs))
        self._last[self._with_outputs] = variant
        self._put_first(variant)

    def _topology_of(self, addrs: list[int]) -> Topology:
        nodes = [describe(a) for a in addrs]
        for variant in self.variants:
            if variant.topology.same_as(nodes):
                return variant.topology
        model = self.context.model
        return Topology(nodes, n_layer=model.n_layer, n_head=model.n_head)

    def _put_first(self, variant: Variant) -> None:
        if not self.variants or self.variants[0] is not variant:
            others = [v for v in self.variants if v is not variant]
            self.variants = [variant, *others[: _VARIANTS - 1]]

    def site(self, site: Site) -> SiteNode:
        """Raises `SiteError` naming the sites that this graph has."""
        node = self.topology.sites.get(site)
        if node is None:
            have = ", ".join(sorted({s.name for s in self.topology.sites}))
            raise SiteError(f"this model has no site {site}; it has {have}")
        return node

    def close(self) -> None:
        self.context.close()


class Sessions:
    """The open sessions of one model, by whether they have a callback and use fused attention."""

    def __init__(self, model: LlamaModel, *, kv_type: str, threads: int):
        self._model, self._kv_type, self._threads = model, kv_type, threads
        #: (callback, flash) -> the session, the one used last at the end
        self.open: dict[tuple[bool, bool], Session] = {}

    def get(
        self, *, callback: bool, flash: bool, n_cells: int = 1, n_sequences: int = 1
    ) -> Session:
        """A session that is large enough; kept between runs, grown when it must be."""
        key = callback, flash
        n_ctx = -(-n_cells // 256) * 256
        session = self.open.pop(key, None)
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
            session = Session(Context(self._model, params))
        self.open[key] = session
        return session

    def close(self) -> None:
        for session in self.open.values():
            session.close()
        self.open.clear()
