"""Ctrl-C while the library works: kept, and raised when it has returned.

The library calls back into Python: for its log, for the nodes of a graph, for its progress. Python
runs signal handlers there, and ctypes can only print what they raise, so that a Ctrl-C would be
lost. Within a `Held` block the handlers' exceptions are kept instead; `stop` can tell the
library to end early, and leaving the block raises what was kept.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

try:  # signal's own functions make enums of their answers, which takes ten times as long
    from _signal import (  # type: ignore[import-not-found, unused-ignore]
        getsignal,
        signal as set_signal,
    )
except ImportError:
    from signal import getsignal, signal as set_signal

_SIGNALS = int(signal.SIGINT), int(signal.SIGTERM)


class Held:
    """A block in which signals raise nothing until its end.

    Attributes:
        error: what the first handler raised.
    """

    def __init__(self, stop: Callable[[BaseException], None] | None = None):
        self.error: BaseException | None = None
        self._stop = stop
        self._old: list[tuple[int, Any]] = []

    def __enter__(self) -> Held:
        if threading.current_thread() is threading.main_thread():  # the only one that gets signals
            for number in _SIGNALS:
                old = getsignal(number)
                if callable(old):  # not the default action, nor ignored
                    self._old.append((number, old))
                    set_signal(number, self._handler(old))
        return self

    def _handler(self, old: Callable[..., Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                old(number, frame)
            except BaseException as err:
                if self.error is None:
                    self.error = err
                if self._stop is not None:
                    self._stop(err)

        return handle

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, old in self._old:
            set_signal(number, old)
        self._old.clear()
        if self.error is not None and err is None:
            raise self.error
