"""tasks: the tasks that come with mia, their pairs, and prompts made of them."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import unescaped
from mia.cli._command import command, refuse
from mia.cli._groups import SeedOption
from mia.cli._tasks import PANEL, FormatOption
from mia.errors import UsageError
from mia.show.report import Report


def register(app: typer.Typer) -> None:
    command(
        app,
        "tasks",
        panel=PANEL,
        examples=["mia tasks", "mia tasks antonym", "mia tasks antonym --show-prompt --shots 3"],
    )(tasks)


def tasks(
    name: Annotated[
        str | None, typer.Argument(help="Show this one: a name, or a .json or .jsonl file.")
    ] = None,
    show_prompt: Annotated[
        bool,
        typer.Option(
            "--show-prompt", help="Show a prompt of it, as the methods make them but without a BOS."
        ),
    ] = False,
    format: FormatOption = "qa",
    shots: Annotated[int, typer.Option("--shots", help="Examples in a prompt.", min=0)] = 5,
    seed: SeedOption = 0,
) -> Report:
    """List tasks, show the pairs of one, or write a prompt with examples."""
    from mia.methods import tasks as method

    if not show_prompt:
        refuse(("shots", "format", "seed"), "needs --show-prompt")
    if name is None:
        if show_prompt:
            raise UsageError(
                "--show-prompt needs a task: mia tasks NAME --show-prompt (a name, or a file)"
            )
        return method.overview()
    if not show_prompt:
        return method.pairs(name)
    return method.prompt(name, format=unescaped(format), shots=shots, seed=seed)
