"""The command that keeps a model open for others: serve."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import open_model
from mia.cli._command import command, option
from mia.cli._groups import ModelOptions

PANEL, SERVER = "Run and change", "Server"


def register(app: typer.Typer) -> None:
    command(
        app,
        "serve",
        panel=PANEL,
        report=False,
        examples=[
            "mia serve -m smollm2 --vectors vectors",
            "curl http://127.0.0.1:8420/v1/completions -H 'Content-Type: application/json' "
            '-d \'{"prompt": "The capital of France is", "ablate": "3.5"}\'',
        ],
    )(serve)


def serve(
    model: ModelOptions,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="0 for any that is free.", min=0, max=65535)
    ] = 8420,
    api_key: Annotated[
        str | None,
        option(
            "--api-key",
            help="What clients must show; needed where other machines reach the address.",
            panel=SERVER,
            envvar="MIA_API_KEY",
        ),
    ] = None,
    vectors: Annotated[
        str | None,
        option("--vectors", help="A folder whose vector files clients can name.", panel=SERVER),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        option(
            "--allow-host",
            help="A name by which clients call the server. May be repeated.",
            panel=SERVER,
        ),
    ] = None,
    cells: Annotated[
        int | None,
        option(
            "--cells",
            help="Tokens that its cache has room for, of all clients; default: up to 8192.",
            panel=SERVER,
            min=1,
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        option(
            "--parallel", help="Requests that run side by side; default: 16.", panel=SERVER, min=1
        ),
    ] = None,
) -> None:
    """Serve the model: a page for the browser, and OpenAI's format with changes for each request.

    The page writes, looks inside and changes. Clients steer, ablate, block and patch, and read lens and activations, in the bodies of
    /v1/completions and /v1/chat/completions. It listens on this machine alone; other addresses need a
    key. Ctrl-C ends it.
    """
    from mia.notices import notice
    from mia.serve import serve as run
    from mia.serve.address import check_address

    check_address(host, api_key)
    with open_model(model) as m:
        run(
            m,
            host=host,
            port=port,
            api_key=api_key,
            vectors=vectors,
            hosts=allow_host or (),
            cells=cells,
            n_requests=parallel,
            ready=lambda url: notice(f"open {url} in a browser; clients: {url}/v1; Ctrl-C ends it"),
        )
