"""A context together with what is known of its graphs."""

from __future__ import annotations

from dataclasses import dataclass

from mia.engine.graph import SiteNode, Topology
from mia.errors import SiteError
from mia.llama.ggml import Context, describe
from mia.sites import Site


@dataclass(slots=True, eq=False)
class Variant:
    """A topology at the addresses where it was last seen."""

    addrs: list[int]
    topology: Topology


class Session:
    """A context together with what is known of its graphs."""

    def __init__(self, context: Context):
        self.context = context
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
        """Makes the graph first that was last seen for batches with, or without, outputs:
        llama.cpp keeps one of each, at addresses of their own."""
        self._with_outputs = with_outputs
        found = self._last.get(with_outputs)
        if found is not None and found in self.variants:
            self._put_first(found)

    def learn(self) -> None:
        """Makes the graph that the tracer has just seen the first one to expect."""
        assert self.context.tracer is not None
        addrs = list(self.context.tracer.seen)
        found = next((v for v in self.variants if v.addrs == addrs), None)
        if found is None:
            nodes = [describe(a) for a in addrs]
            topology = next((v.topology for v in self.variants if v.topology.same_as(nodes)), None)
            model = self.context.model
            found = Variant(
                addrs, topology or Topology(nodes, n_layer=model.n_layer, n_head=model.n_head)
            )
        self._last[self._with_outputs] = found
        self._put_first(found)

    def _put_first(self, variant: Variant) -> None:
        if not self.variants or self.variants[0] is not variant:
            self.variants = [variant, *[v for v in self.variants if v is not variant][:7]]

    def site(self, site: Site) -> SiteNode:
        """Raises `SiteError` naming the sites that this graph has."""
        found = self.topology.sites.get(site)
        if found is None:
            have = ", ".join(sorted({s.name for s in self.topology.sites}))
            raise SiteError(f"this model has no site {site}; it has {have} (see: mia sites)")
        return found

    def close(self) -> None:
        self.context.close()
