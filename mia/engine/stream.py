"""A run that stays open: requests join between tokens, each with its own edits, and leave.

    with model.stream() as stream:
        ticket = stream.add(Request(model.ids("The capital of France is"), n_predict=8))
        while not ticket.is_over:
            for changed in stream.step():
                print(model.piece(changed.tokens[-1]))

Each `step` is one decode of each lane that has work: the requests of one context (`lane.py`). Requests that
read or edit attention patterns have a lane of their own where others use fused attention, and those
whose edits are so large that their numbers may not stay finite run one at a time (`is_tame`), as do all
of a model with a recurrent memory. Steering runs in the callback: llama.cpp's control vector would
steer everyone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mia.edits import Edit
from mia.engine import limits
from mia.engine.checks import check_sites, check_tokens
from mia.engine.jobs import Job, resolve
from mia.engine.lane import Lane, Ticket as Ticket
from mia.errors import RangeError, UsageError
from mia.request import Request, Result
from mia.sites import BY_KEY, Site

if TYPE_CHECKING:
    from mia.engine.run import Engine

#: Up to this size nothing that an edit writes can overflow in a model that takes the norm of it
_TAME = 1e5
#: and a site may be scaled by so much
_TAME_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a stream holds now.

    Attributes:
        cells: of requests that run, with what is promised to them; kept_cells: of prefixes that stay.
        sequences, kept_sequences: the same of sequences.
        running, waiting: requests.
        budget: cells that there are, in all lanes that are open.
        saved: tokens of prefixes that were copied out of the cache.
    """

    cells: int
    kept_cells: int
    sequences: int
    kept_sequences: int
    running: int
    waiting: int
    budget: int
    saved: int = 0


def is_tame(edit: Edit, site: Site) -> bool:
    """Whether an edit cannot make numbers that are not finite, wherever the model goes from there."""
    if site.kind.by_key:
        return True  # a softmax comes behind it, or lies before it; `patterns.py` checks the rest
    if site.name == "logits" or edit.op in ("zero", "project_out"):
        return True
    if not isinstance(edit.op, str):
        return bool(getattr(edit.op, "is_tame", False))  # a function
    coeff = float(np.abs(edit.coeff).max())
    if edit.value is None:
        return coeff <= _TAME_SCALE
    size = float(np.abs(np.asarray(edit.value, np.float64)).max(initial=0))
    return max(coeff, 1.0) * size <= _TAME and (edit.op != "blend" or coeff <= _TAME_SCALE)


