"""How far up a segment must run: nothing reads what lies above the last node read.

A capture in the middle of the model needs the blocks up to there, and nothing above. If no logits
are read of a batch either, the nodes behind the last one visited lose the COMPUTE flag
for that decode, as the blocks below a resumed segment do.

A segment that is left early stores no keys and values in the blocks above. So what comes after it,
the rest of its own rows, its children and what they generate, must not go further: `Segment.n_blocks`
counts the blocks that all of these need, and a segment with something after it runs until their keys
and values are stored (`Topology.last_store`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mia.edits import Edit
from mia.engine.batch import Batch
from mia.engine.graph import Topology
from mia.engine.jobs import Read
from mia.engine.segments import Output, Segment
from mia.sites import Site


class Needs:
    """How many of the model's first blocks are needed by what is done at a segment's own rows."""

    def __init__(self, sites: Mapping[Edit, Site], n_layer: int):
        """`sites`: that of each edit."""
        self._sites, self._n_layer = sites, n_layer
        self._of_read: dict[Read, int] = {}

    def of(self, segment: Segment) -> int:
        if segment.generating or any(row.output is Output.LOGITS for row in segment.rows):
            return self._n_layer
        reads = {read for row in segment.rows for read, _ in row.reads}
        edits = {e.edit for row in segment.rows for e in row.edits}
        of_edits = self._most(self._sites[edit] for edit in edits)
        return max(of_edits, *(self._read(read) for read in reads), 0)

    def _read(self, read: Read) -> int:
        n = self._of_read.get(read)
        if n is None:
            n = self._of_read[read] = self._most(read.sites)
        return n

    def _most(self, sites: Iterable[Site]) -> int:
        return max((self._blocks(site) for site in sites), default=0)

    def _blocks(self, site: Site) -> int:
        if site.layer is not None:
            return site.layer + 1
        return self._n_layer if site.kind.block_end else 0  # the embedding is below all blocks


def not_read(batch: Batch, topology: Topology, visited: Iterable[int]) -> list[int]:
    """Indices of the nodes that need not run because nothing reads them: those behind the last one
    that is visited, or that stores what a later batch attends to. Empty if logits are read."""
    if any(row.output is Output.LOGITS for row in batch.rows):
        return []
    last = max(visited, default=-1)
    if topology.keeps_state:  # which has to be brought up to date in every block
        return [i for i in topology.skippable_tail if i > last]
    for span in batch.spans:
        segment = span.branch.segment
        if segment.children or span.end < len(segment.rows):
            last = max(last, topology.last_store(segment.n_blocks))
    return list(range(last + 1, len(topology.nodes)))
