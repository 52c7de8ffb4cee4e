"""Runs planned segments on a context: batches, sequences, edits, captures, generation.

One decode is one micro-batch of rows from any number of sequences. For each decode
the rows' edits and captures are gathered by graph node, so that each node is visited
once, and an edit that many rows share is one numpy operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.engine.plan import Buffer, Job, Row, Segment
from mia.engine.session import Session, Variant
from mia.engine.visits import Visits
from mia.errors import EngineError
from mia.llama.ggml import Context, Sampler
from mia.sites import BY_KEY, Site

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]

#: sequences that llama.cpp can hold in one batch
MAX_SEQ = 256
#: bytes of logits that one decode may produce
_LOGITS_BYTES = 64 << 20
#: a segment with so many outputs whose logits nobody wants has them decoded apart from those
#: whose logits are wanted: the unembedding, a fifth of a small model's work, is then left out
_MUTE_ROWS = 16
#: rows after which a batch of resumed segments ends at the next change of layer
_RESUMED_ROWS = 32


class Restart(Exception):
    """A memory that cannot be cut back met a graph that was not known yet: run again."""


class Runner:
    """One call of `Model.run`."""

    def __init__(
        self,
        session: Session,
        edits: dict[int, tuple[Edit, Site]],
        *,
        sites: set[Site],
        budget: int,
        max_seq: int,
        is_eog: Callable[[int], bool],
        on_done: Callable[[Job], None],
        make_sampler: Callable[[Job], Sampler],
    ):
        self.session, self.context = session, session.context
        self.edits = edits
        self.n_ubatch = self.context.params.n_ubatch
        self.max_outputs = max(8, _LOGITS_BYTES // (4 * self.context.model.n_vocab))
        self.budget, self.max_seq = budget, max_seq
        self.is_eog, self.on_done, self.make_sampler = is_eog, on_done, make_sampler
        self.free = list(range(max_seq - 1, -1, -1))
        self.used = 0  # cells held or promised
        self.generating: list[_Generation] = []
        self.waiting: list[_Generation] = []  # have their first token, but no sequence yet
        self.out_index: Index = np.empty(0, np.intp)
        self.scores = np.empty(self.context.model.n_vocab, np.float32)  # scratch
        self.track_cells = any(site.name in BY_KEY for site in sites)
        #: what the tracer expects as long as the same generations go on, at the same graph
        self._standing: tuple[Visits, Sequence[_Generation], Variant] | None = None
        nodes = session.topology.sites if session.variants else {}
        self._ends = {s for s in sites if s in nodes and nodes[s].outputs_only}
        self._buffer_ends: dict[int, bool] = {}

    # -- the schedule ----------------------------------------------------------

    def run(self, roots: list[Segment]) -> None:
        """Runs all segments, depth first, so that few cells are held at a time."""
        self.context.clear()
        stack = [s for s in reversed(roots) if s.twin is None]
        partial: list[Segment] = []  # decoded in part, first in line
        while stack or partial or self.generating or self.waiting:
            batch = self._fill(stack, partial)
            self._admit_generations()
            if batch:
                self._run_batch(batch, stack, partial)
            elif self.generating:
                self._generate_step()
            elif not self._bring_up(stack):
                raise EngineError(
                    f"a request needs more than the {self.budget} cells of the context"
                )

    def _fill(self, stack: list[Segment], partial: list[Segment]) -> list[tuple[Segment, int, int]]:
        """Takes segments for one decode: (segment, first row, end row)."""
        batch: list[tuple[Segment, int, int]] = []
        rows = outputs = 0
        if stack and stack[-1].resume and not partial:
            return self._fill_resumed(stack)
        kind: bool | None = None  # of the batch's outputs: mute or not
        held: list[Segment] = []
        while rows < self.n_ubatch and outputs < self.max_outputs:
            if partial:
                seg = partial.pop()
            elif stack and not stack[-1].resume and self._admit(stack[-1]):
                seg = stack.pop()
            else:
                break
            end, n_out = seg.done_rows, 0
            while (
                end < len(seg.rows) and rows < self.n_ubatch and outputs + n_out < self.max_outputs
            ):
                if self._is_output(seg, end):
                    mute = seg.mute_rows >= _MUTE_ROWS and not self._speaks(seg, end)
                    if kind is not None and kind != mute:
                        break
                    kind = mute
                    n_out += 1
                end, rows = end + 1, rows + 1
            outputs += n_out
            if end == seg.done_rows:
                held.append(seg)
                if not partial:
                    break
            else:
                batch.append((seg, seg.done_rows, end))
        partial.extend(held)
        return batch

    def _fill_resumed(self, stack: list[Segment]) -> list[tuple[Segment, int, int]]:
        """Resumed segments lie together on the stack, the lowest block on top."""
        batch: list[tuple[Segment, int, int]] = []
        rows = outputs = 0
        while stack and stack[-1].resume:
            seg = stack[-1]
            n_out = sum(self._is_output(seg, i) for i in range(len(seg.rows)))
            full = rows + len(seg.rows) > self.n_ubatch or outputs + n_out > self.max_outputs
            layer_ends = rows >= _RESUMED_ROWS and seg.resume > batch[-1][0].resume
            if (batch and (full or layer_ends)) or not self._admit(seg):
                break
            stack.pop()
            rows, outputs = rows + len(seg.rows), outputs + n_out
            batch.append((seg, 0, len(seg.rows)))
        return batch

    def _bring_up(self, stack: list[Segment]) -> bool:
        """Puts a segment on top of the stack for which there is room.

        There is always one: what the segment admitted last needs was free when it was
        admitted, and all that came later has ended and given back what it held.
        """
        at = next((i for i in reversed(range(len(stack))) if self._has_room(stack[i])), None)
        if at is not None:
            stack.append(stack.pop(at))
        return at is not None

    def _has_room(self, seg: Segment) -> bool:
        inherits = seg.parent is not None and seg.parent.unstarted == 1
        return len(self.free) + inherits >= seg.seqs and self.used + seg.need <= self.budget

    def _admit(self, seg: Segment) -> bool:
        """Gives the segment a sequence with its parent's cells, if there is room."""
        if not self._has_room(seg):
            return False
        seg.seq = self.free.pop() if seg.parent is None else self._fork(seg.parent)
        self.used += len(seg.rows) + seg.growth
        if self._ends:
            speaking = sum(self._speaks(seg, i) for i in range(len(seg.rows)))
            seg.mute_rows = sum(self._is_output(seg, i) for i in range(len(seg.rows))) - speaking
        return True

    def _fork(self, seg: Segment) -> int:
        """A sequence that goes on from the segment's end. The last to ask gets its own."""
        seg.unstarted -= 1
        if seg.unstarted:
            seq = self.free.pop()
            self.context.seq_cp(seg.seq, seq, seg.rows[-1].pos + 1)
        else:
            seq, seg.seq = seg.seq, -1
        return seq

    def _run_batch(
        self, batch: list[tuple[Segment, int, int]], stack: list[Segment], partial: list[Segment]
    ) -> None:
        rows = [r for seg, a, b in batch for r in seg.rows[a:b]]
        seqs = [seg.seq for seg, a, b in batch for _ in range(a, b)]
        out = [self._is_output(seg, i) for seg, a, b in batch for i in range(a, b)]
        self._decode(rows, seqs, out, batch=batch)
        self._collect_logits(rows, out)
        at = 0
        ready: list[Segment] = []
        for seg, a, b in batch:
            at += b - a
            seg.done_rows = b
            if seg.twin is not None:
                seg.twin.drop_saved()
            if b < len(seg.rows):
                partial.append(seg)
                continue
            self._start_generation(seg, row=at - 1)
            ready.extend(seg.waiting)
            ready.extend(c for c in seg.children if c.twin is None)
            if not seg.unfinished:
                self._release(seg)
        # on top: what is deepest; resumed segments in order of their first block
        ready.sort(key=lambda s: -s.resume)
        resumed = [s for s in ready if s.resume]
        if resumed:
            stack[:] = _merge_resumed(stack, resumed)
        # those that need few sequences first (see plan._sequences)
        fresh = sorted((s for s in ready if not s.resume), key=lambda s: s.seqs)
        stack.extend(reversed(fresh))

    def _release(self, seg: Segment) -> None:
        """Gives back the sequence and cells of a finished segment, and of parents finished by it."""
        node: Segment | None = seg
        while node is not None:
            if node.seq >= 0:
                self.context.seq_rm(node.seq)
                self.free.append(node.seq)
            self.used -= len(node.rows) + node.growth
            for job in node.jobs:
                job.finish()
                self.on_done(job)
            node = node.parent
            if node is not None:
                node.unfinished -= 1
                if node.unfinished:
                    return

    # -- generation --------------------------------------------------------------

    def _start_generation(self, seg: Segment, row: int) -> None:
        for job in seg.jobs:
            if not job.request.n_predict:
                continue
            gen = _Generation(job, seg, self.make_sampler(job))
            if gen.choose(self, int(self.out_index[row]), row):
                gen.close()
                seg.unstarted -= 1
                self._count_generation(seg)
            else:
                self.waiting.append(gen)

    def _admit_generations(self) -> None:
        """Gives waiting generations a sequence and cells: those that their segment kept free,
        else what there is."""
        still: list[_Generation] = []
        for gen in self.waiting:
            seg, growth = gen.segment, gen.job.request.n_predict - 1
            if seg.growth_free:
                growth = 0
            if (self.free or seg.unstarted == 1) and self.used + growth <= self.budget:
                if growth == 0:
                    seg.growth_free, gen.holds_growth = False, True
                self.used += growth
                gen.promised = growth
                gen.seq = self._fork(seg)
                self.generating.append(gen)
            else:
                still.append(gen)
        self.waiting = still

    def _generate_step(self) -> None:
        now = self.generating[: min(self.n_ubatch, self.max_outputs)]
        rows = [g.next_row() for g in now]
        self._decode(rows, [g.seq for g in now], [True] * len(now), generations=now)
        for i, g in enumerate(now):
            if g.choose(self, i, i):
                self._end_generation(g)

    def _end_generation(self, g: _Generation) -> None:
        self.generating.remove(g)
        self.context.seq_rm(g.seq)
        self.free.append(g.seq)
        self.used -= g.promised
        g.close()
        seg = g.segment
        seg.growth_free = seg.growth_free or g.holds_growth
        self._count_generation(seg)
        if not seg.unfinished:
            self._release(seg)

    def _count_generation(self, seg: Segment) -> None:
        """One of the segment's generations is over; the last gives back the cells kept for them."""
        seg.unfinished -= 1
        seg.generations -= 1
        if not seg.generations:
            self.used -= seg.growth
            seg.growth = 0

    def close(self) -> None:
        for g in [*self.generating, *self.waiting]:
            g.close()

    # -- one decode ----------------------------------------------------------------

    def _is_output(self, seg: Segment, i: int) -> bool:
        """Whether a row must be an output: for its logits, or for a site that only outputs have."""
        row = seg.rows[i]
        if self._speaks(seg, i):
            return True
        if not self._ends:
            return False
        if any(self.edits[edit_id][1] in self._ends for _, edit_id, _ in row.edits):
            return True
        return any(self._at_end(buffer) for buffer, _ in row.captures)

    def _speaks(self, seg: Segment, i: int) -> bool:
        """Whether a row's logits are wanted, not only what lies before them."""
        last = i == len(seg.rows) - 1
        return bool(seg.rows[i].logits) or (last and any(j.request.n_predict for j in seg.jobs))

    def _at_end(self, buffer: Buffer) -> bool:
        found = self._buffer_ends.get(id(buffer))
        if found is None:
            found = self._buffer_ends[id(buffer)] = not self._ends.isdisjoint(buffer.sites)
        return found

    def _decode(
        self,
        rows: Sequence[Row],
        seqs: Sequence[int],
        out: Sequence[bool],
        *,
        batch: Sequence[tuple[Segment, int, int]] = (),
        generations: Sequence[_Generation] = (),
    ) -> None:
        """The next rows of segments, or the next token of generations."""
        tokens, positions = [r.token for r in rows], [r.pos for r in rows]
        self.out_index = np.cumsum(out, dtype=np.intp) - 1
        for _ in range(4):
            if self.context.tracer is not None:
                self.session.turn_to(any(out))
                self._expect(rows, batch, generations)
            if self.context.decode(tokens, positions, seqs, out):
                return
            self._standing = None
            self.session.learn()
            for seq, pos in dict(zip(reversed(seqs), reversed(positions), strict=True)).items():
                if not self.context.seq_rm(seq, pos):
                    raise Restart
        raise EngineError("llama.cpp builds another graph each time; mia cannot follow it")

    def _expect(
        self,
        rows: Sequence[Row],
        batch: Sequence[tuple[Segment, int, int]],
        generations: Sequence[_Generation],
    ) -> None:
        """Tells the tracer what is wanted of the coming decode, and which nodes need not run."""
        assert self.context.tracer is not None
        variant = self.session.variants[0]
        standing, self._standing = self._standing, None
        if generations and standing is not None:
            visits, who, where = standing
            if where is variant and who == generations:
                visits.go_on(rows)  # and the tracer expects it still
                self._standing = standing
                return
        visits = Visits(self.session, self.edits, rows, self.out_index, self.track_cells)
        resume = min((seg.resume for seg, _, _ in batch), default=0)
        if resume:
            visits.resume(resume, batch)
        visits.gather()
        skip = variant.topology.skippable_below(resume) if resume else []
        generates = generations or any(j.request.n_predict for seg, _, _ in batch for j in seg.jobs)
        if not generates and not any(r.logits for r in rows):
            tail = variant.topology.skippable_tail
            if visits.actions.keys().isdisjoint(tail):
                skip = [*skip, *tail]
        self.context.tracer.expect(variant.addrs, visits.actions, skip, visits.visit)
        if generations:
            self._standing = visits, generations, variant

    def _collect_logits(self, rows: Sequence[Row], out: Sequence[bool]) -> None:
        if not any(r.logits for r in rows):
            return
        logits = self.context.logits()
        for b, row in enumerate(rows):
            for job, i in row.logits:
                line = logits[self.out_index[b]]
                _check_numbers(self.context, line)
                if job.logit_rows is None:
                    job.logit_rows = np.empty(
                        (len(job.logit_positions), logits.shape[1]), np.float32
                    )
                job.logit_rows[i] = line
                job.logits_left -= 1
                if job.logits_left == 0:
                    if job.request.metric is None:
                        job.result.logits = job.logit_rows
                    else:
                        job.result.value = job.request.metric(job.logit_rows)
                    job.logit_rows = None


