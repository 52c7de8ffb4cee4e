"""One decode's rows, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mia.engine import limits
from mia.engine.cells import Branch
from mia.engine.generation import Generation
from mia.engine.segments import Output, Row


class Span(NamedTuple):
    """Rows `first` to `end` - 1 of a branch's segment."""

    branch: Branch
    first: int
    end: int

    @property
    def rows(self) -> list[Row]:
        return self.branch.segment.rows[self.first : self.end]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows with the sequence of each: parts of segments, or the next token of generations.

    One batch is one micro-batch of llama.cpp, so row b of it is row b of every node.
    """

    rows: Sequence[Row]
    sequences: Sequence[int]
    spans: Sequence[Span] = ()
    generations: Sequence[Generation] = ()

    @property
    def outputs(self) -> list[bool]:
        return [row.output is not Output.NONE for row in self.rows]

    @property
    def first_block(self) -> int:
        """The first block that must run; 0 for all of them."""
        return min((span.branch.segment.first_block for span in self.spans), default=0)


def of_spans(spans: Sequence[Span]) -> Batch:
    rows = [row for span in spans for row in span.rows]
    sequences: list[int] = []
    for branch, first, end in spans:
        assert branch.sequence is not None
        sequences += [branch.sequence] * (end - first)
    return Batch(rows, sequences, spans=spans)


def of_generations(generations: Sequence[Generation]) -> Batch:
    rows = [g.next_row() for g in generations]
    return Batch(rows, [g.sequence for g in generations], generations=generations)


def best_rows(n_used: int, n_embd: int, most: int) -> int:
    """How many rows a batch should have, at most `most`, when `n_used` cells are in use and every row
    attends over all cells, its own or not: the cost of a row, with its part of the decode's, is least."""
    step = limits.CELL_STEP
    best, least = most, float("inf")
    for steps in range(n_used // step + 1, (n_used + most - 1) // step + 2):
        n = min(steps * step - n_used, most)
        cost = steps * limits.UNFUSED_STEP / n_embd + limits.DECODE_ROWS / n
        if cost < least:
            best, least = n, cost
    return best
