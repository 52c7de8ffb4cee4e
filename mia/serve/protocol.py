"""Where uvicorn would wait: for a request's head forever, and at its end for streams that go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class WebServer(uvicorn.Server):
    """Says when it answers, and ends all requests before it waits for them."""

    def __init__(
        self, config: uvicorn.Config, *, ready: Callable[[], None], end: Callable[[], None]
    ):
        super().__init__(config)
        self._ready, self._end = ready, end

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._ready()  # from here on Ctrl-C ends it in good order

    async def shutdown(self, sockets: Any = None) -> None:
        ending = asyncio.ensure_future(asyncio.to_thread(self._end))
        await asyncio.wait({ending}, timeout=2)  # a long look may be under way
        await super().shutdown(sockets)


def http_protocol(seconds: float) -> type[H11Protocol]:
    """HTTP of uvicorn, where the head of a request has to come within so many seconds."""

    class Protocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._wait()  # a part of a head
            else:
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._waiting is None:
                self._waiting = self.loop.call_later(seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return Protocol
