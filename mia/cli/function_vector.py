"""function-vector: Todd et al. 2023 (arXiv 2310.15213)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mia.cli._build import open_model
from mia.cli._command import command, refuse
from mia.cli._groups import ModelOptions, PromptsOption, TopOption
from mia.cli._tasks import (
    PANEL,
    ByLayerOption,
    CurvesPlotOption,
    SavedVectorOption,
    TaskFilesOption,
    TaskOptions,
    TasksArgument,
    VectorLayersOption,
    layer_of_saved,
    layers_to_try,
)
from mia.errors import UsageError
from mia.show.report import Report

if TYPE_CHECKING:
    from mia.methods.function_vectors import FunctionVectorTraining
    from mia.model import Model

EffectsOption = Annotated[
    int, typer.Option("--effect-prompts", help="Prompts with shuffled answers for effects.", min=1)
]
NHeadsOption = Annotated[
    str | None,
    typer.Option("--n-heads", help="How many heads; default: the best on dev of 10,20,40."),
]
CoeffOption = Annotated[
    str | None,
    typer.Option(
        "--coeff",
        help="How much of it: 2, or several like 0.5,1,2; default 1 (of several the best on dev).",
    ),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Function vectors (Todd et al. 2023).")
    command(
        group,
        "train",
        plot=True,
        examples=[
            "mia function-vector train antonym -o antonym.safetensors --plot heads.svg",
            "mia function-vector train antonym uppercase -o '{name}.safetensors' --n-heads 20",
        ],
    )(train)
    command(
        group,
        "eval",
        plot=True,
        examples=[
            "mia function-vector eval antonym --prompts 30 --effect-prompts 5",
            "mia function-vector eval antonym --vector antonym.safetensors --by-layer",
        ],
    )(evaluate)
    command(
        group,
        "compose",
        examples=["mia function-vector compose last_upper --prompts 30 --effect-prompts 5"],
    )(compose)
    app.add_typer(group, name="function-vector", rich_help_panel=PANEL)


def _training(
    m: Model,
    prompts: int,
    effect_prompts: int,
    n_heads: str | None,
    coeff: str | None,
    layers: str | None = None,
) -> FunctionVectorTraining:
    from mia.methods.function_vectors import HEAD_COUNTS, FunctionVectorTraining
    from mia.ranges import parse_counts, parse_numbers

    most = m.n_layer * m.n_head
    return FunctionVectorTraining(
        prompts=prompts,
        effect_prompts=effect_prompts,
        n_heads=HEAD_COUNTS if n_heads is None else parse_counts(n_heads, "--n-heads", most),
        layers=layers_to_try(layers, m.n_layer),
        coeffs=parse_numbers(coeff or "1", "--coeff"),
    )


def train(
    model: ModelOptions,
    task: TaskOptions,
    tasks: TasksArgument,
    out: TaskFilesOption,
    prompts: PromptsOption = 100,
    effect_prompts: EffectsOption = 25,
    n_heads: NHeadsOption = None,
    coeff: CoeffOption = None,
    top_k: TopOption = 8,
) -> Report:
    """Mean head outputs, effects of all heads, and the sum of the best ones. Several tasks share
    the heads with the best mean effect."""
    from mia.datasets.tasks import load_many
    from mia.methods.function_vectors import train_many
    from mia.methods.icl_reports import vector_files
    from mia.notices import notice

    loaded = load_many(tasks)
    files = vector_files(out, loaded)
    with open_model(model, small_effects=True) as m:
        how = _training(m, prompts, effect_prompts, n_heads, coeff)
        report = train_many(m, loaded, task.setup(), how, top_k=top_k, files=files)
    for file in files:
        notice(f"wrote {file}")
    return report


def evaluate(
    model: ModelOptions,
    task: TaskOptions,
    tasks: TasksArgument,
    vector: SavedVectorOption = None,
    layers: VectorLayersOption = None,
    prompts: PromptsOption = 100,
    effect_prompts: EffectsOption = 25,
    n_heads: NHeadsOption = None,
    coeff: CoeffOption = None,
    by_layer: ByLayerOption = False,
    plot: CurvesPlotOption = None,
) -> Report:
    """Accuracy without examples and after shuffled ones, each with and without the vector."""
    from mia.datasets.tasks import load_many
    from mia.methods.function_vectors import (
        SavedFunctionVector,
        evaluate_tasks,
    )

    if vector is not None:
        new = ("n_heads", "prompts", "effect_prompts")
        refuse(new, "is for a new vector; it does not go with --vector")
    loaded = load_many(tasks)
    with open_model(model, small_effects=True) as m:
        how: FunctionVectorTraining | SavedFunctionVector
        if vector is not None:
            layer = layer_of_saved(layers, m.n_layer)
            how = SavedFunctionVector(vector, layer, _one_number(coeff))
        else:
            how = _training(m, prompts, effect_prompts, n_heads, coeff, layers)
        drawn = by_layer or plot is not None
        return evaluate_tasks(m, loaded, task.setup(), how, by_layer=drawn)


def _one_number(coeff: str | None) -> float | None:
    from mia.ranges import parse_numbers

    if coeff is None:
        return None
    numbers = parse_numbers(coeff, "--coeff")
    if len(numbers) > 1:
        raise UsageError("a saved vector takes one --coeff")
    return numbers[0]


def compose(
    model: ModelOptions,
    task: TaskOptions,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Compositions (mia tasks lists them), or AC,BC,BD,AD: four tasks of your own; "
            "default: all that come with mia."
        ),
    ] = None,
    prompts: PromptsOption = 100,
    effect_prompts: EffectsOption = 25,
    n_heads: Annotated[
        int | None, typer.Option("--n-heads", help="How many heads; default 40.", min=1)
    ] = None,
    top_k: TopOption = 5,
) -> Report:
    """v(AD) = v(BD) - v(BC) + v(AC): does the composed vector do the composed task?"""
    from mia.datasets import tasks as data
    from mia.methods.function_composition import compose_tasks

    chosen = [data.composition(n) for n in names] if names else data.compositions()
    with open_model(model, small_effects=True) as m:
        return compose_tasks(
            m,
            chosen,
            task.setup(),
            n_heads=n_heads,
            prompts=prompts,
            effect_prompts=effect_prompts,
            top_k=top_k,
        )
