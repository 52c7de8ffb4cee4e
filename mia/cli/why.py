"""The command `why`: which spans of the prompt and which parts of the model made the answer."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import open_model, prompt_ids, unescaped
from mia.cli._command import command
from mia.cli._groups import ModelOptions, NullOption, PromptOptions, SeedOption
from mia.show.report import Report


def register(app: typer.Typer) -> None:
    command(
        app,
        "why",
        panel="Look inside",
        plot=True,
        examples=[
            "mia why -f question.txt --bos",
            "mia why -f question.txt --bos --answer ' Paris' --spans lines -o why.html",
            "mia why -p 'The Eiffel Tower is in the city of' --bos --plot why.png",
        ],
    )(why)


def why(
    model: ModelOptions,
    prompt: PromptOptions,
    answer: Annotated[
        str,
        typer.Option(
            "--answer",
            help='What should follow the prompt, like " Paris"; default: the first word that the model says.',
        ),
    ] = "",
    spans: Annotated[
        str,
        typer.Option(
            "--spans",
            help="How the prompt is cut: sentences, lines, clauses, words, tokens, a number of tokens, "
            "or ranges of tokens like 1..7,8..12.",
        ),
    ] = "auto",
    parts: Annotated[
        bool,
        typer.Option(
            "--parts/--no-parts", help="Also the causal map, heads, MLPs and lens, not spans alone."
        ),
    ] = True,
    null: NullOption = 6,
    seed: SeedOption = 0,
    top_k: Annotated[
        int, typer.Option("-k", "--top-k", help="How many of the best to list.", min=1)
    ] = 5,
) -> Report:
    """Which spans of the prompt and which parts of the model made the answer.

    Each span is hidden from all that stands behind it, and shown alone: what does the answer lose and
    gain? -o why.html writes all of it as one page.
    """
    from mia.methods.why import why as method

    with open_model(model, small_effects=True) as m:
        return method(
            m,
            prompt_ids(m, prompt),
            answer=unescaped(answer),
            spans=spans,
            parts=parts,
            null=null,
            seed=seed,
            k=top_k,
        )