def _check_numbers(context: Context, logits: Array) -> None:
    """NaN anywhere in a row makes all its logits NaN. It is in the cache too by then, where it
    would spoil every later run: masked cells are read, and zero times NaN is NaN."""
    if np.isnan(logits[0]):
        context.clear(data=True)
        raise EngineError(
            "the logits are not numbers (NaN): an edit is too large for the model, "
            "or llama.cpp computes wrongly on this machine"
        )


def _merge_resumed(stack: list[Segment], resumed: list[Segment]) -> list[Segment]:
    """Resumed segments of several twins, sorted together on top of the stack."""
    n = len(stack)
    while n and stack[n - 1].resume:
        n -= 1
    return stack[:n] + sorted(stack[n:] + resumed, key=lambda s: -s.resume)


class _Generation:
    """A sequence that is being continued."""

    def __init__(self, job: Job, segment: Segment, sampler: Sampler):
        self.job, self.segment, self.sampler = job, segment, sampler
        self.seq = -1
        self.promised = 0  # cells taken beyond those that the segment kept
        self.holds_growth = False
        self.row: Row = segment.rows[-1]
        for token in job.tokens[-64:]:
            sampler.accept(token)

    def choose(self, runner: Runner, output: int, batch_row: int) -> bool:
        """Picks the next token from the logits; True where it is the last."""
        logits = runner.context.logits()[output]
        _check_numbers(runner.context, logits)
        plain = self.job.request.sampling.plain
        token = int(logits.argmax()) if plain else self.sampler.sample(runner.context, batch_row)
        result = self.job.result
        if self.job.request.logprobs:
            # in place: an array of the vocabulary's size costs more to get than to fill
            top = logits[token] if plain else logits.max()
            scores = np.subtract(logits, top, out=runner.scores)
            np.exp(scores, out=scores)
            result.logprobs.append(float(logits[token] - top - np.log(scores.sum())))
        result.tokens.append(token)
        ended = self.job.request.stop_at_eog and runner.is_eog(token)
        return ended or len(result.tokens) >= self.job.request.n_predict

    def next_row(self) -> Row:
        job = self.job
        row = Row(job.result.tokens[-1], self.row.pos + 1, job.on_generated, self.row)
        for buffer, at, capture in job.buffers:
            if capture.generated:
                row.captures.append((buffer, len(at) + len(job.result.tokens) - 1))
        self.row = row
        return row

    def close(self) -> None:
        self.sampler.close()
