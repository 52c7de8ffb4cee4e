"""Commands about the installation: models, doctor, demo."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import open_model
from mia.cli._command import JsonOption, OutOption, QuietOption, command, deliver, epilog
from mia.cli._groups import ModelOptions
from mia.show.report import Report

PANEL = "Installation"


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Models that have a name, and whether they are there.",
        invoke_without_command=True,
        epilog=epilog(["mia models", "mia models convert smollm2 f32 smollm2-f32.gguf"]),
    )
    group.callback()(models)
    command(group, "pull", examples=["mia models pull qwen  # of models.example.toml"])(pull)
    command(group, "convert", examples=["mia models convert smollm2 f32 smollm2-f32.gguf"])(convert)
    app.add_typer(group, name="models", rich_help_panel=PANEL)
    command(app, "doctor", panel=PANEL, examples=["mia doctor", "mia doctor -m model.gguf"])(doctor)
    hint = "next: mia logit-lens l_out -p 'The capital of France is' --bos"
    command(app, "demo", panel=PANEL, examples=["mia demo"], hint=hint)(demo)


def models(
    ctx: typer.Context,
    json: JsonOption = False,
    out: OutOption = None,
    quiet: QuietOption = False,
) -> None:
    from mia.models import reports

    if ctx.invoked_subcommand is None:
        deliver(reports.models, {"json": json, "out": out, "quiet": quiet})


def pull(
    name: Annotated[str, typer.Argument(help="A name of models.toml with repo and file.")],
) -> Report:
    """Download a model of models.toml from its Hugging Face repository."""
    from mia.models import reports

    return reports.pull(name)


def convert(
    model: Annotated[str, typer.Argument(help="A .gguf file, or a name.")],
    kind: Annotated[str, typer.Argument(help="f32, f16, bf16, q8_0, q6_k, q4_k_m, q4_1, q4_0.")],
    file: Annotated[str, typer.Argument(help="The .gguf file to write.")],
) -> Report:
    """Write a model with its weights in another type. f32 is lossless and fastest for large batches."""
    from mia.models import reports

    return reports.convert(model, kind, file)


def doctor(model: ModelOptions) -> Report:
    """What llama.cpp can do on this machine, and what would make it faster or safer."""
    from mia.models import doctor as method

    with open_model(model) as m:
        return method.doctor(m)


def demo() -> Report:
    """Carry "answer with the capital" from one prompt into another, on smollm2."""
    from mia.methods import demo as method

    return method.demo()
