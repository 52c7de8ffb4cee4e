"""Blocks that need not run: which segments start from the residuals of their unedited twin.

If every edit and capture of a prompt's end lies at block a or above, the blocks below compute what
the same tokens without the edits have computed already. If that spares enough, the unedited run
is decoded first, to the end of the prompt, its residuals at the end of block a-1 are kept, and the
others start at block a. One such run, a `Twin`, serves edits at every position of a prompt.

A resumed segment stores no keys and values in the blocks that it skips. Nothing may read them:
so it is a leaf, it generates nothing, and all its rows are decoded in one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mia.edits import Edit
from mia.engine import limits
from mia.engine.jobs import Job, Read
from mia.engine.segments import Row, Segment, Twin, walk
from mia.sites import Site, first_block

#: the jobs that end with a row
Ends = dict[Row, list[Job]]


class Tail(NamedTuple):
    """The end of a prompt that can start at `first_block`: from an edited row to the last."""

    rows: list[Row]
    first_block: int


class _End(NamedTuple):
    """Where the unedited run of a prompt ends: the tokens behind the rows that there are."""

    row: Row
    missing: tuple[int, ...]


def add_twins(
    ends: Ends, sites: Mapping[Edit, Site], *, n_layer: int, n_ubatch: int
) -> list[tuple[Twin, list[Tail]]]:
    """The unedited runs that are worth it, each with the tails that start from it. Their rows are
    put into the trie as far as they are not there, and to be read. `sites`: that of each edit."""
    groups: dict[_End, list[Tail]] = {}
    blocks = _FirstBlocks(sites, n_layer)
    for row, jobs in ends.items():
        if row.children or any(job.generates for job in jobs):
            continue  # something will read the keys that it leaves out
        rows = _edited_tail(row, ends)
        if rows and len(rows) <= n_ubatch and (block := blocks.of(rows)) > 0:
            groups.setdefault(_unedited_end(rows), []).append(Tail(rows, block))
    chosen = {end: tails for end, tails in groups.items() if _is_worth_it(end, tails, n_layer)}
    starts = sorted({tail.first_block for tails in chosen.values() for tail in tails})
    saved_sites = tuple(Site("resid_post", block - 1) for block in starts)
    return [(_twin(end, tails, ends, saved_sites), tails) for end, tails in chosen.items()]


def link(tops: Iterable[Segment], twins: Sequence[tuple[Twin, list[Tail]]]) -> None:
    """Notes at the segments which of them are resumed, and where their twins end."""
    if not twins:
        return
    by_end = {segment.rows[-1]: segment for segment in walk(tops)}
    for twin, tails in twins:
        by_end[twin.rows[-1]].twins.append(twin)
        for tail in tails:
            segment = by_end[tail.rows[-1]]
            assert segment.rows[0] is tail.rows[0]  # its unedited sibling makes a fork there
            segment.first_block, segment.twin = tail.first_block, twin
            twin.resumed.append(segment)


def _edited_tail(last: Row, ends: Ends) -> list[Row]:
    """The rows to `last` since the last fork or end of a prompt, from the first edited one on."""
    rows, row = [last], last.parent
    while row is not None and row.pos >= 0 and len(row.children) == 1 and row not in ends:
        rows.append(row)
        row = row.parent
    while rows and not rows[-1].edits:
        rows.pop()
    return rows[::-1]


def _unedited_end(rows: Sequence[Row]) -> _End:
    row = rows[0].parent
    assert row is not None
    for i, edited in enumerate(rows):
        child = row.children.get((edited.token, ()))
        if child is None:
            return _End(row, tuple(r.token for r in rows[i:]))
        row = child
    return _End(row, ())


def _is_worth_it(end: _End, tails: Sequence[Tail], n_layer: int) -> bool:
    if not end.missing:
        return True
    spared = sum(tail.first_block * len(tail.rows) for tail in tails)
    return len(tails) >= limits.MIN_RESUMED and spared >= n_layer * len(end.missing)


def _twin(end: _End, tails: Sequence[Tail], ends: Ends, sites: tuple[Site, ...]) -> Twin:
    row = end.row
    for token in end.missing:
        child = row.children.get((token, ()))
        if child is None:
            child = row.children[token, ()] = Row(token, row.pos + 1, (), row)
        row = child
    ends.setdefault(row, [])
    n = row.pos + 1 - min(tail.rows[0].pos for tail in tails)
    rows = [row]
    while len(rows) < n:
        assert rows[-1].parent is not None
        rows.append(rows[-1].parent)
    rows.reverse()
    saved = Read(sites, tuple(range(n)), n_rows=n, n_keys=0)
    for i, row in enumerate(rows):
        row.reads.append((saved, i))
    return Twin(rows, saved)


class _FirstBlocks:
    """The first block that the edits and captures of some rows need."""

    def __init__(self, sites: Mapping[Edit, Site], n_layer: int):
        self._sites, self._n_layer = sites, n_layer
        self._of_read: dict[Read, int] = {}

    def of(self, rows: Iterable[Row]) -> int:
        return min(self._of_row(row) for row in rows)

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
