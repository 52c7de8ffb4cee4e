"""A server for one model: OpenAI's wire format, with mia's changes and looks in the same bodies.

    from mia import Model
    from mia.serve import serve

    serve(Model("smollm2"), port=8420)

Needs the extra `serve` (starlette and uvicorn). docs/guide/serve.md has the routes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mia.errors import UsageError
from mia.serve.address import check_address, listen

if TYPE_CHECKING:
    from mia.model import Model
    from mia.serve.limits import Limits


def serve(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8420,
    api_key: str | None = None,
    vectors: str | Path | None = None,
    hosts: Sequence[str] = (),
    limits: Limits | None = None,
    cells: int | None = None,
    n_requests: int | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a model until Ctrl-C.

    Args:
        host, port: where it listens; port 0 is any that is free.
        api_key: what clients must show as `Authorization: Bearer KEY`. Needed where others can reach it.
        vectors: a folder whose vector files clients can name.
        hosts: names by which clients may call the server, beside localhost and its addresses.
        limits: what clients may ask for at most (`mia.serve.limits.Limits`).
        cells, n_requests: as of `Model.stream`.
        ready: called with the server's address when it answers.

    Raises:
        UsageError: starlette or uvicorn is missing; an address that others can reach, without a key; or
            one where it cannot listen.
    """
    try:
        import uvicorn

        from mia.serve.app import make_app
        from mia.serve.limits import Limits
        from mia.serve.protocol import WebServer, http_protocol
    except ImportError as err:
        raise UsageError(
            f"a server needs starlette and uvicorn ({err}): pip install 'mia[serve]'"
        ) from err
    check_address(host, api_key)
    limits = limits or Limits()
    app, server = make_app(
        model,
        hosts=[host, *hosts],
        key=api_key,
        vectors=vectors,
        limits=limits,
        cells=cells,
        n_requests=n_requests,
    )
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=2,
        server_header=False,
        ws="none",
        lifespan="off",
        h11_max_incomplete_event_size=64 << 10,
        http=http_protocol(limits.body_seconds),
    )
    listener = listen(host, port)
    address = listener.getsockname()
    name = f"[{address[0]}]" if ":" in address[0] else address[0]

    def say() -> None:
        if ready is not None:
            ready(f"http://{name}:{address[1]}")

    server.scheduler.start()
    try:
        WebServer(config, ready=say, end=server.scheduler.stop).run(sockets=[listener])
    finally:
        listener.close()
        server.scheduler.stop()
