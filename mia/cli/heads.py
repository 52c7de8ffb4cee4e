"""Commands about single heads: heads (scores) and ablate."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mia.cli._build import changes, open_model, prompt_ids
from mia.cli._command import command, refuse
from mia.cli._groups import (
    AnswerOption,
    ChangeOptions,
    HeadsOption,
    ModelOptions,
    PromptOptions,
    PromptsOption,
    SeedOption,
    TopOption,
)
from mia.errors import UsageError
from mia.show.report import Report

PANEL = "Heads"


def register(app: typer.Typer) -> None:
    command(
        app,
        "heads",
        panel=PANEL,
        plot=True,
        examples=[
            "mia heads --repeat-random 25 --plot heads.png",
            "mia heads --repeat-random 25 --ablate-top 5 --prompts 4",
            "mia heads -p 'The cat sat. The cat' --bos",
        ],
    )(heads)
    command(
        app,
        "ablate",
        panel=PANEL,
        plot=True,
        examples=[
            "mia ablate -p 'The capital of France is' --bos --answer ' Paris'",
            "mia ablate -p 'The capital of France is' --bos --answer ' Paris' --heads '10..12.*'",
        ],
    )(ablate)


def heads(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    repeat_random: Annotated[
        int | None,
        typer.Option(
            "--repeat-random", help="Score on prompts of N random tokens, repeated, BOS in front."
        ),
    ] = None,
    prompts: PromptsOption = 8,
    seed: SeedOption = 0,
    ablate_top: Annotated[
        int,
        typer.Option(
            "--ablate-top",
            help="Also the loss on the second copy without the K best induction heads, and "
            "without K random ones.",
            min=0,
        ),
    ] = 0,
    draws: Annotated[
        int, typer.Option("--draws", help="How often K random heads are drawn.", min=1)
    ] = 5,
    score: Annotated[
        Literal["previous", "duplicate", "induction", "entropy"],
        typer.Option("--score", help="The score that a picture and a terminal show."),
    ] = "induction",
    top_k: TopOption = 10,
) -> Report:
    """Previous-token, duplicate-token and induction scores of every head, and entropy (Olsson 2022).

    Scores are mean attention weights from 0 to 1; entropy is in nats.
    """
    from mia.methods import heads as method

    given = prompt.prompt is not None or prompt.prompt_file is not None
    if given == (repeat_random is not None):
        raise UsageError("give either a prompt (-p, -f) or --repeat-random N")
    if ablate_top and repeat_random is None:
        raise UsageError("--ablate-top needs --repeat-random N: the loss is that of copying")
    if repeat_random is None:
        refuse(("prompts", "seed"), "needs --repeat-random N")
    else:
        refuse(("chat", "keep_newline"), "needs a prompt (-p, -f)")
    if not ablate_top:
        refuse(("draws",), "needs --ablate-top K")
    changed = changes(change)
    with open_model(model, small_effects=ablate_top > 0) as m:
        text: list[int] | method.RandomRepeats
        if repeat_random is None:
            text = prompt_ids(m, prompt)
        else:
            bos = prompt.bos is not False
            text = method.RandomRepeats(repeat_random, prompts, seed=seed, bos=bos)
        return method.heads(
            m,
            text,
            k=top_k,
            score=score,
            ablate_top=ablate_top,
            draws=draws,
            changes=changed,
        )


def ablate(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    answer: AnswerOption,
    heads: HeadsOption = None,
    token_idx: Annotated[
        str | None,
        typer.Option(
            "--token-idx",
            help="Tokens of the prompt: -1, 3..7, 1,4; default: those that predict the answer; * is "
            "all, which is slower.",
        ),
    ] = None,
    top_k: TopOption = 10,
) -> Report:
    """Ablate every head in turn, in one run: how much less likely the answer becomes.

    --ablate-with and --ablate-attention say how. --ablate, --select, --block, --patch and --steer
    change every run, the one it is compared with too.
    """
    from mia.methods import ablation

    changed = changes(change)
    with open_model(model, small_effects=True) as m:
        return ablation.ablate(
            m,
            prompt_ids(m, prompt),
            answer,
            heads=heads,
            tokens=token_idx,
            changes=changed,
            k=top_k,
        )
