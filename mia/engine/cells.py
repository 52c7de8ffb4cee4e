"""The ledger of KV cells and sequences: who holds what, and who may start.

Every count of the engine is here. Two things can run out: the cells of the budget, and
sequences. A segment that is admitted becomes a `Branch` and holds a sequence, the cells of its
rows, and a reserve of cells in which its jobs generate one after the other. Children and
generations start from the branch's end. One at a time borrows the branch's sequence, and cuts it
back when it is over; the others have sequences of their own that share the branch's cells. So one
sequence is enough for any tree; more are there to run side by side. (Models with a sliding window
need more: `plan.sequences_needed`.) When all children and generations are over the branch is, and
gives back what it held.

Two invariants are kept here, and asserted: `booked` never exceeds the budget, and whenever
somebody may start there is a sequence for him.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mia.engine.segments import Segment


class Cache(Protocol):
    """What the ledger asks of a context."""

    def seq_cp(self, src: int, dst: int, end: int) -> None: ...
    def seq_rm(self, seq: int, start: int = 0) -> bool: ...


@dataclass(slots=True, eq=False, repr=False)
class Branch:
    """A segment that has been admitted. The ledger alone changes it.

    Attributes:
        sequence: which it is decoded on.
        borrowed: whether that is its parent's.
        lent: whether a child or generation has borrowed it now.
        to_start: children and generations that have no sequence yet.
        to_end: children and generations that are not over.
        generations: generations that are not over.
        reserve: cells reserved for its generations, until the last of them is over.
        reserve_taken: whether a generation is using them now.
    """

    segment: Segment
    parent: Branch | None
    sequence: int
    borrowed: bool
    to_start: int
    to_end: int
    generations: int
    reserve: int
    lent: bool = False
    reserve_taken: bool = False

    @property
    def end(self) -> int:
        """The position after its last row."""
        return self.segment.rows[-1].pos + 1


@dataclass(frozen=True, slots=True)
class Lease:
    """What one generation holds: a sequence, its own or the branch's, and cells of its own or the
    branch's reserve."""

    branch: Branch
    sequence: int
    borrowed: bool
    own_cells: int
    uses_reserve: bool


class Ledger:
    """All cells and sequences of one run."""

    def __init__(self, cache: Cache, *, budget: int, n_sequences: int, has_window: bool = False):
        """`has_window`: llama.cpp takes back the cells of a sequence that a sliding window has left
        behind. So only the last to start may go on in its parent's sequence."""
        self.cache, self._has_window = cache, has_window
        self.budget, self.n_sequences = budget, n_sequences
        #: cells that are in use or reserved
        self.booked = 0
        self.free = list(range(n_sequences - 1, -1, -1))

    # -- segments ------------------------------------------------------------------

    def has_room(self, segment: Segment, parent: Branch | None) -> bool:
        """Whether the segment and the deepest path below it can run to their end now."""
        return (
            len(self.free) + (parent is not None and self.may_borrow(parent)) >= segment.sequences
            and self.booked + segment.path_cells <= self.budget
        )

    def may_borrow(self, branch: Branch) -> bool:
        """Whether who starts next from a branch's end can have the branch's own sequence."""
        return not branch.lent and (branch.to_start == 1 or not self._has_window)

    def admit(self, segment: Segment, parent: Branch | None) -> Branch:
        """Gives a segment for which there is room a sequence with its parent's cells."""
        sequence, borrowed = (self.free.pop(), False) if parent is None else self._fork(parent)
        self._book(len(segment.rows) + segment.generation_cells)
        generations = len(segment.generating)
        ends = len(segment.children) + generations
        reserve = segment.generation_cells
        return Branch(segment, parent, sequence, borrowed, ends, ends, generations, reserve)

    def close(self, branch: Branch) -> list[Branch]:
        """Takes back what a branch holds if it is over, and what its parents hold if it was their
        last. Returns the branches that are over."""
        over: list[Branch] = []
        node: Branch | None = branch
        while node is not None and not node.to_end:
            self._give_back(node.sequence, node.parent if node.borrowed else None)
            self.booked -= len(node.segment.rows)  # its reserve went with its last generation
            over.append(node)
            node = node.parent
            if node is not None:
                node.to_end -= 1
        return over

    # -- generations -----------------------------------------------------------------

    def lease(self, branch: Branch, n_cells: int) -> Lease | None:
        """A sequence from the branch's end for a generation of `n_cells` more tokens, in the
        branch's reserve if nobody uses it; None if there is no room yet."""
        uses_reserve = not branch.reserve_taken
        own_cells = 0 if uses_reserve else n_cells
        has_sequence = self.free or self.may_borrow(branch)
        if not has_sequence or self.booked + own_cells > self.budget:
            return None
        self._book(own_cells)
        branch.reserve_taken = True
        return Lease(branch, *self._fork(branch), own_cells, uses_reserve)

    def end_lease(self, lease: Lease) -> None:
        """A generation is over."""
        self._give_back(lease.sequence, lease.branch if lease.borrowed else None)
        self.booked -= lease.own_cells
        if lease.uses_reserve:
            lease.branch.reserve_taken = False
        self._count_generation(lease.branch)

    def end_unstarted(self, branch: Branch) -> None:
        """A generation was over with its first token, before it needed a sequence."""
        branch.to_start -= 1
        self._count_generation(branch)

    # -- counting ----------------------------------------------------------------------

    def _count_generation(self, branch: Branch) -> None:
        branch.to_end -= 1
        branch.generations -= 1
        if not branch.generations:
            self.booked -= branch.reserve
            branch.reserve = 0

    def _fork(self, branch: Branch) -> tuple[int, bool]:
        """A sequence that goes on from the branch's end, and whether it is the branch's own."""
        borrowed = self.may_borrow(branch)
        branch.to_start -= 1
        if borrowed:
            branch.lent = True
            return branch.sequence, True
        assert self.free, "a child was let in without a sequence for it"
        sequence = self.free.pop()
        self.cache.seq_cp(branch.sequence, sequence, branch.end)
        return sequence, False

    def _give_back(self, sequence: int, lender: Branch | None) -> None:
        first = 0 if lender is None else lender.end
        self.cache.seq_rm(sequence, first)
        if lender is None:
            self.free.append(sequence)
        else:
            lender.lent = False

    def _book(self, n_cells: int) -> None:
        self.booked += n_cells
        assert self.booked <= self.budget, "more cells are booked than the context has"
