"""task-vector: Hendel et al. 2023 (arXiv 2310.15916)."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import open_model
from mia.cli._command import command, refuse
from mia.cli._groups import ModelOptions
from mia.cli._tasks import (
    PANEL,
    ByLayerOption,
    CurvesPlotOption,
    MatchOption,
    SavedVectorOption,
    TaskArgument,
    TaskFilesOption,
    TaskOptions,
    TasksArgument,
    VectorLayersOption,
    layer_of_saved,
    layers_to_try,
)
from mia.errors import UsageError
from mia.show.report import Report

SetsOption = Annotated[
    int, typer.Option("--sets", help="Sets of examples to choose from on dev.", min=1)
]
DummiesOption = Annotated[
    int,
    typer.Option("--dummies", help="Dummy queries that each set's vector is averaged over.", min=1),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="ICL task vectors (Hendel et al. 2023).")
    command(
        group,
        "train",
        examples=[
            "mia task-vector train antonym -o antonym.safetensors",
            "mia task-vector train antonym uppercase -o '{name}.safetensors'",
        ],
    )(train)
    command(
        group,
        "eval",
        plot=True,
        examples=[
            "mia task-vector eval antonym uppercase --by-layer --plot layers.svg",
            "mia task-vector eval antonym --vector antonym.safetensors",
        ],
    )(evaluate)
    command(
        group,
        "conflict",
        examples=["mia task-vector conflict present_gerund present_past --sets 4"],
    )(conflict)
    app.add_typer(group, name="task-vector", rich_help_panel=PANEL)


def train(
    model: ModelOptions,
    task: TaskOptions,
    tasks: TasksArgument,
    out: TaskFilesOption,
    sets: SetsOption = 16,
    dummies: DummiesOption = 8,
) -> Report:
    """The residual of the last token after examples, and the layer where it works best on dev."""
    from mia.datasets.tasks import load_many
    from mia.methods.icl_reports import vector_files
    from mia.methods.task_vectors import TaskVectorTraining, train_many
    from mia.notices import notice

    loaded = load_many(tasks)
    files = vector_files(out, loaded)
    how = TaskVectorTraining(sets=sets, dummies=dummies)
    with open_model(model) as m:
        report = train_many(m, loaded, task.setup(), how, files=files)
    for file in files:
        notice(f"wrote {file}")
    return report


def evaluate(
    model: ModelOptions,
    task: TaskOptions,
    tasks: TasksArgument,
    vector: SavedVectorOption = None,
    layers: VectorLayersOption = None,
    sets: SetsOption = 16,
    dummies: DummiesOption = 8,
    repeats: Annotated[
        int,
        typer.Option("--repeats", help="Pool this many splits, with consecutive seeds.", min=1),
    ] = 1,
    match: MatchOption = "first",
    by_layer: ByLayerOption = False,
    plot: CurvesPlotOption = None,
) -> Report:
    """Accuracy without examples, with examples, and with the vector in their place."""
    from mia.datasets.tasks import load_many
    from mia.methods.task_vectors import SavedTaskVector, TaskVectorTraining, evaluate_tasks

    if vector is not None and repeats > 1:
        raise UsageError("--repeats trains a vector for each split; it does not go with --vector")
    if vector is not None:
        refuse(("sets", "dummies"), "is for a new vector; it does not go with --vector")
    loaded = load_many(tasks)
    with open_model(model) as m:
        how: TaskVectorTraining | SavedTaskVector
        if vector is not None:
            how = SavedTaskVector(vector, layer_of_saved(layers, m.n_layer))
        else:
            tried = layers_to_try(layers, m.n_layer)
            how = TaskVectorTraining(sets=sets, dummies=dummies, layers=tried)
        return evaluate_tasks(
            m,
            loaded,
            task.setup(),
            how,
            repeats=repeats,
            match=match,
            by_layer=by_layer or plot is not None,
        )


def conflict(
    model: ModelOptions,
    task: TaskOptions,
    name: TaskArgument,
    other: Annotated[str, typer.Argument(help="The task whose vector is put into its prompts.")],
    sets: SetsOption = 16,
    dummies: DummiesOption = 8,
) -> Report:
    """Examples of one task, vector of another, on inputs that both have: which one wins?"""
    from mia.datasets import tasks as data
    from mia.methods import task_vectors

    loaded, source = data.load(name), data.load(other)
    how = task_vectors.TaskVectorTraining(sets=sets, dummies=dummies)
    with open_model(model) as m:
        return task_vectors.conflict(m, loaded, source, task.setup(), how)
