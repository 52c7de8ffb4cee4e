"""`Model.run` from top to bottom: requests in, results out. Start reading here."""

from __future__ import annotations

from collections.abc import Sequence

from mia.arrays import Array
from mia.engine import limits
from mia.engine.checks import check_sites, check_tokens
from mia.engine.control_vector import directions, shared_edits
from mia.engine.decode import ATTEMPTS, Restart, always_new_graph
from mia.engine.graph import Topology
from mia.engine.jobs import Job, resolve
from mia.engine.plan import build
from mia.engine.runner import Runner
from mia.engine.session import Session, Sessions
from mia.llama import LlamaModel
from mia.progress import Progress
from mia.request import Request, Result
from mia.sites import BY_KEY, Site


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
        self.sessions = Sessions(model, kv_type=kv_type, threads=threads)

    def run(self, requests: Sequence[Request], *, progress: Progress | None = None) -> list[Result]:
        """The results, in the order of the requests. See `Model.run`."""
        if not requests:
            return []
        model = self._model
        # 1. Requests become jobs: sites parsed, indices resolved. If all of them are steered
        #    alike, llama.cpp's control vector does it, and the jobs have no edits left.
        steering = shared_edits(requests, model.n_layer)
        edits = () if steering else None
        jobs = [resolve(i, r, model.n_layer, edits) for i, r in enumerate(requests)]
        check_tokens(jobs, n_ctx=self._n_ctx, n_vocab=model.n_vocab)
        vector = None
        if steering:
            vector = directions(steering, n_layer=model.n_layer, n_embd=model.n_embd)
        # 2. The jobs are planned and decoded: together, or one by one if the memory is a
        #    state that cannot be cut back to a shared prefix.
        task = _Task(self, {s for job in jobs for s in job.sites}, vector, progress, len(jobs))
        if model.recurrent:
            return [task.run_alone(job) for job in jobs]
        return task.run(jobs, share=True)

    def topology(self, *, fused: bool = True) -> Topology:
        """The graph of this model. With `fused` False it has the attention patterns too."""
        return self.sessions.get(callback=True, flash=fused and self._flash).topology

    def session_for(self, sites: set[Site], *, n_cells: int, n_sequences: int) -> Session:
        """A session that can edit and capture at `sites`. Attention patterns are nodes only
        if attention is not fused; without sites there is no callback."""
        flash = self._flash and not any(site.name in BY_KEY for site in sites)
        return self.sessions.get(
            callback=bool(sites), flash=flash, n_cells=n_cells, n_sequences=n_sequences
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
        self.sessions.close()


class _Task:
    """What is the same for all jobs of one call of `Engine.run`."""

    def __init__(
        self,
        engine: Engine,
        sites: set[Site],
        vector: Array | None,
        progress: Progress | None,
        n_jobs: int,
    ):
        self._engine, self._sites, self._vector = engine, sites, vector
        self._progress, self._n_jobs, self._n_done = progress, n_jobs, 0

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
        n_sequences = limits.MAX_SEQUENCES if share and len(jobs) > 1 else 1
        session = self._engine.session_for(self._sites, n_cells=budget, n_sequences=n_sequences)
        context = session.context
        output_sites: set[Site] = set()
        if self._sites:
            check_sites(session, jobs)
            nodes = session.topology.sites
            output_sites = {s for s in self._sites if s in nodes and nodes[s].outputs_only}
        # 4. The plan: which rows are decoded once, and which segments may skip blocks.
        segments = build(
            jobs,
            share=share,
            n_layer=context.model.n_layer,
            n_ubatch=context.params.n_ubatch,
            skip_blocks=any(job.edits for job in jobs),
            output_sites=output_sites,
        )
        # 5. The runner decodes segment after segment; the answers fill.
        runner = Runner(session, jobs, budget=budget, n_sequences=n_sequences, on_done=self._count)
        context.set_control_vector(self._vector)
        try:
            runner.run(segments)
        except BaseException:
            context.clear(data=True)  # see finite.py
            raise
        finally:
            runner.close()
        return [answer.result for answer in runner.answers.values()]

    def _count(self) -> None:
        self._n_done += 1
        if self._progress is not None:
            self._progress(self._n_done, self._n_jobs)
