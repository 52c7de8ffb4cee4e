"""The server: routes, who is let in, and what is answered.

Safe by default: it listens on loopback alone, and elsewhere only with a key. The Host header must name
the server (a page of another site that has its name point to 127.0.0.1 is refused), a request of
another origin is refused, bodies are JSON by their Content-Type (a form of another site's page is not),
and no header lets another site read an answer. Everything has a limit (`Limits`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mia.errors import EngineError, MiaError
from mia.notices import notice
from mia.serve import looks
from mia.serve.changes import Changer
from mia.serve.completions import Answers, Body, parse, plan
from mia.serve.fields import Fields, Refused, error_document, parse_json
from mia.serve.limits import Limits
from mia.serve.scheduler import Completion, Part, Scheduler
from mia.serve.store import Vectors
from mia.show.text import safe

if TYPE_CHECKING:
    from mia.model import Model

T = TypeVar("T")


class Gone(Exception):
    """The client has left."""


class JsonResponse(Response):
    """A JSON document, read as nothing else by any browser."""

    def __init__(self, document: Any, status: int = 200, headers: dict[str, str] | None = None):
        data = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        more = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        super().__init__(data, status, {**more, **(headers or {})}, "application/json")


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets: uvicorn answers 403
        try:
            self._check(scope)
            body = b""
            if scope["method"] in ("POST", "PUT", "DELETE"):
                body = await asyncio.wait_for(self._body(scope, receive), self._limits.body_seconds)
        except Gone:
            return
        except asyncio.TimeoutError:
            await refusal(Refused("the body did not come", status=408))(scope, receive, send)
            return
        except Refused as err:
            await refusal(err)(scope, receive, send)
            return
        scope["mia.body"] = body
        try:
            await self._app(scope, receive, self._timed(send))
        except asyncio.CancelledError:  # the server ends, and waits no longer
            ending = refusal(Refused("the server is stopping", status=503))
            with contextlib.suppress(RuntimeError):  # an answer has begun
                await ending(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        host = headers.get("host", "")
        if not self._is_known(host):
            raise Refused(f"the Host {host[:100]!r} is not this server", status=403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Refused("requests of other origins are not answered", status=403)
        if self._key is not None and scope["path"] != "/health":
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(
                given.strip().encode(), self._key
            ):
                raise Refused("a key is needed: Authorization: Bearer KEY", status=401)
        if scope["method"] == "POST":
            content = headers.get("content-type", "").partition(";")[0].strip().lower()
            if content not in ("application/json", "application/octet-stream"):
                raise Refused("the Content-Type is application/json", status=415)

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

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        is_upload = scope["path"].startswith("/mia/vectors/")
        most = self._limits.upload if is_upload else self._limits.body
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise Refused(f"the body is larger than {most} bytes", status=413)
            if not message.get("more_body"):
                return b"".join(parts)

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


class Events(Response):
    """Server-sent events, until the client has left."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        """`close` is called when the client has all, or has left: perhaps before the first event."""
        super().__init__(
            b"", 200, {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        )
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                data = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with contextlib.suppress(Gone, asyncio.TimeoutError, OSError):
                await unless_gone(receive, write())
        finally:
            self._close()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does some work; if the client leaves meanwhile it is ended. Raises `Gone`."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


class Server:
    """The routes of one model."""

    def __init__(self, model: Model, *, limits: Limits, vectors: Vectors, **stream: Any):
        self.model, self.limits, self.vectors = model, limits, vectors
        self.scheduler = Scheduler(model, limits, **stream)
        self.changer = Changer(model, vectors, limits)
        self.longest = self.scheduler.longest

    def routes(self) -> list[Route]:
        post = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/tokenize": self._call(looks.tokenize),
            "/detokenize": self._call(looks.detokenize),
            "/mia/tokens": self._call(looks.tokens),
            "/mia/lens": self._call(looks.lens),
            "/mia/attention": self._call(looks.attention),
            "/mia/attribute": self._call(looks.attribute),
            "/mia/activations": self._call(looks.activations),
            "/mia/vectors": self._call(looks.combine),
            "/mia/vectors/{name}": self._upload,
        }
        return [
            *(Route(path, self._answered(f), methods=["POST"]) for path, f in post.items()),
            Route("/health", self._answered(self._health), methods=["GET"]),
            Route("/v1/models", self._answered(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._answered(self._models), methods=["GET"]),
            Route("/tokenizer_info", self._answered(self._tokenizer), methods=["GET"]),
            Route("/mia/vectors", self._answered(self._list), methods=["GET"]),
            Route("/mia/vectors/{name}", self._answered(self._remove), methods=["DELETE"]),
        ]

    def _answered(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Gone:
                return Response(status_code=499)  # nobody reads it
            except MiaError as err:
                return refusal(err)
            except Exception as err:
                notice(f"{request.url.path}: {type(err).__name__}: {err}")
                return refusal(err)

        return answer

    # -- what is there ---------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        s = self.scheduler
        usage = await s.call(s.usage, always=True)
        return JsonResponse(
            {
                "status": "ok",
                "model": self.model.name,
                "pending": s.pending,
                "running": usage.running,
                "waiting": usage.waiting,
                "cells": {"used": usage.cells, "kept": usage.kept_cells, "all": usage.budget},
                "sequences": {"used": usage.sequences, "kept": usage.kept_sequences},
                "served": s.served,
                "refused": s.refused,
                "cancelled": s.cancelled,
            }
        )

    async def _tokenizer(self, request: Request) -> Response:
        return JsonResponse(await self.scheduler.call(lambda: looks.tokenizer_info(self.model)))

    async def _models(self, request: Request) -> Response:
        name = request.path_params.get("name", self.model.name)
        if name != self.model.name:
            raise Refused(f"there is no model {name[:100]!r}", status=404, code="model_not_found")
        entry = {"id": self.model.name, "object": "model", "created": 0, "owned_by": "mia"}
        if "name" in request.path_params:
            return JsonResponse(entry)
        return JsonResponse({"object": "list", "data": [entry]})

    # -- completions -------------------------------------------------------------------

    async def _completions(self, request: Request) -> Response:
        return await self._complete(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._complete(request, chat=True)

    async def _complete(self, request: Request, *, chat: bool) -> Response:
        document = parse_json(request.scope["mia.body"])
        body = parse(
            document,
            chat=chat,
            model=self.model.name,
            longest=self.longest,
            limits=self.limits,
        )
        completion = Completion(lambda: plan(body, self.model, self.changer, self.longest))
        self.scheduler.submit(completion)
        answers = Answers(body, self.model)
        if not body.stream:
            try:
                parts = await unless_gone(request.receive, _all(completion))
            finally:
                self.scheduler.cancel(completion)
            return JsonResponse(answers.whole(parts, completion.choices))
        try:  # an error before the first token has a status of its own
            first = await unless_gone(request.receive, completion.events.get())
        except BaseException:
            self.scheduler.cancel(completion)
            raise
        if isinstance(first, MiaError):
            raise first
        events = self._events(body, completion, answers, first)
        return Events(events, lambda: self.scheduler.cancel(completion))

    async def _events(
        self, body: Body, completion: Completion, answers: Answers, first: Part | None
    ) -> AsyncIterator[str]:
        event: Part | MiaError | None = first
        while event is not None:
            if isinstance(event, MiaError):
                yield json.dumps(error_document(str(event), 500))
                return
            for chunk in answers.chunks(event):
                yield json.dumps(chunk, allow_nan=False)
            event = await completion.events.get()
        last = answers.last_chunk(completion.choices)
        if last is not None:
            yield json.dumps(last)
        yield "[DONE]"

    # -- mia's own ------------------------------------------------------------------------

    def _call(
        self, look: Callable[[looks.Desk, Fields], Any]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that runs one function in the thread that has the model."""

        async def answer(request: Request) -> Response:
            fields = Fields(parse_json(request.scope["mia.body"]))
            desk = looks.Desk(self.model, self.vectors, self.changer, self.limits, self.longest)
            result = await self.scheduler.call(lambda: look(desk, fields))
            if isinstance(result, bytes):
                return Response(
                    result,
                    headers={"X-Content-Type-Options": "nosniff"},
                    media_type="application/octet-stream",
                )
            return JsonResponse(result)

        return answer

    async def _list(self, request: Request) -> Response:
        return JsonResponse({"vectors": await self.scheduler.call(self.vectors.document)})

    async def _upload(self, request: Request) -> Response:
        name, data = request.path_params["name"], request.scope["mia.body"]

        def add() -> dict[str, Any]:
            vector = self.vectors.parse(data)
            self.model.check_vector(vector, name)
            self.vectors.add(name, vector)
            return {"name": name, "site": vector.site, "layers": vector.layers}

        return JsonResponse(await self.scheduler.call(add))

    async def _remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.scheduler.call(lambda: self.vectors.remove(name))
        return JsonResponse({"name": name, "deleted": True})


