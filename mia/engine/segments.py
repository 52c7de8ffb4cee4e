"""What a plan is made of: rows, the trie of them, and segments. Nothing here changes during a run.

A `Row` is one token at one position after one history. Two requests share a row if everything
before and at it is the same, tokens and edits. So the rows of all requests form a trie; a chain
of it without a fork is a `Segment`, and each segment is decoded once. A segment and its `heir`, the
heir's heir and so on are a *line*: one sequence, decoded in one batch as far as it holds them.
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


@dataclass(eq=False, repr=False)
class Twin:
    """An unedited run from whose residuals other segments start.

    Attributes:
        rows: from the first position at which any of them starts to the end of the prompt.
        saved: what is read of them: the residuals that the others start from.
        resumed: the segments that start from it.
    """

    rows: list[Row]
    saved: Read
    resumed: list[Segment] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Segment:
    """A chain of rows without a fork.

    Attributes:
        rows, parent, children: its place in the tree.
        heir: the child that goes on in the same batch and sequence, if there is room for it.
        jobs: requests that end with its last row.
        first_block: the first block to run; 0 for all. Above 0 the segment is *resumed*.
        twin: for a resumed segment, the unedited run that it starts from.
        twins: those that end with its last row.
        path_cells: cells that the deepest path through it takes, its own included.
        generation_cells: cells reserved for what its jobs generate, one job at a time.
        sequences: how many it takes to run the tree under it to its end.
        n_blocks: how many of the model's first blocks are needed here or by what comes after it.
        states_apart: whether its `Output.STATES` rows are decoded apart from its others.
    """

    rows: list[Row]
    parent: Segment | None
    children: list[Segment] = field(default_factory=list)
    heir: Segment | None = None
    jobs: list[Job] = field(default_factory=list)
    first_block: int = 0
    twin: Twin | None = None
    twins: list[Twin] = field(default_factory=list)
    path_cells: int = 0
    generation_cells: int = 0
    sequences: int = 1
    n_blocks: int = 0
    states_apart: bool = False

    @property
    def generating(self) -> list[Job]:
        return [job for job in self.jobs if job.generates]

    @property
    def line(self) -> Iterator[Segment]:
        """Itself, its heir, the heir's heir and so on."""
        segment: Segment | None = self
        while segment is not None:
            yield segment
            segment = segment.heir


def walk(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Every segment of the trees, a parent before its children."""
    stack = list(segments)
    while stack:
        segment = stack.pop()
        yield segment
        stack.extend(segment.children)
