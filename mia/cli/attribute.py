"""The command `attribute`: what each part of the model writes into the answer's logit."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import changes, open_model, prompt_ids
from mia.cli._command import command
from mia.cli._groups import (
    AgainstOption,
    AnswerOption,
    ChangeOptions,
    ModelOptions,
    PromptOptions,
    TopOption,
)
from mia.show.report import Report

PANEL = "Heads"


def register(app: typer.Typer) -> None:
    command(
        app,
        "attribute",
        panel=PANEL,
        plot=True,
        examples=[
            "mia attribute -p 'The capital of France is' --bos --answer ' Paris'",
            "mia attribute -p 'The capital of France is' --bos --answer ' Paris' --against ' Rome'",
        ],
    )(attribute)


def attribute(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    answer: AnswerOption,
    against: AgainstOption = None,
    token_idx: Annotated[
        str,
        typer.Option(
            "--token-idx",
            help="Tokens of the prompt: -1, 3..7, 1,4; default: the last, whose logit is attributed.",
        ),
    ] = "-1",
    top_k: TopOption = 10,
) -> Report:
    """What each layer's attention and MLP, and each head, writes into the answer's logit.

    The final norm's scale is held fixed. The parts and the embedding add up to
    the logit (before soft-capping, in models that have it); this is checked and shown.
    """
    from mia.methods import attribution
    from mia.ranges import parse_token

    changed = changes(change)
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        return attribution.attribute(
            m,
            ids,
            answer,
            against=against,
            token=parse_token(token_idx, len(ids), "--token-idx"),
            k=top_k,
            edits=changed.edits(m, ids),
        )
