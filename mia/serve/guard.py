"""Who is let in, and how errors are answered.

Safe by default: the server listens on loopback alone, and elsewhere only with a key. The Host header must
name it (a page of another site that has its name point to 127.0.0.1 is refused), a request of another
origin is refused, bodies are JSON by their Content-Type (a form of another site's page is not), and no
header lets another site read an answer. Everything has a limit (`Limits`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mia.errors import EngineError, MiaError
from mia.serve.fields import Refused, error_document
from mia.serve.limits import Limits
from mia.serve.workers import Gone

#: of every answer: read as nothing else by a browser, and not remembered
SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class JsonResponse(Response):
    """A JSON document."""

    def __init__(self, document: Any, status: int = 200, headers: dict[str, str] | None = None):
        data = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        super().__init__(data, status, {**SAFE, **(headers or {})}, "application/json")


def refusal(err: Exception) -> JsonResponse:
    """What answers an error."""
    if isinstance(err, Refused):
        headers = {"Retry-After": "1"} if err.status == 503 else {}
        if err.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JsonResponse(err.document(), err.status, headers)
    status = 500 if isinstance(err, EngineError) or not isinstance(err, MiaError) else 400
    message = str(err) if isinstance(err, MiaError) else f"{type(err).__name__} in the server"
    return JsonResponse(error_document(message, status), status)


class Guard:
    """Lets in who may come: Host, Origin, key, Content-Type, size and time of the body."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], key: str | None, limits: Limits):
        self._app, self._limits = app, limits
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._key = None if key is None else key.encode()
        #: bytes of the bodies of all requests that are under way
        self._n_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets: uvicorn answers 403
        parts: list[bytes] = []
        try:
            if await self._lets_in(scope, receive, send, parts):
                await self._answer(scope, receive, send)
        finally:
            self._n_bytes -= sum(map(len, parts))

    async def _lets_in(
        self, scope: Scope, receive: Receive, send: Send, parts: list[bytes]
    ) -> bool:
        """Whether a request may come, its body read; one that may not is answered."""
        try:
            self._check(scope)
            if scope["method"] in ("POST", "PUT", "DELETE"):
                reading = self._read(scope, receive, parts)
                await asyncio.wait_for(reading, self._limits.body_seconds)
        except Gone:
            return False
        except asyncio.TimeoutError:
            await refusal(Refused("the body did not come", status=408))(scope, receive, send)
            return False
        except Refused as err:
            await refusal(err)(scope, receive, send)
            return False
        parts[:] = [b"".join(parts)]
        scope["mia.body"] = parts[0]
        return True

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, self._timed(send))
        except asyncio.CancelledError:  # the server ends, and waits no longer
            ending = refusal(Refused("the server is stopping", status=503))
            with contextlib.suppress(RuntimeError):  # an answer has begun
                await ending(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises `Refused`. The page at / has no secrets, and /health tells who has no key one word."""
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        host = headers.get("host", "")
        if not self._is_known(host):
            raise Refused(f"the Host {host[:100]!r} is not this server", status=403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Refused("requests of other origins are not answered", status=403)
        scope["mia.has_key"] = self._has_key(headers.get("authorization", ""))
        if not scope["mia.has_key"] and scope["path"] not in ("/", "/health"):
            raise Refused("a key is needed: Authorization: Bearer KEY", status=401)
        if scope["method"] == "POST":
            content = headers.get("content-type", "").partition(";")[0].strip().lower()
            if content not in ("application/json", "application/octet-stream"):
                raise Refused("the Content-Type is application/json", status=415)

    def _has_key(self, authorization: str) -> bool:
        if self._key is None:
            return True
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key)

    def _is_known(self, host: str) -> bool:
        """A name of this server, or an address: another site's name cannot be one."""
        name = host.lower()
        name = name[: name.rfind(":")] if not name.endswith("]") and ":" in name else name
        if name in self._hosts:
            return True
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(name.strip("[]"))
            return address.is_loopback or self._key is not None
        return False

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> None:
        """The body, part by part."""
        is_upload = scope["path"].startswith("/mia/vectors/")
        most, size = self._limits.upload if is_upload else self._limits.body, 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise Refused(f"the body is larger than {most} bytes", status=413)
            if self._n_bytes + len(part) > self._limits.bodies:
                raise Refused(
                    "the bodies of all requests are too large together; try again later",
                    status=503,
                    code="server_busy",
                )
            self._n_bytes += len(part)
            parts.append(part)
            if not message.get("more_body"):
                return

    def _timed(self, send: Send) -> Send:
        """Who does not take what he asked for is left."""

        async def timed(message: Any) -> None:
            # not wait_for: before Python 3.12 it can lose the cancellation of who waits
            sending = asyncio.ensure_future(send(message))
            try:
                await asyncio.wait({sending}, timeout=self._limits.send_seconds)
                if not sending.done():
                    raise asyncio.TimeoutError
                sending.result()
            finally:
                sending.cancel()

        return timed
