"""Captures at the ends of blocks without a stop of the graph.

The end of a block is the next one's input. llama.cpp can keep a block's input in its place until
the decode is over (`mia.llama.layer_inputs`), in some architectures. Then a capture there is read
behind the decode, from the same tensor: edits at it are in it, too. Edits need a stop all the same.

It is not for nothing: llama.cpp plans its buffers anew, and they grow. So a session has it for the
blocks at whose ends its runs have stopped often (`limits.KEPT_STOPS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mia.engine import limits
from mia.engine.jobs import Job
from mia.llama import Context
from mia.sites import Site


class Kept:
    """The blocks whose inputs a session keeps."""

    def __init__(self) -> None:
        self.blocks: frozenset[int] = frozenset()
        #: block -> how often runs have stopped at its input
        self._stops: dict[int, int] = {}
        self._refused = False

    def note(self, stops: Mapping[int, int]) -> None:
        """Notes the stops that a run would make (`stops_at_inputs`)."""
        for block in stops.keys() - self.blocks:
            self._stops[block] = self._stops.get(block, 0) + stops[block]

    def grow(self, context: Context) -> bool:
        """Keeps more blocks' inputs, if that pays. True if so: the graphs are others now."""
        if context.tracer is None or self._refused or sum(self._stops.values()) < limits.KEPT_STOPS:
            return False
        blocks = self.blocks | self._stops.keys()
        if _bytes(context, len(blocks)) > limits.KEPT_BYTES:
            return False
        self._refused = not context.keep_inputs(blocks - self.blocks)
        if not self._refused:
            self.blocks, self._stops = blocks, {}
        return not self._refused

    def begin(self, context: Context) -> None:
        """The same blocks, or more, in a context that has shown no graph yet."""
        kept, self.blocks = self.blocks, frozenset[int]()
        if kept and _bytes(context, len(kept)) <= limits.KEPT_BYTES and context.keep_inputs(kept):
            self.blocks = kept
        self.grow(context)


def _bytes(context: Context, n_blocks: int) -> int:
    """What it takes: the rows in the graph, and llama.cpp's copy of them."""
    return 2 * 4 * n_blocks * context.model.n_embd * context.params.n_ubatch


def stops_at_inputs(jobs: Iterable[Job], n_layer: int) -> dict[int, int]:
    """block -> at how many decodes some job captures its input. Jobs run side by side."""
    stops: dict[int, int] = {}
    for job in jobs:
        for read in job.reads:
            n_generated = read.n_rows - len(read.positions)
            n_decodes = n_generated + bool(read.positions)
            for block in _blocks(read.sites, n_layer):
                stops[block] = max(stops.get(block, 0), n_decodes)
    return stops


def _blocks(sites: Iterable[Site], n_layer: int) -> set[int]:
    """The blocks whose inputs these sites are."""
    blocks = {s.layer for s in sites if s.name == "resid_pre" and s.layer is not None}
    ends = {s.layer + 1 for s in sites if s.name == "resid_post" and s.layer is not None}
    return blocks | ends - {n_layer}
