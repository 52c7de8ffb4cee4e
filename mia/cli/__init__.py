"""The command line. Each file of this package holds one group of commands; they parse,
call the library, and print. Heavy imports wait until a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli import (
    actadd,
    attention,
    attribute,
    bake,
    caa,
    diff,
    experts,
    explore,
    function_vector,
    heads,
    iti,
    look,
    perplexity,
    run,
    serve,
    soft_vector,
    steer,
    sweep,
    task_vector,
    tasks,
    tools,
    tune,
    vector,
    why,
)
from mia.cli._root import Root
from mia.show.streams import prepare, write_data

app = typer.Typer(
    name="mia",
    cls=Root,
    help="Look inside quantized language models while llama.cpp runs them, and change what happens there.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from mia import __version__

        write_data(f"mia {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


for group in (
    look,
    run,
    serve,
    sweep,
    diff,
    why,
    attention,
    heads,
    experts,
    explore,
    attribute,
    steer,
    bake,
    tune,
    vector,
    actadd,
    caa,
    iti,
    perplexity,
    tasks,
    task_vector,
    function_vector,
    soft_vector,
    tools,
):
    group.register(app)


def main() -> None:
    """Entry point (see `Root` for how it ends)."""
    prepare()
    app()
