"""Threads in which looks run. What they ask of the model joins the stream of the thread that has it.

A look is a function that calls methods; inside of it `Model.run` is `Look.run` (`mia.engine.delegate`). That
gives the requests to the scheduler, waits until they are over, and raises `Gone` when the client has
left meanwhile. A few of a look's requests are in the stream at a time, so that completions find room.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from mia.engine.delegate import delegated
from mia.engine.stream import Stream, Ticket
from mia.errors import EngineError, MiaError
from mia.progress import Progress
from mia.request import OnResult, OnToken, Request, Result

if TYPE_CHECKING:
    from mia.serve.scheduler import Scheduler

T = TypeVar("T")


class Gone(Exception):
    """The client has left."""


@dataclass(eq=False)
class Batch:
    """The requests of one `run` of a look. The thread that has the model alone changes it, but `news`.

    Attributes:
        todo: (index, request) of those that are not in the stream yet.
        tickets: ticket -> index of those that are.
        news: (index, tokens so far, whether it is over) as they come, or the error that ended all.
    """

    todo: deque[tuple[int, Request]]
    is_heard: bool
    tickets: dict[Ticket, int] = field(default_factory=dict)
    results: dict[int, Result] = field(default_factory=dict)
    is_over: bool = False
    news: queue.SimpleQueue[tuple[int, int, bool] | BaseException] = field(
        default_factory=queue.SimpleQueue
    )


class Look:
    """A client's look, in a thread of its own."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._batch: Batch | None = None
        self._error: BaseException | None = None

    def work(self, function: Callable[[], T]) -> T:
        """Runs the function, whose requests join the stream."""
        with delegated(self):
            return function()

    def leave(self, error: BaseException | None = None) -> None:
        """The client has left, or the server ends: the look ends at its next run, or in this one."""
        self._error = error or Gone()
        if (batch := self._batch) is not None:
            batch.news.put(self._error)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def run(
        self,
        requests: Sequence[Request],
        *,
        progress: Progress | None = None,
        on_result: OnResult | None = None,
        on_token: OnToken | None = None,
    ) -> list[Result]:
        """The results, in the order of the requests: see `Model.run`."""
        batch = Batch(deque(enumerate(requests)), is_heard=on_token is not None)
        self._batch = batch
        try:
            self.check()
            if not requests:
                return []
            self._scheduler.begin(batch)
            n_over, told = 0, [0] * len(requests)
            while n_over < len(requests):
                event = batch.news.get()
                if isinstance(event, BaseException):
                    raise event
                i, n_tokens, is_over = event
                if on_token is not None:
                    for k in range(told[i], n_tokens):
                        on_token(i, batch.results[i].tokens[k])
                    told[i] = n_tokens
                if not is_over:
                    continue
                n_over += 1
                if on_result is not None:
                    on_result(i, batch.results[i])
                if progress is not None:
                    progress(n_over, len(requests))
            return [batch.results[i] for i in range(len(requests))]
        finally:
            self._batch = None
            self._scheduler.end(batch)


class Batches:
    """Those that are under way, in the thread that has the model."""

    def __init__(self, most: int):
        """`most`: requests of all looks that are in the stream at a time."""
        self._most = most
        self._all: list[Batch] = []
        self._of: dict[Ticket, Batch] = {}

    def add(self, batch: Batch, stream: Stream) -> None:
        self._all.append(batch)
        self.feed(stream)

    def feed(self, stream: Stream) -> None:
        """Gives the stream more requests, of each batch in turn, as far as looks may have room."""
        while len(self._of) < self._most:
            batch = min(
                (b for b in self._all if b.todo), key=lambda b: len(b.tickets), default=None
            )
            if batch is None:
                return
            i, request = batch.todo.popleft()
            try:
                ticket = stream.add(request)
            except Exception as err:
                self.end(batch, stream, err)
                continue
            batch.tickets[ticket] = i
            batch.results[i] = ticket.result
            self._of[ticket] = batch

    def hear(self, ticket: Ticket, stream: Stream) -> bool:
        """A ticket has a new token or is over. False if it is of no look."""
        batch = self._of.get(ticket)
        if batch is None:
            return False
        if ticket.error is not None:
            self.end(batch, stream, ticket.error)
            return True
        if ticket.is_over or batch.is_heard:
            batch.news.put((batch.tickets[ticket], len(ticket.tokens), ticket.is_over))
        if ticket.is_over:
            del batch.tickets[ticket], self._of[ticket]
            if not (batch.tickets or batch.todo):
                self.end(batch, stream)
        return True

    def end(self, batch: Batch, stream: Stream | None, error: BaseException | None = None) -> None:
        """Nothing of a batch goes on."""
        if batch.is_over:
            return
        batch.is_over = True
        batch.todo.clear()
        if batch in self._all:
            self._all.remove(batch)
        tickets, batch.tickets = list(batch.tickets), {}
        for ticket in tickets:
            self._of.pop(ticket, None)
        if error is not None:
            batch.news.put(error if isinstance(error, MiaError) else _engine_error(error))
        if stream is not None:
            for ticket in tickets:
                stream.cancel(ticket)

    def end_all(self, error: MiaError) -> None:
        """The stream is closed."""
        for batch in list(self._all):
            self.end(batch, None, error)


def _engine_error(error: BaseException) -> EngineError:
    told = EngineError(f"{type(error).__name__}: {error}")
    told.__cause__ = error
    return told
