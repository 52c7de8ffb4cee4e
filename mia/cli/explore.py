"""The command `explore`: one text and all that the model computes at its tokens, as a page."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import changes, open_model, prompt_ids, sampling
from mia.cli._command import command, given
from mia.cli._groups import (
    BaselineOption,
    ChangeOptions,
    GenerationOptions,
    ModelOptions,
    PromptOptions,
    TopOption,
)
from mia.show.report import Report

PANEL = "Look inside"


def register(app: typer.Typer) -> None:
    command(
        app,
        "explore",
        panel=PANEL,
        examples=[
            "mia explore -p 'The capital of France is' --bos -n 12 -o page.html",
            "mia explore -f prompt.txt --chat --branches 5 -o page.html",
            "mia explore -p 'The capital of France is' --bos --ablate 3.5,4.0 -o page.html",
        ],
    )(explore)


def explore(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    change: ChangeOptions,
    top_k: TopOption = 5,
    branches: Annotated[
        int,
        typer.Option(
            "--branches",
            help="Alternatives of each generated token whose continuations are computed.",
            min=0,
        ),
    ] = 3,
    baseline: BaselineOption = True,
) -> Report:
    """Continue a prompt and explore the text: -o FILE.html writes a page that needs nothing else.

    For each token: what each layer would say, what else it could have been and what would have
    followed, where the heads look, and which parts and tokens made it. With changes the page has the
    unchanged text and the changed one.
    """
    from mia.methods import explore as method
    from mia.notices import notice

    changed = changes(change)
    with open_model(model) as m:
        report = method.explore(
            m,
            prompt_ids(m, prompt),
            n_predict=generation.n_predict,
            k=top_k,
            branches=branches,
            sampling=sampling(generation),
            changes=changed,
            baseline=baseline,
        )
        if given("baseline") and report.label == "the text":
            notice("nothing is changed, so that there is one text with or without --baseline")
        return report