async def _all(completion: Completion) -> list[Part]:
    """All parts of a completion. Raises the error that ended it."""
    parts: list[Part] = []
    while (event := await completion.events.get()) is not None:
        if isinstance(event, MiaError):
            raise event
        parts.append(event)
    return parts


def make_app(
    model: Model,
    *,
    hosts: Sequence[str] = (),
    key: str | None = None,
    vectors: str | Path | None = None,
    limits: Limits | None = None,
    **stream: Any,
) -> tuple[Guard, Server]:
    """The ASGI application of an open model, and the server behind it, whose scheduler is to be started.

    Args:
        hosts: names of this server beside localhost.
        key: that clients must show.
        vectors: a folder of vectors that they can name.
        stream: options of `Model.stream`.
    """
    limits = limits or Limits()
    server = Server(model, limits=limits, vectors=Vectors(vectors, limits), **stream)
    app = Starlette(routes=server.routes(), exception_handlers={404: _missing, 405: _missing})
    return Guard(app, hosts=hosts, key=key, limits=limits), server


async def _missing(request: Request, err: Exception) -> Response:
    status = getattr(err, "status_code", 404)
    what = "there is nothing" if status == 404 else f"there is no {request.method}"
    return JsonResponse(error_document(f"{what} at {safe(request.url.path[:200])}", status), status)
