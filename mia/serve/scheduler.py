"""The thread that has the model: requests join its stream, and what they write goes back to the clients."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mia.engine.stream import Stream, Ticket, Usage
from mia.errors import EngineError, MiaError
from mia.serve.fields import Refused
from mia.serve.limits import Limits
from mia.serve.writing import Choice, Written, prompt_logprobs

if TYPE_CHECKING:
    from mia.model import Model

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """News of a choice: new text, new tokens; at its end the reason, and what was read of the run."""

    choice: Choice
    text: str = ""
    tokens: tuple[Written, ...] = ()
    finish_reason: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Completion:
    """All choices of one client's request."""

    def __init__(self, plan: Callable[[], list[Choice]]):
        """`plan` makes the choices, in the thread that has the model; to be made in an event loop."""
        self.plan = plan
        self.choices: list[Choice] = []
        self.tickets: dict[Ticket, Choice] = {}
        self.is_over = False
        self._loop = asyncio.get_running_loop()
        #: parts, an error, or None at the end
        self.events: asyncio.Queue[Part | MiaError | None] = asyncio.Queue()

    def send(self, event: Part | MiaError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def _nothing() -> None:
    """Wakes the thread up."""


class Scheduler:
    """Owns the model. What it is asked to do waits in a line and is done between two tokens."""

    def __init__(self, model: Model, limits: Limits, **stream: Any):
        """`stream`: options of `Model.stream`."""
        self.model, self.limits = model, limits
        self._options = stream
        self.stream: Stream = model.stream(**stream)
        self.longest = self.stream.longest
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._completions: dict[Ticket, Completion] = {}
        self._lock = threading.Lock()
        #: requests that are under way or wait, of all kinds
        self.pending = 0
        self.served = self.refused = self.cancelled = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="mia-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests."""
        self._stopping = True
        self._inbox.put(_nothing)
        if self._thread.is_alive():
            self._thread.join()

    # -- for the event loop ------------------------------------------------------------

    def submit(self, completion: Completion) -> None:
        """Raises `Refused` (503) if too many wait."""
        self._reserve()
        self._inbox.put(lambda: self._begin(completion))

    def cancel(self, completion: Completion) -> None:
        """The client has left."""
        self._inbox.put(lambda: self._cancel(completion))

    async def call(self, function: Callable[[], T], *, always: bool = False) -> T:
        """Runs a function in the thread that has the model. Raises `Refused` (503) if too many wait,
        except `always`."""
        if not always:
            self._reserve()
        future: Future[T] = Future()

        def run() -> None:
            try:
                self._check_open()
                if future.set_running_or_notify_cancel():
                    future.set_result(function())
            except BaseException as err:
                future.set_exception(err)
            finally:
                if not always:
                    self._release()

        self._inbox.put(run)
        return await asyncio.wrap_future(future)

    def usage(self) -> Usage:
        return self.stream.usage()

    # -- for the model's thread ----------------------------------------------------------

    def _check_open(self) -> None:
        if self._stopping:
            raise Refused("the server is stopping", status=503, code="server_stopping")

    def _reserve(self) -> None:
        self._check_open()
        with self._lock:
            if self.pending >= self.limits.waiting:
                self.refused += 1
                raise Refused(
                    f"{self.pending} requests wait already; try again later",
                    status=503,
                    code="server_busy",
                )
            self.pending += 1

    def _release(self) -> None:
        with self._lock:
            self.pending -= 1

    def _work(self) -> None:
        while not self._stopping:
            try:
                self._take_inbox()
                if self.stream.is_busy and not self._stopping:
                    self._step()
            except Exception as err:  # of the engine itself: nobody's request can go on
                self._start_again(err)
        self.stream.close()
        for completion in list(self._completions.values()):
            self._over(completion, EngineError("the server is stopping"))
        self._inbox.put(_nothing)
        self._take_inbox()  # who waits there hears of it too

    def _step(self) -> None:
        for ticket in self.stream.step():
            if (completion := self._completions.get(ticket)) is not None:
                self._tell(completion, ticket)

    def _take_inbox(self) -> None:
        """Does what waits; with nothing to decode, waits for something."""
        try:
            self._inbox.get(block=not self.stream.is_busy)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _begin(self, completion: Completion) -> None:
        if completion.is_over:
            return
        try:
            self._check_open()
            completion.choices = completion.plan()
            for choice in completion.choices:
                ticket = self.stream.add(choice.request)
                completion.tickets[ticket] = choice
                self._completions[ticket] = completion
        except MiaError as err:
            self._over(completion, err)
        except Exception as err:
            self._over(completion, EngineError(f"{type(err).__name__}: {err}"))

    def _cancel(self, completion: Completion) -> None:
        if not completion.is_over:
            self.cancelled += 1
            self._over(completion, None)

    def _over(self, completion: Completion, event: MiaError | None) -> None:
        """Nothing of a request goes on."""
        if completion.is_over:
            return
        completion.is_over = True
        for ticket in completion.tickets:
            self.stream.cancel(ticket)
            self._completions.pop(ticket, None)
        if event is not None:
            completion.send(event)
        completion.send(None)
        self._release()

    def _start_again(self, err: Exception) -> None:
        failed = EngineError(f"the engine failed: {err}")
        completions = list(dict.fromkeys(self._completions.values()))
        self.stream.close()
        self.stream = self.model.stream(**self._options)
        for completion in completions:
            completion.tickets.clear()
            self._over(completion, failed)
        self._completions.clear()

    def _tell(self, completion: Completion, ticket: Ticket) -> None:
        """What a step has changed for one ticket goes to its client."""
        choice = completion.tickets[ticket]
        if ticket.error is not None:
            self._over(completion, ticket.error)
            return
        try:
            part = self._part(choice, ticket)
        except MiaError as err:
            self._over(completion, err)
            return
        except Exception as err:  # of this request's answer: the others go on
            self._over(completion, EngineError(f"{type(err).__name__}: {err}"))
            return
        completion.send(part)
        if choice.finish_reason is not None:
            self._completions.pop(ticket, None)
            if all(c.finish_reason is not None for c in completion.choices):
                self.served += 1
                self._over(completion, None)

    def _part(self, choice: Choice, ticket: Ticket) -> Part:
        request, result = ticket.request, ticket.result
        if choice.prompt_logprobs is None and request.metric is not None:
            choice.prompt_logprobs = prompt_logprobs(choice, result)
        text, tokens = "", list[Written]()
        while len(choice.tokens) < len(result.tokens) and choice.finish_reason is None:
            i = len(choice.tokens)
            token = result.tokens[i]
            logprob = result.logprobs[i] if request.logprobs else None
            written = Written(
                token, logprob, result.top_logprobs[i] if request.top_logprobs else ()
            )
            ends = request.stop_at_eog and self.model.ends_turn(token)
            text += choice.push(written, self.model.token_bytes(token), ends_turn=ends)
            tokens.append(written)
        if ticket.is_over and choice.finish_reason is None:
            text += choice.end("length")
        if choice.finish_reason is None:
            return Part(choice, text, tuple(tokens))
        self.stream.finish(ticket)  # a stop text may have ended it
        if ticket.error is not None:
            raise ticket.error
        extra = choice.reads.document(result, choice.prompt)
        return Part(choice, text, tuple(tokens), choice.finish_reason, extra)
