"""The schedule: which segments are decoded next, and what follows from it.

A segment goes through these states. It *waits* on the stack; it is *admitted* when the ledger
has a sequence and cells for it, and is a `Branch` from then on; it is *decoded*, in one batch or
in several (the rest of it lies in `_partial`); its children wait, its jobs generate; when all of
them are over it is *closed* and gives back what it held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mia.engine import limits
from mia.engine.answers import Answer, Buffer
from mia.engine.batch import Batch, Span, best_rows, of_generations, of_spans
from mia.engine.cells import Branch, Ledger
from mia.engine.decode import Decoder
from mia.engine.generation import BranchGeneration
from mia.engine.jobs import Job, Read, sites_of_edits
from mia.engine.segments import Output, Segment, Twin, walk
from mia.engine.session import Session
from mia.errors import EngineError


class Runner:
    """Runs the segments of some jobs once. `answers` has the results."""

    def __init__(
        self,
        session: Session,
        jobs: Sequence[Job],
        *,
        budget: int,
        n_sequences: int,
        on_done: Callable[[Answer], None],
        on_token: Callable[[Job, list[int]], None] | None = None,
    ):
        """`budget`: cells to run in; `on_done` is called with each answer when it is whole, `on_token`
        with a job's tokens when one more of them is chosen."""
        self.context = session.context
        self.ledger = Ledger(
            self.context,
            budget=budget,
            n_sequences=n_sequences,
            has_window=self.context.model.has_window,
        )
        self.answers = {job: Answer(job) for job in jobs}
        self.buffers: dict[Read, Buffer] = {
            buffer.read: buffer for answer in self.answers.values() for buffer in answer.buffers
        }
        for buffer in self.buffers.values():
            if not buffer.read.positions:  # perhaps no row will come; the width is known anyway
                for site in buffer.read.sites:
                    buffer.array(site, session.site(site).read_shape(buffer.read.n_keys))
        self._decoder = Decoder(session, sites_of_edits(jobs), self.buffers)
        self._on_done, self._on_token = on_done, on_token
        n_vocab = self.context.model.n_vocab
        self._max_rows = self.context.params.n_ubatch
        self._max_outputs = max(limits.MIN_OUTPUTS, limits.LOGITS_BYTES // (4 * n_vocab))
        self._scratch = np.empty(n_vocab, np.float32)
        #: segments that wait, the next one last
        self._stack: list[Segment] = []
        #: what is left of admitted segments that are decoded in part
        self._partial: list[Span] = []
        self._branches: dict[Segment, Branch] = {}
        #: twin -> how many segments have yet to start from its residuals
        self._readers: dict[Twin, int] = {}
        #: generations that have their first token but no sequence yet, and those that go on
        self.waiting: list[BranchGeneration] = []
        self.generating: list[BranchGeneration] = []

    def run(self, tops: Sequence[Segment]) -> None:
        """Runs all segments, depth first, so that few cells are held at a time."""
        self.context.clear()
        self._stack = [s for s in reversed(tops) if s.twin is None]
        for twin in (twin for segment in walk(tops) for twin in segment.twins):
            self.buffers[twin.saved] = Buffer(twin.saved)
            self._readers[twin] = len(twin.resumed)
        while self._stack or self._partial or self.generating or self.waiting:
            spans = self._next_spans()
            self._admit_generations()
            if spans:
                self._decode_spans(spans)
            elif self.generating:
                self._generate_step()
            elif not self._bring_up():
                raise EngineError(
                    f"a request needs more than the {self.ledger.budget} cells of the context"
                )

    def close(self) -> None:
        for generation in [*self.generating, *self.waiting]:
            generation.close()

    # -- what is decoded next --------------------------------------------------------

    def _next_spans(self) -> list[Span]:
        """The parts of segments for one decode; none if there is no room for any."""
        # what is left of a segment goes first: it may hold the cells that resumed ones need
        if self._stack and self._stack[-1].first_block and not self._partial:
            return self._resumed_spans()
        spans: list[Span] = []
        held: list[Span] = []
        n_rows = n_outputs = 0
        unembed: bool | None = None  # whether logits are read of the batch's outputs
        max_rows = self._rows_for_decode()
        while n_rows < max_rows and n_outputs < self._max_outputs:
            rest = self._admit_heir(spans[-1]) if spans else None
            if rest is None:
                rest = self._partial.pop() if self._partial else self._admit_next()
            if rest is None:
                break
            segment, end = rest.branch.segment, rest.first
            while end < rest.end and n_rows < max_rows and n_outputs < self._max_outputs:
                output = segment.rows[end].output
                if output is not Output.NONE:
                    logits = output is Output.LOGITS or not segment.states_apart
                    if unembed is not None and unembed != logits:
                        break
                    unembed = logits
                    n_outputs += 1
                end += 1
                n_rows += 1
            if end > rest.first:
                spans.append(rest._replace(end=end))
            else:
                held.append(rest)
                if not self._partial:
                    break
        self._partial.extend(held)
        return spans

    def _admit_next(self) -> Span | None:
        """All rows of the segment on top of the stack, if it is whole and there is room."""
        if not self._stack or self._stack[-1].first_block or not self._has_room(self._stack[-1]):
            return None
        return self._admit(self._stack.pop())

    def _admit_heir(self, span: Span) -> Span | None:
        """All rows of the segment that goes on where a span ends, if there is room."""
        segment = span.branch.segment
        heir = segment.heir
        if heir is None or span.end < len(segment.rows) or heir in self._branches:
            return None
        goes_on = self.ledger.may_borrow(span.branch) and self._has_room(heir)
        return self._admit(heir) if goes_on else None

    def _resumed_spans(self) -> list[Span]:
        """Resumed segments lie together on the stack, those with the lowest block on top. Each is
        decoded as a whole: a second batch would need the keys that the first has skipped."""
        spans: list[Span] = []
        n_rows = n_outputs = 0
        max_rows = self._rows_for_decode()
        while self._stack and self._stack[-1].first_block:
            segment = self._stack[-1]
            n_out = sum(row.output is not Output.NONE for row in segment.rows)
            full = n_rows + len(segment.rows) > max_rows or n_outputs + n_out > self._max_outputs
            block_ends = (
                n_rows >= limits.RESUMED_ROWS
                and segment.first_block > spans[-1].branch.segment.first_block
            )
            if (spans and (full or block_ends)) or not self._has_room(segment):
                break
            spans.append(self._admit(self._stack.pop()))
            n_rows, n_outputs = n_rows + len(segment.rows), n_outputs + n_out
        return spans

    def _rows_for_decode(self) -> int:
        """How many rows the next decode should have, at most."""
        context = self.context
        if context.params.flash or context.model.recurrent:
            return self._max_rows
        # of what is left of segments the cells are booked, not used
        n_used = self.ledger.booked - sum(rest.end - rest.first for rest in self._partial)
        return best_rows(n_used, context.model.n_embd, self._max_rows)

    def _bring_up(self) -> bool:
        """Puts a segment for which there is room on top of the stack.

        There is always one: what the segment admitted last needs was free when it was admitted,
        and all that came later is over and has given back what it held.
        """
        for i in reversed(range(len(self._stack))):
            if self._has_room(self._stack[i]):
                self._stack.append(self._stack.pop(i))
                return True
        return False

    def _has_room(self, segment: Segment) -> bool:
        return self.ledger.has_room(segment, self._parent(segment))

    def _parent(self, segment: Segment) -> Branch | None:
        return None if segment.parent is None else self._branches[segment.parent]

    def _admit(self, segment: Segment) -> Span:
        branch = self.ledger.admit(segment, self._parent(segment))
        self._branches[segment] = branch
        return Span(branch, 0, len(segment.rows))

    # -- what follows from it ----------------------------------------------------------

    def _decode_spans(self, spans: Sequence[Span]) -> None:
        batch = of_spans(spans)
        self._decoder.decode(batch)
        self._collect_logits(batch)
        ready: list[Segment] = []
        b = -1  # the span's last row in the batch
        for span in spans:
            b += span.end - span.first
            branch, segment = span.branch, span.branch.segment
            if segment.twin is not None:
                self._let_go(segment.twin)
            if span.end < len(segment.rows):
                self._partial.append(Span(branch, span.end, len(segment.rows)))
                continue
            self._start_generations(branch, b)
            for twin in segment.twins:
                ready += twin.resumed
            ready += [c for c in segment.children if c.twin is None and c not in self._branches]
            self._close(branch)
        self._push(ready)

    def _push(self, ready: Sequence[Segment]) -> None:
        """Puts segments on the stack: on top those that run whole, the ones that need few sequences
        first; then resumed ones, the lowest first block on top."""
        if resumed := [s for s in ready if s.first_block]:
            n = len(self._stack)
            while n and self._stack[n - 1].first_block:
                n -= 1
            # together with those of other twins that lie there already
            self._stack[n:] = sorted(self._stack[n:] + resumed, key=lambda s: -s.first_block)
        whole = sorted((s for s in ready if not s.first_block), key=lambda s: s.sequences)
        self._stack.extend(reversed(whole))

    def _collect_logits(self, batch: Batch) -> None:
        for b, row in enumerate(batch.rows):
            for job, i in row.logits:
                self.answers[job].put_logits(i, self._decoder.logits(b))

    def _let_go(self, twin: Twin) -> None:
        """Forgets a twin's residuals when the last segment that starts from them has run."""
        self._readers[twin] -= 1
        if not self._readers[twin]:
            del self._readers[twin], self.buffers[twin.saved]

    def _close(self, branch: Branch) -> None:
        for over in self.ledger.close(branch):
            del self._branches[over.segment]
            for job in over.segment.jobs:
                self._finish(self.answers[job])
                self._on_done(self.answers[job])

    def _finish(self, answer: Answer) -> None:
        answer.finish(self.context.params.kv_type)

    # -- generation ----------------------------------------------------------------------

    def _start_generations(self, branch: Branch, b: int) -> None:
        """Chooses the first token of each job that ends with row b of the batch and generates."""
        for job in branch.segment.generating:
            generation = BranchGeneration(self.answers[job], branch, self.context)
            self.waiting.append(generation)
            if self._choose(generation, b):
                self.waiting.pop().close()
                self.ledger.end_unstarted(branch)

    def _admit_generations(self) -> None:
        """Gives waiting generations a sequence and cells, as far as there are any."""
        still: list[BranchGeneration] = []
        for generation in self.waiting:
            generation.lease = lease = self.ledger.lease(generation.branch, generation.n_cells)
            if lease is None:
                still.append(generation)
            else:
                generation.sequence = lease.sequence
                self.generating.append(generation)
        self.waiting = still

    def _generate_step(self) -> None:
        """One more token of as many generations as a batch holds."""
        generations = self.generating[: min(self._max_rows, self._max_outputs)]
        self._decoder.decode(of_generations(generations))
        for b, generation in enumerate(generations):
            if self._choose(generation, b):
                self._end_generation(generation)

    def _choose(self, generation: BranchGeneration, b: int) -> bool:
        """Chooses the next token from row b of the batch. True if it is the last."""
        is_last = generation.choose(self._decoder.logits(b), b, self._scratch)
        if self._on_token is not None:
            self._on_token(generation.job, generation.tokens)
        return is_last

    def _end_generation(self, generation: BranchGeneration) -> None:
        self.generating.remove(generation)
        generation.close()
        assert generation.lease is not None
        self.ledger.end_lease(generation.lease)
        self._close(generation.branch)
