"""tasks: the tasks that come with mia, their pairs, and prompts made of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mia.cli import _icl
from mia.cli._options import OutputOptions, command
from mia.cli._output import finish, visible


def register(app: typer.Typer) -> None:
    command(app, name="tasks")(tasks)


def tasks(
    output: OutputOptions,
    name: Annotated[
        str | None, typer.Argument(help="Show this one: a name, or a .json or .jsonl file.")
    ] = None,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="A prompt of it instead, as methods make them.")
    ] = False,
    format: Annotated[
        str, typer.Option("--format", help="qa, arrow, or a text with {input} and {output}.")
    ] = "qa",
    shots: Annotated[int, typer.Option("--shots", help="Examples in the prompt.", min=0)] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the examples.", min=0)] = 0,
) -> None:
    """List tasks, show the pairs of one, or write a prompt with examples."""
    import numpy as np

    from mia import tasks as library

    if name is None:
        entries = library.index()
        compositions = [
            {"name": c.name, "AC": c.ac, "BC": c.bc, "BD": c.bd, "AD": c.ad}
            for c in library.compositions()
        ]
        document: dict[str, Any] = {"tasks": entries, "compositions": compositions}
        cells = [[e["name"], e["family"], str(e["count"]), e["description"]] for e in entries]

        def table() -> None:
            width = max(len(c[0]) for c in cells)
            for task, family, count, description in cells:
                print(f"{task:<{width}}  {family:<11}  {count:>4}  {description}")

        return finish(document, output, table)
    task = library.load(name)
    if prompt:
        rng = np.random.default_rng(seed)
        *examples, query = library.draw(task.pairs, shots + 1, rng)
        text = _icl.read_format(format).prompt(examples, query.input)
        document = {"task": task.name, "prompt": text, "answers": list(query.outputs), "seed": seed}
        return finish(document, output, lambda: print(text))
    pairs = [{"input": p.input, "output": list(p.outputs)} for p in task.pairs]
    document = {"task": task.name, "family": task.family, "description": task.description}

    def show() -> None:
        for p in task.pairs:
            print(f"{visible(p.input)}\t{' | '.join(map(visible, p.outputs))}")

    finish({**document, "pairs": pairs}, output, show)
