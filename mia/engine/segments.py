"""What a plan is made of: rows, the trie of them, and segments. Nothing here changes during a run.

A `Row` is one token at one position after one history. Two requests share a row if everything
before and at it is the same, tokens and edits. So the rows of all requests form a trie; a chain
of it without a fork is a `Segment`, and each segment is decoded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from mia.arrays import IntArray
from mia.engine.jobs import EditAt, Job, Read


class Output(Enum):
    """What llama.cpp must keep of a row at the end of the last block, where it drops the others."""

    NONE = 0
    #: its hidden states are edited or captured there; nobody reads its logits
    STATES = 1
    LOGITS = 2


class Row:
    """One token at one position, after one history.

    Attributes:
        edits: the edits at this row, in order.
        reads: captures of this row, each with the row of its array.
        logits: jobs that want this row's logits, each with the row of their array.
        output: whether llama.cpp must make it an output, and of what.
        cells: for each layer group (see `Visits`), the KV cell that its key lies in.
    """

    __slots__ = (
        "cells",
        "children",
        "edits",
        "logits",
        "output",
        "parent",
        "pos",
        "reads",
        "token",
    )

    def __init__(
        self,
        token: int,
        pos: int,
        edits: tuple[EditAt, ...],
        parent: Row | None,
        output: Output = Output.NONE,
    ):
        self.token, self.pos, self.edits, self.parent = token, pos, edits, parent
        self.output = output
        self.children: dict[tuple[int, tuple[EditAt, ...]], Row] = {}
        self.reads: list[tuple[Read, int]] = []
        self.logits: list[tuple[Job, int]] = []
        self.cells: dict[int, int] = {}

    def path_cells(self, group: int) -> IntArray:
        """The KV cells of positions 0 to pos, in order of position: (pos + 1,)."""
        out = np.empty(self.pos + 1, np.intp)
        row: Row | None = self
        while row is not None and row.pos >= 0:
            out[row.pos] = row.cells[group]
            row = row.parent
        return out


@dataclass(eq=False)
class Segment:
    """A chain of rows without a fork.

    Attributes:
        rows, parent, children: its place in the tree.
        jobs: requests that end with its last row.
        first_block: the first block to run; 0 for all. Above 0 the segment is *resumed*.
        twin: for a resumed segment, the unedited one whose residuals it starts from.
        resumed: for a twin, the segments that start from it.
        saved: for a twin, the residuals that they start from.
        path_cells: cells that the deepest path through it takes, its own included.
        generation_cells: cells reserved for what its jobs generate, one job at a time.
        sequences: how many it takes to run the tree under it to its end.
        states_apart: whether its `Output.STATES` rows are decoded apart from its others.
    """

    rows: list[Row]
    parent: Segment | None
    children: list[Segment] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    first_block: int = 0
    twin: Segment | None = None
    resumed: list[Segment] = field(default_factory=list)
    saved: Read | None = None
    path_cells: int = 0
    generation_cells: int = 0
    sequences: int = 1
    states_apart: bool = False

    @property
    def generating(self) -> list[Job]:
        return [job for job in self.jobs if job.generates]


def walk(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Every segment of the trees, a parent before its children."""
    stack = list(segments)
    while stack:
        segment = stack.pop()
        yield segment
        stack.extend(segment.children)
