"""Blocks that need not run: which segments start from the residuals of their unedited twin.

If every edit and capture of a segment lies at block a or above, the blocks below compute what
the segment's twin, the same tokens without the edits, has computed already. If enough segments
have the same twin, it is decoded first, its residuals at the end of block a-1 are kept, and the
others start at block a.

A resumed segment stores no keys and values in the blocks that it skips. Nothing may read them:
so it is a leaf, it generates nothing, and all its rows are decoded in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from mia.edits import Edit
from mia.engine import limits
from mia.engine.jobs import Read
from mia.engine.segments import Row, Segment, walk
from mia.sites import Site, first_block

#: the parent, and the tokens: equal for segments that differ only in their edits
_TwinKey = tuple[int, tuple[int, ...]]


def plan_resumed(
    tops: list[Segment], sites: Mapping[Edit, Site], *, n_layer: int, n_ubatch: int
) -> None:
    """Sets `first_block` and `twin` of the segments under `tops` that can start later than at
    block 0, and adds the twins that there are not yet. `sites`: that of each edit."""
    groups: dict[_TwinKey, list[Segment]] = {}
    blocks = _FirstBlocks(sites, n_layer)
    for segment in walk(tops):
        if _may_skip_blocks(segment, n_ubatch) and (block := blocks.of(segment)) > 0:
            segment.first_block = block
            groups.setdefault(_twin_key(segment), []).append(segment)
    unedited = {_twin_key(s): s for s in walk(tops) if not any(r.edits for r in s.rows)}
    for key, group in list(groups.items()):
        if len(group) < limits.MIN_RESUMED and key not in unedited:
            del groups[key]
            for segment in group:
                segment.first_block = 0
    starts = sorted({s.first_block for group in groups.values() for s in group})
    saved_sites = tuple(Site("resid_post", block - 1) for block in starts)
    for key, group in groups.items():
        twin = unedited.get(key) or _make_twin(group[0], tops)
        _save_residuals(twin, saved_sites)
        twin.resumed = group
        for segment in group:
            segment.twin = twin


def _may_skip_blocks(segment: Segment, n_ubatch: int) -> bool:
    """Whether nothing will read the keys that the segment leaves out: see the module."""
    return (
        not segment.children
        and len(segment.rows) <= n_ubatch
        and not segment.generating
        and bool(segment.rows[0].edits)
    )


class _FirstBlocks:
    """The first block that a segment's edits and captures need."""

    def __init__(self, sites: Mapping[Edit, Site], n_layer: int):
        self._sites, self._n_layer = sites, n_layer
        self._of_read: dict[Read, int] = {}

    def of(self, segment: Segment) -> int:
        return min(self._of_row(row) for row in segment.rows)

    def _of_row(self, row: Row) -> int:
        block = self._n_layer - 1
        for e in row.edits:
            block = min(block, first_block(self._sites[e.edit], self._n_layer))
        for read, _ in row.reads:
            if read not in self._of_read:
                self._of_read[read] = min(
                    (first_block(s, self._n_layer) for s in read.sites), default=self._n_layer
                )
            block = min(block, self._of_read[read])
        return block


def _twin_key(segment: Segment) -> _TwinKey:
    return id(segment.parent), tuple(row.token for row in segment.rows)


def _make_twin(segment: Segment, tops: list[Segment]) -> Segment:
    """The same tokens without the edits, beside the segment in the tree."""
    rows: list[Row] = []
    parent = segment.rows[0].parent
    for row in segment.rows:
        parent = Row(row.token, row.pos, (), parent)
        rows.append(parent)
    twin = Segment(rows, segment.parent)
    (tops if segment.parent is None else segment.parent.children).append(twin)
    return twin


def _save_residuals(twin: Segment, sites: tuple[Site, ...]) -> None:
    n = len(twin.rows)
    twin.saved = Read(sites, tuple(range(n)), n_rows=n, n_keys=0)
    for i, row in enumerate(twin.rows):
        row.reads.append((twin.saved, i))


def let_run_whole(children: list[Segment]) -> None:
    """Takes back that some of these segments, which have one parent, start from a twin among them."""
    twins = {c.twin for c in children if c.twin is not None}
    for twin in twins:
        for row in twin.rows:
            row.reads = [read for read in row.reads if read[0] is not twin.saved]
        for segment in twin.resumed:
            segment.first_block, segment.twin = 0, None
        twin.saved, twin.resumed = None, []
    # a twin that nobody asked for was made for them alone
    children[:] = [c for c in children if c not in twins or c.jobs or c.children]
