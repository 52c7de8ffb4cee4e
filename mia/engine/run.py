"""`Model.run` from top to bottom: requests in, results out. Start reading here."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mia.arrays import Array
from mia.engine import limits
from mia.engine.answers import Answer
from mia.engine.checks import check_sites, check_tokens
from mia.engine.control_vector import directions, shared_edits
from mia.engine.decode import ATTEMPTS, Restart, always_new_graph
from mia.engine.delegate import delegate
from mia.engine.dry import Count, DryRunner, no_logits
from mia.engine.finite import may_spoil, unread_edits
from mia.engine.graph import Topology
from mia.engine.jobs import Job, TokenLogits, may_read_few, resolve
from mia.engine.kept import stops_at_inputs
from mia.engine.plan import build
from mia.engine.runner import Runner
from mia.engine.session import Session, Sessions
from mia.errors import MiaError, UsageError
from mia.llama import LlamaModel
from mia.progress import Progress
from mia.request import OnResult, OnToken, Request, Result
from mia.sites import BY_KEY, Site

if TYPE_CHECKING:
    from mia.engine.stream import Stream

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _turns_of_a_child() -> None:
    """In a forked process: a thread that had the turn does not exist there."""
    for engine in _engines:
        if not engine._is_inside:
            engine._turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turns_of_a_child)


class Engine:
    """Runs requests on one model, computing shared work once."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        kv_type: str,
        threads: int,
        flash: bool | None = None,
    ):
        """`n_ctx`: the most tokens of one request; `flash`: fused attention, by
        default on, except with an f32 cache, whose keys and values it would round to f16."""
        self._model, self._n_ctx = model, n_ctx
        self._flash = kv_type != "f32" if flash is None else flash
        #: blocks in which llama.cpp's control vector is an edit at the end (`Model.site_checks`)
        self.blocks_with_vector: Collection[int] = range(1, model.n_layer)
        #: logits of a few tokens from the final norm's rows, if the model's are known to be that
        self.token_logits: TokenLogits | None = None
        self.sessions = Sessions(model, kv_type=kv_type, threads=threads)
        # The lock of the threads' turns is all that says who is inside: Ctrl-C can fall between any two
        # lines of Python, and a note of ours would stay.
        self._turn = threading.RLock()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        _engines.add(self)

    @property
    def model(self) -> LlamaModel:
        return self._model

    @property
    def n_ctx(self) -> int:
        """The most tokens of one request."""
        return self._n_ctx

    def run(
        self,
        requests: Sequence[Request],
        *,
        progress: Progress | None = None,
        on_result: OnResult | None = None,
        on_token: OnToken | None = None,
        count: Count | None = None,
    ) -> list[Result]:
        """The results, in the order of the requests. See `Model.run`.

        Args:
            count: decode nothing, and note here what would be (`mia.engine.dry`).
        """
        self._check_outside()
        with self._turn:
            listeners = _Listeners(progress, on_result, on_token, len(requests))
            return self._run(requests, listeners, count) if requests else []

    def _run(
        self, requests: Sequence[Request], listeners: _Listeners, count: Count | None
    ) -> list[Result]:
        self._check_open()
        model = self._model
        # 1. Requests become jobs: sites parsed, indices resolved. If all of them are steered
        #    alike, llama.cpp's control vector does it, and the jobs have no edits left.
        steering = shared_edits(requests, model.n_layer, self.blocks_with_vector)
        edits = () if steering else None
        few = self.token_logits if may_read_few(requests, model.n_layer) else None
        if few is not None and count is not None:
            few = no_logits
        jobs = [resolve(i, r, model.n_layer, edits, few) for i, r in enumerate(requests)]
        check_tokens(jobs, n_ctx=self._n_ctx, n_vocab=model.n_vocab)
        vector = None
        if steering:
            vector = directions(steering, n_layer=model.n_layer, n_embd=model.n_embd)
        # 2. The jobs are planned and decoded: together, or one by one if the memory is a
        #    state that cannot be cut back to a shared prefix.
        task = _Task(self, {s for job in jobs for s in job.sites}, vector, listeners, count)
        if model.recurrent:
            return [task.run_alone(job) for job in jobs]
        return task.run(jobs, share=True)

    def stream(self, prepare: Callable[[Request], Request], **options: Any) -> Stream:
        """A run that stays open, of requests as `prepare` leaves them. See `Model.stream`."""
        from mia.engine.stream import Stream

        stream = Stream(self, prepare, **options)
        self._streams.add(stream)
        return stream

    def topology(self, *, fused: bool = True) -> Topology:
        """The graph of this model. With `fused` False it has the attention patterns too."""
        flash = fused and self._flash
        if self._is_inside and (session := self.sessions.open.get((True, flash))) is not None:
            return session.topology  # asked by a callback of a run: the graph is known
        if delegate() is not None and (known := self.sessions.topologies.get(flash)) is not None:
            return known  # a thread beside the model's, which need not wait for its turn
        self._check_outside()
        with self._turn:
            self._check_open()
            topology = self.sessions.get(callback=True, flash=flash).topology
            self.sessions.topologies[flash] = topology
            return topology

    def _check_open(self) -> None:
        if not self._model.handle:
            raise UsageError("the model is closed")

    @property
    def fuses(self) -> bool:
        """Whether runs that read no attention patterns use fused attention."""
        return self._flash

    def session_for(
        self, sites: set[Site], jobs: Sequence[Job], *, n_cells: int, n_sequences: int
    ) -> Session:
        """A session for these jobs that can edit and capture at `sites`. Attention patterns are
        nodes only if attention is not fused; without sites there is no callback."""
        flash = self._flash and not any(site.name in BY_KEY for site in sites)
        return self.sessions.get(
            callback=bool(sites),
            flash=flash,
            n_cells=n_cells,
            n_sequences=n_sequences,
            stops=stops_at_inputs(jobs, self._model.n_layer),
        )

    def budget(self, jobs: Sequence[Job]) -> int:
        """Cells to run in: enough for the longest job, more if jobs can run side by side."""
        longest = max(job.n_total for job in jobs)
        if self._model.recurrent:
            return longest + 1
        m = self._model
        cell_bytes = 4 * m.n_layer * m.n_embd * m.n_head_kv // max(m.n_head, 1)
        most = min(
            max(limits.CELLS_PER_EMBD * m.n_embd, limits.MIN_CELLS),
            max(limits.KV_BYTES // cell_bytes, 1),
        )
        return max(longest, min(sum(job.n_total for job in jobs), most)) + 1

    def close(self) -> None:
        """Frees the contexts and the model, after the run that is under way."""
        self._check_outside()
        for stream in list(self._streams):
            stream.close()
        with self._turn:
            self.sessions.close()
            self._model.close()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """This thread's turn. Raises `UsageError` inside a run, which it would wait for."""
        self._check_outside()
        with self._turn:
            yield

    @property
    def _is_inside(self) -> bool:
        """Whether this thread is in a run already, and a metric or an edit's function asks."""
        return bool(self._turn._is_owned())  # type: ignore[attr-defined]

    def _check_outside(self) -> None:
        """Waiting for one's own run would never end."""
        if self._is_inside:
            raise UsageError(
                "the model is in the middle of a run: a metric, an edit's function, a hook or a "
                "progress callback cannot run or close it; do that when the run is over"
            )


class _Listeners:
    """Who is told of each token and each result as it comes."""

    def __init__(
        self,
        progress: Progress | None,
        on_result: OnResult | None,
        on_token: OnToken | None,
        n_jobs: int,
    ):
        self._progress, self._on_result, self._on_token = progress, on_result, on_token
        self._n_jobs = n_jobs
        self._told: set[int] = set()
        #: for each request how many of its tokens were told
        self._n_tokens: Counter[int] = Counter()

    def hear_token(self, job: Job, tokens: Sequence[int]) -> None:
        """A job that is run again chooses the same tokens: each is told once."""
        if self._on_token is not None and len(tokens) > self._n_tokens[job.index]:
            self._n_tokens[job.index] += 1
            self._on_token(job.index, tokens[-1])

    def hear(self, answer: Answer) -> None:
        """Of a job that runs again nobody is told a second time."""
        index = answer.job.index
        if index in self._told:
            return
        if self._on_result is not None:
            self._on_result(index, answer.result)  # may raise, and is told again then
        self._told.add(index)
        if self._progress is not None:
            self._progress(len(self._told), self._n_jobs)


class _Task:
    """What is the same for all jobs of one call of `Engine.run`."""

    def __init__(
        self,
        engine: Engine,
        sites: set[Site],
        vector: Array | None,
        listeners: _Listeners,
        count: Count | None,
    ):
        self._engine, self._sites, self._vector = engine, sites, vector
        self._listeners, self._counted = listeners, count

    def run_alone(self, job: Job) -> Result:
        """For memories that cannot share or cut prefixes: one whole sequence at a time."""
        for _ in range(ATTEMPTS):
            try:
                return self.run([job], share=False)[0]
            except Restart:
                pass  # the graph is known now
        raise always_new_graph()

    def run(self, jobs: Sequence[Job], *, share: bool) -> list[Result]:
        """Steps 3 to 5. `share`: whether jobs may have rows in common."""
        # 3. A context that is large enough, and whether the jobs fit its graph.
        budget = self._engine.budget(jobs)
        n_vocab = self._engine._model.n_vocab
        n_sequences = limits.sequences(len(jobs), n_vocab) if share else 1
        session = self._engine.session_for(
            self._sites, jobs, n_cells=budget, n_sequences=n_sequences
        )
        context = session.context
        output_sites: set[Site] = set()
        if self._sites:
            check_sites(session, jobs)
            nodes = session.topology.sites
            output_sites = {s for s in self._sites if s in nodes and nodes[s].outputs_only}
        # 4. The plan: which rows are decoded once, and which segments may skip blocks.
        has_residuals = any(job.edits for job in jobs) and session.topology.has_residuals
        for skip_blocks in (True, False) if has_residuals else (False,):
            segments = build(
                jobs,
                share=share,
                n_layer=context.model.n_layer,
                n_ubatch=context.params.n_ubatch,
                skip_blocks=skip_blocks,
                has_window=context.model.has_window,
                output_sites=output_sites,
            )
            if all(s.sequences <= n_sequences for s in segments):
                break
        else:
            if len(jobs) > 1:
                middle = len(jobs) // 2  # too many forks of forks for one run
                return [
                    *self.run(jobs[:middle], share=True),
                    *self.run(jobs[middle:], share=True),
                ]
        # 5. The runner decodes segment after segment; the answers fill.
        runner = self._runner(session, jobs, budget=budget, n_sequences=n_sequences)
        context.set_control_vector(self._vector)
        if session.unread_edits:
            context.clear(data=True)  # see finite.py
        session.unread_edits = unread_edits(jobs)
        apart = list[Job]()
        try:
            runner.run(segments)
        except BaseException as err:
            context.clear(data=True)  # see finite.py
            if isinstance(err, MiaError) and len(jobs) > 1:
                apart = [job for job in jobs if may_spoil(job)]
            if not apart:
                raise
        finally:
            runner.close()
        if apart:
            return self._run_apart(jobs, apart)
        return [answer.result for answer in runner.answers.values()]

    def _run_apart(self, jobs: Sequence[Job], apart: Sequence[Job]) -> list[Result]:
        """Runs some jobs by themselves: what their edits left unseen may have spoilt the others."""
        rest = [job for job in jobs if job not in apart]
        results = dict(zip(rest, self.run(rest, share=True), strict=True)) if rest else {}
        results.update((job, self.run([job], share=True)[0]) for job in apart)
        return [results[job] for job in jobs]

    def _runner(
        self, session: Session, jobs: Sequence[Job], *, budget: int, n_sequences: int
    ) -> Runner:
        how: dict[str, Any] = {
            "budget": budget,
            "n_sequences": n_sequences,
            "on_done": self._listeners.hear,
            "on_token": self._listeners.hear_token,
        }
        if self._counted is None:
            return Runner(session, jobs, **how)
        return DryRunner(self._counted, session, jobs, **how)