class Stream:
    """An open run of one model. Its methods may be called from several threads, which take turns."""

    def __init__(
        self,
        engine: Engine,
        prepare: Callable[[Request], Request],
        *,
        cells: int | None = None,
        n_requests: int | None = None,
    ):
        """`prepare` adds to a request what the model adds to every run."""
        model = engine.model
        cell_bytes = 4 * model.n_layer * model.n_embd * model.n_head_kv // max(model.n_head, 1)
        if cells is None:
            cells = max(1, min(limits.STREAM_CELLS, limits.KV_BYTES // max(cell_bytes, 1)))
        n_requests = limits.STREAM_REQUESTS if n_requests is None else n_requests
        most = limits.MAX_SEQUENCES - limits.STREAM_KEPT
        if cells < 1:
            raise UsageError(f"a stream of {cells} cells; it needs at least one")
        if not 1 <= n_requests <= most:
            raise UsageError(f"a stream runs 1 to {most} requests side by side, not {n_requests}")
        self._engine, self._prepare = engine, prepare
        self._cells, self._n_requests = cells, n_requests
        #: (fused attention, isolated) -> the lane
        self._lanes: dict[tuple[bool, bool], Lane] = {}
        #: what steps have changed and nobody has heard of yet
        self._changed: list[Ticket] = []
        self._closed = False

    @property
    def longest(self) -> int:
        """The most tokens of one request, with what it generates."""
        return min(self._engine.n_ctx, self._cells)

    def add(self, request: Request) -> Ticket:
        """Adds a request. It starts at a coming `step`.

        Raises `UsageError`, `SiteError` or `RangeError` if it does not fit the model or the stream.
        """
        if not isinstance(request, Request):
            raise UsageError("a stream takes one Request at a time")
        request = self._prepare(request)
        with self._engine.turn():
            self._check_open()
            job = resolve(0, request, self._engine.model.n_layer)
            n_vocab = self._engine.model.n_vocab
            check_tokens([job], n_ctx=self._engine.n_ctx, n_vocab=n_vocab)
            if job.n_total > self._cells:
                raise RangeError(
                    f"a request of {job.n_total} tokens, those to generate counted, is longer than the "
                    f"{self._cells} cells of the stream"
                )
            lane = self._lane_for(job)
            check_sites(lane.session, [job])
            ticket = Ticket(request, Result())
            lane.add(job, ticket)
            return ticket

    def finish(self, ticket: Ticket) -> None:
        """Ends a request before all its tokens are generated; its result has what there is by now."""
        with self._engine.turn():
            for lane in self._lanes.values():
                if not ticket.is_over:
                    lane.finish(ticket)
            ticket.is_over = True

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request; what it held is free at once. Nothing happens if it is over."""
        with self._engine.turn():
            if ticket.is_over:
                return
            for lane in self._lanes.values():
                lane.cancel(ticket)
            ticket.is_over = ticket.cancelled = True

    def step(self) -> list[Ticket]:
        """One decode of each lane that has work. Returns the requests that have a new token or are
        over."""
        with self._engine.turn():
            self._check_open()
            generates = any(lane.generating for lane in self._lanes.values())
            for lane in self._lanes.values():
                lane.is_hurried = generates
                if lane.is_busy:
                    self._changed += lane.step()
            changed, self._changed = self._changed, []
            return changed

    @property
    def is_busy(self) -> bool:
        """Whether any request is not over."""
        return any(lane.is_busy for lane in self._lanes.values())

    def usage(self) -> Usage:
        """Cells, sequences and requests in use."""
        with self._engine.turn():
            lanes = list(self._lanes.values())
            tracks = [lane.tracks for lane in lanes]
            live = sum(t.held_by(t.live) + t.promised for t in tracks)
            return Usage(
                cells=live,
                kept_cells=sum(t.used - t.held_by(t.live) for t in tracks),
                sequences=sum(len(t.live) for t in tracks),
                kept_sequences=sum(len(t.kept) for t in tracks),
                running=sum(len(lane.active) for lane in lanes),
                waiting=sum(len(lane.queue) for lane in lanes),
                budget=sum(t.budget for t in tracks),
                saved=sum(len(s.keys) for t in tracks for s in t.saved),
            )

    def close(self) -> None:
        """Ends all requests and frees the contexts."""
        with self._engine.turn():
            self._closed = True
            for lane in self._lanes.values():
                for run in [*lane.queue, *lane.active]:
                    run.ticket.is_over = run.ticket.cancelled = True
                lane.close()
            self._lanes.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the stream is closed")

    def _lane_for(self, job: Job) -> Lane:
        by_key = any(site.name in BY_KEY for site in job.sites)
        flash = self._engine.fuses and not by_key
        isolated = self._engine.model.recurrent or not all(is_tame(e, s) for e, s in job.edits)
        lane = self._lanes.get((flash, isolated))
        if lane is None:
            n_sequences = 1 if isolated else self._n_requests + limits.STREAM_KEPT
            session = self._engine.sessions.apart().get(
                callback=True, flash=flash, n_cells=self._cells, n_sequences=n_sequences
            )
            session.context.clear()
            lane = self._lanes[flash, isolated] = Lane(
                session,
                cells=self._cells,
                n_requests=self._n_requests,
                isolated=isolated,
                saves=flash == self._engine.fuses,  # the other one is for patterns, read by cell
            )
        return lane
