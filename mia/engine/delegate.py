"""Runs that another thread makes.

Inside `delegated(to)` `Model.run` hands its requests to `to.run` and gives back what that returns. A
server uses it: methods run in threads of their own, and all their requests join the stream of the
one thread that has the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from mia.progress import Progress
from mia.request import OnResult, OnToken, Request, Result


class Delegate(Protocol):
    """Who runs requests in the place of `Model.run`."""

    def run(
        self,
        requests: Sequence[Request],
        *,
        progress: Progress | None = None,
        on_result: OnResult | None = None,
        on_token: OnToken | None = None,
    ) -> list[Result]: ...

    def check(self) -> None:
        """Raises what ends the work, if nobody waits for it any more."""


_delegate: ContextVar[Delegate | None] = ContextVar("delegate", default=None)


@contextmanager
def delegated(to: Delegate) -> Iterator[None]:
    """Inside of it `Model.run` is `to.run`, in this thread."""
    token = _delegate.set(to)
    try:
        yield
    finally:
        _delegate.reset(token)


def delegate() -> Delegate | None:
    """Who runs this thread's requests, if it is not the engine."""
    return _delegate.get()


def check() -> None:
    """Called within long work that is no run: ends it if nobody waits for it any more."""
    if (other := _delegate.get()) is not None:
        other.check()
