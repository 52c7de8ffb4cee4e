"""The command `experts`: which experts of a mixture each token goes to."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mia.cli._build import changes, open_model, prompt_ids
from mia.cli._command import command
from mia.cli._groups import (
    ChangeOptions,
    LayersOption,
    ModelOptions,
    PromptOptions,
    TokensOption,
    TopOption,
)
from mia.show.report import Report

PANEL = "Look inside"


def register(app: typer.Typer) -> None:
    command(
        app,
        "experts",
        panel=PANEL,
        plot=True,
        page=True,
        examples=[
            "mia experts -m mixture.gguf -p 'The capital of France is'",
            "mia experts -m mixture.gguf -p 'The capital of France is' --view load --plot load.png",
            "mia experts -m mixture.gguf -p 'The capital of France is' --ablate-experts 3.5,4.0-3",
        ],
    )(experts)


def experts(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    layers: LayersOption = None,
    token_idx: TokensOption = None,
    top_k: TopOption = 5,
    view: Annotated[
        Literal["tokens", "load"],
        typer.Option("--view", help="What a picture and a terminal show."),
    ] = "tokens",
) -> Report:
    """Which experts each token goes to, by layer, with their weights, load and entropy.

    A model without experts is refused.
    """
    from mia.methods import experts as method

    changed = changes(change)
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        return method.experts(
            m,
            ids,
            layers=layers,
            tokens="*" if token_idx is None else token_idx,
            k=top_k,
            view=view,
            edits=changed.edits(m, ids),
        )
