"""One context of a stream: requests join between tokens, run side by side, and leave.

Each decode is either a part of the prompts that wait, or the next token of everything that generates;
the two take turns. A request's rows are planned when there is room for it, so that it can begin with
what the cache has by then.

Numbers that are not finite must not stay in the cache (see finite.py). Requests whose edits could make
some run in an *isolated* lane, one at a time, and its cache is wiped behind each. If a decode fails
in another lane all the same, its cache is wiped too, and everything is decoded again, each request by
itself until it has shown that it is not the one that fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mia.edits import Edit
from mia.engine import limits
from mia.engine.answers import Answer, Buffer
from mia.engine.batch import Batch, Span, of_generations, of_spans
from mia.engine.cells import Branch
from mia.engine.decode import ATTEMPTS, Decoder, Restart, always_new_graph
from mia.engine.generation import Generation
from mia.engine.jobs import Job, Read, sites_of_edits
from mia.engine.plan import note
from mia.engine.segments import Output, Row, Segment
from mia.engine.session import Session
from mia.engine.tracks import Key, Track, Tracks, common, key_of
from mia.errors import EngineError, MiaError
from mia.llama import Held
from mia.request import Request, Result
from mia.sites import BY_KEY, Site


@dataclass(eq=False, repr=False)
class Ticket:
    """One request of a stream.

    Attributes:
        result: what there is so far: tokens as they are chosen, all else when it is over.
        is_over: whether nothing will come any more.
        error: why it ended without a result; None if it did not.
        cancelled: whether `Stream.cancel` ended it.
    """

    request: Request
    result: Result
    is_over: bool = False
    error: MiaError | None = None
    cancelled: bool = False

    @property
    def tokens(self) -> list[int]:
        """Those generated so far."""
        return self.result.tokens


@dataclass(eq=False, repr=False)
class Run:
    """A request in a lane, as long as it is not over.

    Attributes:
        keys: those of the prompt's rows.
        rows: what is to be decoded before it generates, shared rows first.
        n_done: how many of them are.
        alone: whether it is decoded by itself, until a decode has gone well.
    """

    ticket: Ticket
    job: Job
    answer: Answer
    keys: list[Key]
    track: Track | None = None
    rows: list[Row] = field(default_factory=list)
    n_done: int = 0
    generation: Generation | None = None
    alone: bool = False
    n_restarts: int = 0


class Lane:
    """The requests of one context."""

    def __init__(
        self, session: Session, *, cells: int, n_requests: int, isolated: bool, saves: bool
    ):
        """`n_requests`: how many may run side by side; the session has sequences for as many prefixes
        more (`limits.STREAM_KEPT`), an isolated one has one. `saves`: whether prefixes may leave the cache
        for a while, which forgets in which cells they lay."""
        self.session, self.context = session, session.context
        self.isolated = isolated
        n_sequences = 1 if isolated else n_requests + limits.STREAM_KEPT
        n_kept = 0 if isolated else int(cells * limits.STREAM_KEPT_PART)
        saves = saves and self.context.can_save_sequences
        self.tracks = Tracks(
            self.context,
            budget=cells,
            n_sequences=n_sequences,
            n_kept=min(n_kept, limits.STREAM_KEPT_CELLS) if saves else n_kept,
            n_saved=n_kept if saves else 0,
            has_window=self.context.model.has_window,
        )
        self._most = 1 if isolated else n_requests
        self._edits: dict[Edit, Site] = {}
        self._buffers: dict[Read, Buffer] = {}
        self._decoder = Decoder(session, self._edits, self._buffers)
        n_vocab = self.context.model.n_vocab
        self._max_rows = self.context.params.n_ubatch
        self._max_outputs = max(limits.MIN_OUTPUTS, limits.LOGITS_BYTES // (4 * n_vocab))
        self._scratch = np.empty(n_vocab, np.float32)
        self.queue: deque[Run] = deque()
        #: those whose prompts are decoded, and those that generate
        self.prompts: list[Run] = []
        self.generating: list[Run] = []
        self._generates_next = False
        #: whether requests of this lane or another one generate, and should not wait for long prompts
        self.is_hurried = False
        self._changed: dict[Ticket, None] = {}
        #: whether the cache may have rows that the ledger has not
        self._is_doubtful = False

    @property
    def active(self) -> list[Run]:
        return [*self.prompts, *self.generating]

    @property
    def is_busy(self) -> bool:
        return bool(self.queue or self.prompts or self.generating)

    def add(self, job: Job, ticket: Ticket) -> None:
        answer = Answer(job)
        answer.result = ticket.result
        keys = [key_of(token, job.edits_at.get(p, ())) for p, token in enumerate(job.tokens)]
        self.queue.append(Run(ticket, job, answer, keys))

    def cancel(self, ticket: Ticket) -> None:
        """Takes a request out; what it held is free at once."""
        for run in [*self.queue, *self.active]:
            if run.ticket is ticket:
                with Held():
                    if run in self.queue:
                        self.queue.remove(run)
                    else:
                        self._leave(run, keep=False)
                return

    def finish(self, ticket: Ticket) -> None:
        """Ends a request that generates, with what it has so far."""
        for run in self.generating:
            if run.ticket is ticket:
                with Held():
                    try:
                        self._finish(run)
                    except Exception as err:
                        self._fail(run, err)
                        self._decode_again()
                return
        self.cancel(ticket)

    def step(self) -> list[Ticket]:
        """One decode. Returns the requests that have a new token or are over.

        After a Ctrl-C the next one goes on as if there had been none.
        """
        try:
            with Held():
                self._admit()
            if self.prompts and not (self.generating and self._generates_next):
                self._generates_next = True
                self._decode_prompts()
            elif self.generating:
                self._generates_next = False
                self._decode_generations()
        except BaseException:
            if self._is_doubtful:
                with Held():
                    self._decode_again()
            raise
        changed, self._changed = list(self._changed), {}
        return changed

    def close(self) -> None:
        for run in self.active:
            if run.generation is not None:
                run.generation.close()
        self.queue.clear()
        self.prompts.clear()
        self.generating.clear()
        self.session.close()

    # -- who may start -----------------------------------------------------------------

    def _admit(self) -> None:
        """Lets those in that wait, the first one first, as far as there is room. Who begins like a
        prompt that is being decoded waits until that is in the cache."""
        waiting: list[Run] = []
        while self.queue and len(self.active) < self._most:
            run = self.queue.popleft()
            most = self._most_shared(run.job)
            by_key = any(site.name in BY_KEY for site in run.job.sites)
            prefix = self.tracks.prefix(run.keys, 0 if self.isolated else most, with_cells=by_key)
            if self._begins_like_one_under_way(run, most, prefix.n):
                waiting.append(run)
                continue
            track = self.tracks.open(prefix, run.job.n_total)
            if track is None:
                waiting.append(run)
                if not self.active:
                    raise EngineError("a request needs more cells than a stream has")
                break
            self._start(run, track)
        self.queue.extendleft(reversed(waiting))

    @staticmethod
    def _most_shared(job: Job) -> int:
        """How many rows of a prompt need not be decoded for it: nothing is read of them."""
        read = (p for r in job.reads for p in r.positions)
        return min((len(job.tokens) - 1, *job.logit_positions, *read))

    def _begins_like_one_under_way(self, run: Run, most: int, n_cached: int) -> bool:
        if self.context.model.has_window or self.isolated:
            return False
        best = max((common(run.keys, other.keys) for other in self.prompts), default=0)
        return min(best, most) >= n_cached + limits.WAIT_ROWS

    def _start(self, run: Run, track: Track) -> None:
        job, shared = run.job, list(track.rows)
        run.track, run.rows, run.n_done = track, shared, len(shared)
        for p in range(len(shared), len(job.tokens)):
            parent = run.rows[-1] if run.rows else None
            run.rows.append(Row(job.tokens[p], p, job.edits_at.get(p, ()), parent))
        nodes = self.session.topology.sites
        note(job, run.rows, {s for s in job.sites if s in nodes and nodes[s].outputs_only})
        run.rows[-1].output = Output.LOGITS  # so that every block runs, and numbers are looked at
        for buffer in run.answer.buffers:
            if not buffer.read.positions:
                for site in buffer.read.sites:
                    buffer.array(site, self.session.site(site).read_shape(buffer.read.n_keys))
        self.prompts.append(run)
        self._refresh()

    def _refresh(self) -> None:
        """Tells the decoder whose edits and captures there are."""
        self._edits.clear()
        self._edits.update(sites_of_edits(run.job for run in self.active))
        self._buffers.clear()
        self._buffers.update((b.read, b) for run in self.active for b in run.answer.buffers)
        self._decoder.refresh()

    # -- decodes -------------------------------------------------------------------------

    def _decode_prompts(self) -> None:
        """A micro-batch of prompts, those that came first."""
        self._is_doubtful = True
        spans: list[tuple[Run, Span]] = []
        n_rows = n_outputs = 0
        max_rows = min(self._max_rows, limits.STREAM_ROWS) if self.is_hurried else self._max_rows
        for run in list(self.prompts):
            if spans and (run.alone or spans[-1][0].alone):
                break
            end = run.n_done
            while end < len(run.rows) and n_rows < max_rows and n_outputs < self._max_outputs:
                n_outputs += run.rows[end].output is not Output.NONE
                n_rows, end = n_rows + 1, end + 1
            if end == run.n_done:
                break
            spans.append((run, Span(self._branch(run), run.n_done, end)))
        batch = of_spans([span for _, span in spans])
        if not self._decode(batch, [run for run, _ in spans]):
            return
        b, failed = -1, False
        with Held():  # rows that are in the ledger have been read
            for run, span in spans:
                first, b = b + 1, b + span.end - span.first
                assert run.track is not None
                for row in span.rows:
                    self.tracks.add(run.track, row)
                run.n_done = span.end
                try:
                    self._read_prompt(run, span, first)
                except Exception as err:  # a metric's own ones too
                    self._fail(run, err)
                    failed = True
            if failed:
                self._decode_again()
            self._is_doubtful = False

    def _branch(self, run: Run) -> Branch:
        assert run.track is not None
        segment = Segment(run.rows, None, n_blocks=self.context.model.n_layer)
        return Branch(segment, None, run.track.sequence, False, 0, 0, 0, 0)

    def _read_prompt(self, run: Run, span: Span, first: int) -> None:
        """What follows from rows of a prompt that were decoded, from row `first` of the batch on."""
        for b, row in enumerate(span.rows, first):
            if row.logits:
                logits = self._decoder.logits(b)
                for _, i in row.logits:
                    run.answer.put_logits(i, logits)
        if span.end < len(run.rows):
            return
        last = first + span.end - span.first - 1
        run.alone = False
        if run.generation is not None:  # it was decoded again
            self._generate(run)
            return
        if not run.job.generates:
            self._decoder.logits(last)
            self._finish(run)
            return
        run.generation = Generation(run.answer, run.rows[-1], self.context)
        assert run.track is not None
        run.generation.sequence = run.track.sequence
        if self._choose(run, last):
            self._finish(run)
        else:
            self._generate(run)

    def _generate(self, run: Run) -> None:
        self.prompts.remove(run)
        self.generating.append(run)

    def _decode_generations(self) -> None:
        """One more token of as many requests as a batch holds; the others are next."""
        self._is_doubtful = True
        n = min(self._max_rows, self._max_outputs)
        runs = self.generating[:n]
        if len(self.generating) > n:
            self.generating = self.generating[n:] + runs
        batch = of_generations([run.generation for run in runs if run.generation is not None])
        if not self._decode(batch, runs):
            return
        failed = False
        with Held():
            for b, run in enumerate(runs):
                assert run.track is not None
                self.tracks.add(run.track, batch.rows[b])
                try:
                    if self._choose(run, b):
                        self._finish(run)
                except Exception as err:  # a metric's own ones too
                    self._fail(run, err)
                    failed = True
            if failed:
                self._decode_again()
            self._is_doubtful = False

    def _choose(self, run: Run, b: int) -> bool:
        """Chooses a request's next token from row b of the batch. True if it is the last."""
        assert run.generation is not None
        is_last = run.generation.choose(self._decoder.logits(b), b, self._scratch)
        self._changed[run.ticket] = None
        return is_last

    def _decode(self, batch: Batch, runs: Sequence[Run]) -> bool:
        """Decodes a batch of some requests. False if it failed, and what follows from it is done."""
        try:
            self._decoder.decode(batch)
            return True
        except Restart:  # a recurrent memory, whose requests run one at a time
            (run,) = runs
            run.n_restarts += 1
            if run.n_restarts >= ATTEMPTS:
                self._fail(run, always_new_graph())
        except Exception as err:  # an edit's function's own ones too
            if len(runs) == 1:
                self._fail(runs[0], err)
        with Held():
            self._decode_again(doubtful=True)
        return False

    # -- the end ---------------------------------------------------------------------------

    def _finish(self, run: Run) -> None:
        run.answer.finish(self.context.params.kv_type)
        self._leave(run, keep=not self.isolated)

    def _fail(self, run: Run, err: Exception) -> None:
        if not isinstance(err, MiaError):
            cause, err = err, EngineError(f"{type(err).__name__}: {err}")
            err.__cause__ = cause
        run.ticket.error = err
        self._leave(run, keep=False)

    def _leave(self, run: Run, *, keep: bool) -> None:
        (self.prompts if run in self.prompts else self.generating).remove(run)
        if run.generation is not None:
            run.generation.close()
        assert run.track is not None
        self.tracks.close(run.track, keep=keep)
        if self.isolated:
            self.context.clear(data=True)
        run.ticket.is_over = True
        self._changed[run.ticket] = None
        self._refresh()

    def _decode_again(self, *, doubtful: bool = False) -> None:
        """Wipes the cache, and has all that runs decoded again.

        Args:
            doubtful: each by itself.
        """
        self.context.clear(data=True)
        self._decoder.refresh()
        active = self.active
        done = {run: list(run.track.rows) for run in active if run.track is not None}
        self.tracks.clear()
        self.prompts, self.generating = [], []
        for run in active:
            rows: list[Row] = []
            for row in done[run]:
                rows.append(Row(row.token, row.pos, row.edits, rows[-1] if rows else None))
            rest = run.rows[len(rows) :]
            if rest and rows:
                rest[0].parent = rows[-1]
            run.rows, run.n_done, run.alone = rows + rest, 0, run.alone or doubtful
            if run.generation is not None:
                run.rows[-1].output = Output.LOGITS
                run.generation.row = run.rows[-1]
            self.prompts.append(run)
