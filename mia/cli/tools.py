"""Commands about the installation and its results: models, doctor, replay, demo."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._command import (
    JsonOption,
    OutOption,
    QuietOption,
    command,
    deliver,
    epilog,
    joined,
    option,
)
from mia.cli._groups import MODEL, ModelOptions, ThreadsOption
from mia.errors import UsageError
from mia.show.report import Report
from mia.show.streams import say

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
    command(group, "cache", examples=["mia models cache --remove smollm2"])(cache)
    app.add_typer(group, name="models", rich_help_panel=PANEL)
    command(app, "doctor", panel=PANEL, examples=["mia doctor", "mia doctor model.gguf"])(doctor)
    command(
        app,
        "replay",
        panel=PANEL,
        examples=[
            "mia run -p 'The capital of France is' --bos -o paris.json && mia replay paris.json"
        ],
    )(replay)
    command(
        app,
        "report",
        panel=PANEL,
        examples=["mia report sweep.json lens.json heads.json -o report.html"],
    )(report)
    examples = ["mia rpc-server &", "mia run --rpc 127.0.0.1:50052 -p 'The capital of France is'"]
    about = joined(rpc_server.__doc__ or "")
    app.command("rpc-server", rich_help_panel=PANEL, help=about, epilog=epilog(examples))(
        rpc_server
    )
    hint = "next: mia logit-lens l_out -p 'The capital of France is' --bos"
    command(app, "demo", panel=PANEL, examples=["mia demo"], hint=hint)(demo)


def models(
    ctx: typer.Context,
    json: JsonOption = False,
    out: OutOption = None,
    quiet: QuietOption = False,
) -> None:
    from mia.methods.rerun import recorded
    from mia.models import reports

    if ctx.invoked_subcommand is None:
        with recorded(ctx):
            deliver(reports.models, {"json": json, "out": out, "quiet": quiet})
    elif json or out or quiet:
        raise UsageError(f"options of mia models {ctx.invoked_subcommand} stand behind its name")


def pull(
    name: Annotated[str, typer.Argument(help="A name of models.toml with repo and file.")],
) -> Report:
    """Download a model of models.toml from its Hugging Face repository."""
    from mia.models import reports

    return reports.pull(name)


def report(
    results: Annotated[
        list[str],
        typer.Argument(help="Results: the .json files of commands, the .jsonl of sweeps."),
    ],
    title: Annotated[str, typer.Option("--title", help="The page's title.")] = "",
) -> Report:
    """Show saved results on one page that can be sent: maps to hover, tables, what made them, commands."""
    from mia.methods import results as method

    return method.results(results, title=title)


def convert(
    model: Annotated[str, typer.Argument(help="A .gguf file, or a name.")],
    kind: Annotated[str, typer.Argument(help="f32, f16, bf16, q8_0, q6_k, q4_k_m, q4_1, q4_0.")],
    file: Annotated[str, typer.Argument(help="The .gguf file to write.")],
) -> Report:
    """Write a model with its weights in another type. f32 is lossless and fastest for large batches."""
    from mia.models import reports

    return reports.convert(model, kind, file)


def cache(
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="Remove a model's copies: a .gguf file, or a name."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all copies.")] = False,
) -> Report:
    """Copies of models in another type (--as): source, type, size, last use. What is open stays."""
    from mia.models import reports

    return reports.copies(remove=remove or (), clear=clear)


def doctor(
    model: ModelOptions,
    file: Annotated[str | None, typer.Argument(help="A .gguf file, in place of -m.")] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also time whether extra weight buffers are faster.")
    ] = False,
) -> Report:
    """Whether what mia says on this machine and of this model can be trusted: ok, warn or fail."""
    from mia.models import doctor as method

    o = model
    opening = {
        "ctx": o.ctx,
        "threads": o.threads,
        "gpu_layers": o.gpu_layers,
        "rpc": o.rpc,
        "as_type": o.as_type,
        "lora": o.lora,
    }
    return method.doctor(file or o.model, speed=speed, **opening)


def replay(
    file: Annotated[str, typer.Argument(help="A result (-o or --json of a command).")],
    model: Annotated[
        str | None,
        option(
            "-m",
            "--model",
            help="A .gguf file, or a name (mia models); default: the result's.",
            panel=MODEL,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="How far numbers may be off, relative above 1; default: 0 on the same build and "
            "machine, elsewhere the noise of the model's weights.",
            min=0,
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Import the functions (module:function) that it names."),
    ] = False,
) -> Report:
    """Make a saved result again and compare: exit code 1 if it differs. Nothing is written."""
    from mia.methods import replay as method

    return method.replay(file, model=model, tolerance=tolerance, trust=trust)


def rpc_server(
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="0 for any that is free.", min=0, max=65535)
    ] = 50052,
    threads: ThreadsOption = None,
    expose: Annotated[
        bool, typer.Option("--expose", help="Allow an address outside private networks.")
    ] = False,
) -> None:
    """Lend this machine's GPUs or processors to models that run elsewhere (--rpc).

    NO ENCRYPTION AND NO AUTHENTICATION: whoever reaches the port reads prompts and weights and can
    run code here. Loopback and private networks only. Ctrl-C ends it; it serves one client at a time.
    """
    from mia.models.server import RpcServer

    with RpcServer(host, port, threads=threads, expose=expose) as server:
        say(f"serving at {server.endpoint} until Ctrl-C. {server.warning}")
        server.wait()


def demo() -> Report:
    """Carry "answer with the capital" from one prompt into another, on smollm2."""
    from mia.methods import demo as method

    return method.demo()
