"""tasks: the tasks that come with mia, their pairs, and prompts made of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mia.cli import _icl
from mia.cli._options import OutputOptions, command
from mia.cli._output import finish, visible
from mia.errors import UsageError


def register(app: typer.Typer) -> None:
    command(app, name="tasks")(tasks)


def tasks(
    output: OutputOptions,
    name: Annotated[
        str | None, typer.Argument(help="Show this one: a name, or a .json or .jsonl file.")
    ] = None,
    prompt: Annotated[
        bool,
        typer.Option(
            "--prompt", help="A prompt of it instead, as methods make them, but for the BOS."
        ),
    ] = False,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="qa, arrow, or a text with {input} and {output}; \\n and \\t are read.",
        ),
    ] = "qa",
    shots: Annotated[int, typer.Option("--shots", help="Examples in the prompt.", min=0)] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the examples.", min=0)] = 0,
) -> None:
    """List tasks, show the pairs of one, or write a prompt with examples."""
    import numpy as np

    from mia.datasets import tasks as library

    if name is None:
        if prompt:
            raise UsageError("--prompt needs a task: mia tasks NAME --prompt (a name, or a file)")
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
            print("\nCompositions (mia function-vector compose): AC is to BC as AD is to BD.")
            for c in library.compositions():
                print(f"{c.name:<{width}}  AC {c.ac}, BC {c.bc}, BD {c.bd}, AD {c.ad}")

        return finish(document, output, table)
    task = library.load(name)
    if prompt:
        rng = np.random.default_rng(seed)
        query = task.pairs[rng.integers(len(task.pairs))]
        examples = library.draw(task.pairs, shots, rng, without=query.input)
        text = _icl.read_format(format).prompt(examples, query.input)
        document = {"task": task.name, "prompt": text, "answers": list(query.outputs), "seed": seed}
        return finish(document, output, lambda: print(text))
    pairs = [{"input": p.input, "output": list(p.outputs)} for p in task.pairs]
    document = {"task": task.name, "family": task.family, "description": task.description}

    def show() -> None:
        for p in task.pairs:
            print(f"{visible(p.input)}\t{' | '.join(map(visible, p.outputs))}")

    finish({**document, "pairs": pairs}, output, show)
