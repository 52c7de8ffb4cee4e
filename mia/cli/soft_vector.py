"""soft-vector: heads blended with their task means, weights learned without gradients."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mia.cli._build import open_model
from mia.cli._command import command
from mia.cli._groups import ModelOptions, PromptsOption
from mia.cli._tasks import PANEL, MatchOption, TaskArgument, TaskFileOption, TaskOptions
from mia.errors import UsageError
from mia.show.report import Report


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, help="Soft task vectors: every head blended with its task mean."
    )
    command(
        group,
        "train",
        plot=True,
        examples=["mia soft-vector train antonym -o soft.safetensors --plot curve.svg"],
    )(train)
    command(
        group,
        "eval",
        examples=["mia soft-vector eval antonym soft.safetensors --sparse --compare"],
    )(evaluate)
    app.add_typer(group, name="soft-vector", rich_help_panel=PANEL)


def train(
    model: ModelOptions,
    task: TaskOptions,
    name: TaskArgument,
    out: TaskFileOption,
    optimiser: Annotated[
        Literal["reinforce", "es", "cma"],
        typer.Option("--optimiser", help="reinforce has hard gates; cma needs mia\\[soft]."),
    ] = "reinforce",
    evaluations: Annotated[
        int, typer.Option("--evaluations", help="Maximum number of candidate evaluations.", min=1)
    ] = 2000,
    population: Annotated[
        int, typer.Option("--population", help="Candidates of one step.", min=2)
    ] = 32,
    batch: Annotated[
        int, typer.Option("--batch", help="Training queries of a minibatch.", min=1)
    ] = 16,
    patience: Annotated[
        int,
        typer.Option(
            "--patience", help="Stop after this many dev scores without improvement.", min=1
        ),
    ] = 5,
    prompts: PromptsOption = 100,
    start: Annotated[
        float | None,
        typer.Option(
            "--start",
            help="Initial weight of every head; default: the best of several starts.",
        ),
    ] = None,
) -> Report:
    """Learn one weight in [0, 1] per head; the best on dev is kept."""
    from mia.datasets.tasks import load
    from mia.methods import soft_vectors
    from mia.methods.icl import experiment
    from mia.methods.icl_reports import vector_files
    from mia.notices import notice

    loaded = load(name)
    (file,) = vector_files(out, [loaded])
    how = soft_vectors.SoftVectorTraining(
        optimiser, evaluations, population, batch, patience=patience, prompts=prompts, start=start
    )
    with open_model(model) as m:
        report = soft_vectors.train(experiment(m, loaded, task.setup()), how, file=file)
    notice(f"wrote {file}")
    return report


def evaluate(
    model: ModelOptions,
    task: TaskOptions,
    name: TaskArgument,
    file: Annotated[str, typer.Argument(help="A soft vector (mia soft-vector train).")],
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse",
            help="Also evaluate the fewest heads that keep --keep of the accuracy on dev.",
        ),
    ] = False,
    keep: Annotated[
        float | None, typer.Option("--keep", help="Share of the accuracy to keep; default 0.95.")
    ] = None,
    sparse_out: Annotated[
        str | None, typer.Option("--sparse-out", help="Save the sparse one.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train and evaluate a plain task vector.")
    ] = False,
    match: MatchOption = "first",
) -> Report:
    """Accuracy without examples, with examples, and with the soft vector in their place."""
    from mia.datasets.tasks import load
    from mia.methods import soft_vectors
    from mia.methods.icl_reports import vector_files
    from mia.notices import notice

    loaded, sparse = load(name), sparse or sparse_out is not None
    if keep is not None and not sparse:
        raise UsageError("--keep is for --sparse or --sparse-out")
    if sparse_out is not None:
        (sparse_out,) = vector_files(sparse_out, [loaded])
    share = (0.95 if keep is None else keep) if sparse else None
    with open_model(model) as m:
        report = soft_vectors.evaluate_task(
            m, loaded, file, task.setup(), keep=share, compare=compare, match=match
        )
    if sparse_out is not None:
        report.vectors[1].soft.save(sparse_out)
        notice(f"wrote {sparse_out}")
    return report
