"""The thread that has the model: requests join its stream, and what they write goes back to the clients."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mia.engine import limits as engine_limits
from mia.engine.stream import Stream, Ticket, Usage
from mia.errors import EngineError, MiaError
from mia.serve.fields import Refused
from mia.serve.limits import Limits
from mia.serve.workers import Batch, Batches, Look
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


def _stopping() -> Refused:
    return Refused("the server is stopping", status=503, code="server_stopping")


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
        side_by_side = stream.get("n_requests") or engine_limits.STREAM_REQUESTS
        self._batches = Batches(max(1, side_by_side // 2))
        self._pool = ThreadPoolExecutor(limits.looks, thread_name_prefix="mia-look")
        self._aside = ThreadPoolExecutor(limits.looks, thread_name_prefix="mia-aside")
        self._looks: set[Look] = set()
        self._lock = threading.Lock()
        #: requests that are under way or wait, of all kinds
        self.pending = 0
        self.served = self.refused = self.cancelled = 0
        self._stopping = self._closed = False
        self._thread = threading.Thread(target=self._work, name="mia-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests. Waits for what looks compute at the moment."""
        self._stopping = True
        self._inbox.put(_nothing)
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            looks = list(self._looks)
        for look in looks:
            look.leave(_stopping())
        for pool in (self._pool, self._aside):
            pool.shutdown(cancel_futures=True)

    # -- for the event loop ------------------------------------------------------------

    def submit(self, completion: Completion) -> None:
        """Raises `Refused` (503) if too many wait."""
        self._reserve()
        try:
            self._post(lambda: self._begin(completion))
        except Refused:
            self._release()
            raise

    def cancel(self, completion: Completion) -> None:
        """The client has left."""
        with contextlib.suppress(Refused):
            self._post(lambda: self._cancel(completion))

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

        try:
            self._post(run)
        except Refused:
            if not always:
                self._release()
            raise
        return await asyncio.wrap_future(future)

    async def aside(self, function: Callable[[], T]) -> T:
        """Runs a function that needs no more of the model than its vocabulary. Raises `Refused` (503)
        if too many wait."""
        self._reserve()
        return await self._in_thread(self._aside, function)

    async def look(self, function: Callable[[], T]) -> T:
        """Runs a function in a thread beside the model's; its runs join the stream. When who waits
        for it is cancelled, it ends. Raises `Refused` (503) if too many wait."""
        self._reserve()
        look = Look(self)
        with self._lock:
            self._looks.add(look)

        def over() -> None:
            with self._lock:
                self._looks.discard(look)

        try:
            return await self._in_thread(self._pool, lambda: look.work(function), over)
        finally:
            look.leave()

    async def _in_thread(
        self,
        pool: ThreadPoolExecutor,
        function: Callable[[], T],
        over: Callable[[], None] = _nothing,
    ) -> T:
        """What was reserved is released, and `over` called, when the function has ended, or was taken out
        of the line before it began."""
        # a pool's line keeps what was taken out until a thread comes to it: nothing of a client may stay
        waiting = [function]

        def ended(_: object) -> None:
            waiting.clear()
            over()
            self._release()

        try:
            future = pool.submit(lambda: waiting.pop()())
        except RuntimeError:  # the pool is shut down
            ended(None)
            raise _stopping() from None
        del function
        future.add_done_callback(ended)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._stopping and future.cancelled():
                raise _stopping() from None
            raise

    # -- for looks, in their threads -----------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """Some requests join the stream."""
        self._post(lambda: self._batches.add(batch, self.stream))

    def end(self, batch: Batch) -> None:
        """Takes out what is left of them."""
        if not batch.is_over:
            with contextlib.suppress(Refused):
                self._post(lambda: self._batches.end(batch, self.stream))

    def usage(self) -> Usage:
        return self.stream.usage()

    # -- for the model's thread ----------------------------------------------------------

    def _post(self, task: Callable[[], None]) -> None:
        """Has something done in the model's thread. Raises `Refused` where that has ended."""
        with self._lock:
            if self._closed:
                raise _stopping()
            self._inbox.put(task)

    def _check_open(self) -> None:
        if self._stopping:
            raise _stopping()

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
        for known in ("topology", "unfused_topology", "lens"):
            with contextlib.suppress(MiaError):  # who asks for it is told why there is none
                getattr(self.model, known)  # so that no look waits for its turn to find out
        while not self._stopping:
            try:
                self._take_inbox()
                if self._stopping:
                    break
                self._batches.feed(self.stream)  # who left has made room
                if self.stream.is_busy:
                    self._step()
            except Exception as err:  # of the engine itself: nobody's request can go on
                self._start_again(err)
        self.stream.close()
        for completion in list(self._completions.values()):
            self._over(completion, _stopping())
        with self._lock:
            self._closed = True
        self._inbox.put(_nothing)
        self._take_inbox()  # who waits there hears of it too
        self._batches.end_all(_stopping())

    def _step(self) -> None:
        for ticket in self.stream.step():
            if self._batches.hear(ticket, self.stream):
                continue
            if (completion := self._completions.get(ticket)) is not None:
                self._tell(completion, ticket)
        self._batches.feed(self.stream)

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
        self._batches.end_all(failed)
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
