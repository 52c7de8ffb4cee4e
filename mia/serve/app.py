"""The server: its routes, and what is answered. `guard.py` says who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mia.errors import MiaError
from mia.notices import notice
from mia.serve import looks
from mia.serve.changes import Changer
from mia.serve.completions import Answers, Body, parse, plan
from mia.serve.exploring import explore, page
from mia.serve.fields import Fields, Refused, error_document, parse_json
from mia.serve.guard import SAFE, Guard, JsonResponse, refusal
from mia.serve.limits import Limits
from mia.serve.scheduler import Completion, Part, Scheduler
from mia.serve.store import Vectors
from mia.serve.workers import Gone
from mia.serve.writing import Choice
from mia.show.explorer import live_page
from mia.show.text import safe

if TYPE_CHECKING:
    from mia.model import Model

T = TypeVar("T")

#: of a page that is kept as a file
_FILE = {**SAFE, "Content-Disposition": 'attachment; filename="explore.html"'}


class Events(Response):
    """Server-sent events, until the client has left."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        """`close` is called when the client has all, or has left: perhaps before the first event."""
        super().__init__(b"", 200, SAFE)
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
            "/tokenize": self._call(looks.tokenize, runs=False),
            "/detokenize": self._call(looks.detokenize, runs=False),
            "/mia/tokens": self._call(looks.tokens, runs=False),
            "/mia/lens": self._call(looks.lens),
            "/mia/attention": self._call(looks.attention),
            "/mia/attribute": self._call(looks.attribute),
            "/mia/activations": self._call(looks.activations),
            "/mia/explore": self._call(explore),
            "/mia/page": self._call(page),
            "/mia/vectors": self._call(looks.combine),
            "/mia/vectors/{name}": self._upload,
        }
        return [
            *(Route(path, self._answered(f), methods=["POST"]) for path, f in post.items()),
            Route("/", self._answered(self._page), methods=["GET"]),
            Route("/health", self._answered(self._health), methods=["GET"]),
            Route("/v1/models", self._answered(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._answered(self._models), methods=["GET"]),
            Route("/tokenizer_info", self._answered(self._tokenizer), methods=["GET"]),
            Route("/mia/model", self._answered(self._model), methods=["GET"]),
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

    async def _page(self, request: Request) -> Response:
        """The page says nothing of the model: its script asks, with the key."""
        headers = {
            **SAFE,
            "Content-Security-Policy": "frame-ancestors 'none'",
            "Referrer-Policy": "no-referrer",
        }
        return Response(live_page(), headers=headers, media_type="text/html")

    async def _health(self, request: Request) -> Response:
        if not request.scope["mia.has_key"]:
            return JsonResponse({"status": "ok"})
        s = self.scheduler
        pending = s.pending  # before the rest: who is over by now holds nothing any more
        usage = await s.call(s.usage, always=True)
        return JsonResponse(
            {
                "status": "ok",
                "model": self.model.name,
                "pending": pending,
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
        return JsonResponse(await self.scheduler.aside(lambda: looks.tokenizer_info(self.model)))

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
        body = parse(
            parse_json(request.scope["mia.body"]),
            chat=chat,
            model=self.model.name,
            longest=self.longest,
            limits=self.limits,
        )
        planned: Callable[[], list[Choice]] = partial(
            plan, body, self.model, self.changer, self.longest
        )
        if body.asked.runs_model:  # patches take from other prompts
            choices = await unless_gone(request.receive, self.scheduler.look(planned))
            completion = Completion(lambda: choices)
        else:
            completion = Completion(planned)
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

    @property
    def _desk(self) -> looks.Desk:
        return looks.Desk(self.model, self.vectors, self.changer, self.limits, self.longest)

    async def _model(self, request: Request) -> Response:
        return JsonResponse(await self.scheduler.look(lambda: looks.model(self._desk)))

    def _call(
        self, look: Callable[[looks.Desk, Fields], Any], *, runs: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that runs one function beside the model's thread, until the client leaves.

        Args:
            runs: whether it runs the model.
        """

        async def answer(request: Request) -> Response:
            desk, data = self._desk, request.scope["mia.body"]
            beside = self.scheduler.look if runs else self.scheduler.aside
            # a document is many times as large as its bytes: it is made when its turn has come
            looking = beside(lambda: look(desk, Fields(parse_json(data))))
            result = await unless_gone(request.receive, looking)
            if isinstance(result, bytes):
                return Response(result, headers=SAFE, media_type="application/octet-stream")
            if isinstance(result, str):
                return Response(result, headers=_FILE, media_type="text/html")
            return JsonResponse(result)

        return answer

    async def _list(self, request: Request) -> Response:
        return JsonResponse({"vectors": await self.scheduler.aside(self.vectors.document)})

    async def _upload(self, request: Request) -> Response:
        name, data = request.path_params["name"], request.scope["mia.body"]

        def add() -> dict[str, Any]:
            vector = self.vectors.parse(data)
            self.model.check_vector(vector, name)
            self.vectors.add(name, vector)
            return {"name": name, "site": vector.site, "layers": vector.layers}

        return JsonResponse(await self.scheduler.look(add))

    async def _remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.scheduler.aside(lambda: self.vectors.remove(name))
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
