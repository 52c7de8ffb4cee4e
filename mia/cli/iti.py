"""iti: inference-time intervention on attention heads, trained and evaluated."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import open_model
from mia.cli._command import command, refuse
from mia.cli._groups import (
    BosOption,
    ItemsOption,
    ModelOptions,
    SeedOption,
    VectorFileOption,
)
from mia.show.report import Report

DataArgument = Annotated[
    str,
    typer.Argument(
        help="JSONL with question, correct_answers, incorrect_answers, perhaps best_answer; or a "
        "shipped A/B set, whose matching answers count as incorrect."
    ),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Inference-time intervention (Li et al. 2023).")
    command(
        group,
        "train",
        plot=True,
        examples=["mia iti train agree_vs_accurate -o iti.safetensors --items 0..39"],
    )(train)
    command(
        group,
        "eval",
        examples=["mia iti eval iti.safetensors agree_vs_accurate --items 40.. --alpha 5,15"],
    )(evaluate)
    app.add_typer(group, name="iti", rich_help_panel="Directions")


def train(
    model: ModelOptions,
    data: DataArgument,
    out: VectorFileOption,
    n_heads: Annotated[int, typer.Option("--n-heads", help="How many heads.", min=1)] = 16,
    folds: Annotated[
        int, typer.Option("--folds", help="Number of cross-validation folds.", min=2)
    ] = 2,
    items: ItemsOption = None,
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> Report:
    """Probe every head, choose the best, and write what to add there (.safetensors)."""
    from mia.datasets.choices import select_questions
    from mia.methods import iti
    from mia.vectors import check_file

    check_file(out, "head_out")
    questions = select_questions(data, items)
    with open_model(model) as m:
        report = iti.learn(m, questions, n_heads=n_heads, folds=folds, bos=bos, seed=seed)
        return report.write(out)


def evaluate(
    model: ModelOptions,
    vector: Annotated[str, typer.Argument(help="A vector file that mia iti train wrote.")],
    data: DataArgument,
    alpha: Annotated[str, typer.Option("--alpha", help="How much of the vector: 5,15 …")] = "15",
    items: ItemsOption = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Score answers by their mean log-probability.")
    ] = False,
    generate: Annotated[
        int, typer.Option("--generate", help="Also show answers to the first N questions.", min=0)
    ] = 0,
    n_predict: Annotated[
        int, typer.Option("-n", "--n-predict", help="Tokens to generate.", min=0)
    ] = 32,
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> Report:
    """Multiple choice (MC1, MC2) with and without the vector, and generated answers side by side."""
    from mia.datasets.choices import select_questions
    from mia.methods.iti_evaluation import evaluate as method
    from mia.ranges import parse_numbers

    if not generate:
        refuse(("n_predict",), "needs --generate N")
    alphas = parse_numbers(alpha, "--alpha")
    questions = select_questions(data, items)
    with open_model(model) as m:
        return method(
            m,
            vector,
            questions,
            alphas=alphas,
            per_token=per_token,
            n_answers=generate,
            n_predict=n_predict,
            bos=bos,
            seed=seed,
        )
