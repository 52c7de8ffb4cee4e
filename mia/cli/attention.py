"""The command `attention`: what each head attends to, as a picture, a page, numbers or cells."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import changes, open_model, prompt_ids
from mia.cli._command import command
from mia.cli._groups import (
    ChangeOptions,
    HeadsOption,
    LayersOption,
    ModelOptions,
    PromptOptions,
    TopOption,
)
from mia.show.report import Report

PANEL = "Heads"


def register(app: typer.Typer) -> None:
    command(
        app,
        "attention",
        panel=PANEL,
        plot=True,
        page=True,
        files=[".safetensors"],
        examples=[
            "mia attention -p 'The capital of France is' --bos --layers 3,4 -k 3",
            "mia attention -p 'The capital of France is' --bos --heads 18.6,3.* --plot maps.html",
            "mia attention -p 'The capital of France is' --bos -o maps.safetensors",
        ],
    )(attention)


def attention(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    layers: LayersOption = None,
    heads: HeadsOption = None,
    token_idx: Annotated[
        str,
        typer.Option(
            "--token-idx",
            help="Tokens of the prompt: -1, 3..7, 1,4; default: the last, whose strongest keys are listed.",
        ),
    ] = "-1",
    top_k: TopOption = 5,
    value_weighted: Annotated[
        bool,
        typer.Option(
            "--value-weighted", help="Multiply each weight by the norm of the value it moves."
        ),
    ] = False,
) -> Report:
    """What each head attends to, by token. -o FILE.safetensors writes (n_layer, n_head, n_query, n_key).

    Reading patterns needs flash attention off: this command, --block and --ablate-attention turn
    it off; elsewhere it is on if the cache type supports it.
    """
    from mia.methods import attention as method
    from mia.ranges import parse_token

    changed = changes(change)
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        return method.attention(
            m,
            ids,
            layers=layers,
            heads=heads,
            token=parse_token(token_idx, len(ids), "--token-idx"),
            k=top_k,
            value_weighted=value_weighted,
            edits=changed.edits(m, ids),
        )
