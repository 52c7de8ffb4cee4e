"""caa: contrastive activation addition, trained and evaluated on A/B questions."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import check_layer_zero, open_model
from mia.cli._command import command
from mia.cli._groups import (
    BosOption,
    ItemsOption,
    LayerZeroOption,
    ModelOptions,
    SeedOption,
    VectorFileOption,
)
from mia.errors import UsageError
from mia.show.report import Report

_DATA = "A/B JSON, or a shipped set: agree_vs_accurate, refuse_vs_comply."
ByTextOption = Annotated[
    bool,
    typer.Option(
        "--by-text",
        help="Read and score the answers themselves, not their letters; lists no choices.",
    ),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, help="Contrastive activation addition (Rimsky et al. 2023)."
    )
    command(
        group,
        "train",
        examples=[
            "mia caa train agree_vs_accurate -o agree.gguf --items 0..39",
            "mia caa train agree_vs_accurate refuse_vs_comply -o '{name}.gguf' --equal-norm",
        ],
    )(train)
    command(
        group,
        "eval",
        plot=True,
        examples=["mia caa eval agree.gguf agree_vs_accurate --items 40.. --layers 10..16"],
    )(evaluate)
    app.add_typer(group, name="caa", rich_help_panel="Directions")


def train(
    model: ModelOptions,
    data: Annotated[list[str], typer.Argument(help=_DATA)],
    out: VectorFileOption,
    items: ItemsOption = None,
    equal_norm: Annotated[
        bool,
        typer.Option("--equal-norm", help="Scale the behaviours' vectors to one norm per layer."),
    ] = False,
    by_text: ByTextOption = False,
    bos: BosOption = None,
    layer_zero: LayerZeroOption = False,
) -> Report:
    """The mean difference at the answer's letter. Several behaviours: -o '{name}.gguf'."""
    from mia.datasets.choices import select_items
    from mia.methods import caa
    from mia.vectors import check_file

    check_layer_zero(layer_zero, out)
    files = caa.vector_files(out, data)
    if equal_norm and len(data) < 2:
        raise UsageError("--equal-norm needs at least two behaviours")
    for file in files:
        check_file(file)
    behaviours = [select_items(d, items) for d in data]
    with open_model(model) as m:
        report = caa.learn(m, behaviours, equal_norm=equal_norm, by_text=by_text, bos=bos)
        return report.write(files, layer_zero=layer_zero)


def evaluate(
    model: ModelOptions,
    vector: Annotated[str, typer.Argument(help="A vector file, or arithmetic with several.")],
    data: Annotated[str, typer.Argument(help=_DATA)],
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", help="Layers: 3,7 or 10..20; default: every third that the vector has."
        ),
    ] = None,
    multipliers: Annotated[
        str, typer.Option("--multipliers", help="How much of the vector: -1,1 …")
    ] = "-1,1",
    items: ItemsOption = None,
    together: Annotated[
        bool, typer.Option("--together", help="All the layers at once, not one after the other.")
    ] = False,
    by_text: ByTextOption = False,
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> Report:
    """The probability of the behaviour's answer, over layers and multipliers."""
    from mia.datasets.choices import select_items
    from mia.methods.caa_evaluation import evaluate as method
    from mia.ranges import parse_numbers

    numbers = parse_numbers(multipliers, "--multipliers")
    questions = select_items(data, items)
    with open_model(model) as m:
        return method(
            m,
            vector,
            questions,
            layers=layers,
            multipliers=numbers,
            together=together,
            by_text=by_text,
            bos=bos,
            seed=seed,
        )
