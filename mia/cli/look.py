"""Commands that only look: tokens, sites, logit-lens, save."""

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
    command(app, "tokens", panel=PANEL, examples=["mia tokens -p 'Q: France\\nA:' --bos"])(tokens)
    command(app, "sites", panel=PANEL, examples=["mia sites", "mia sites --graph"])(sites)
    command(
        app,
        "logit-lens",
        panel=PANEL,
        plot=True,
        examples=[
            "mia logit-lens l_out -p 'The capital of France is' --bos",
            "mia logit-lens l_out-15..29 -p 'Paris is the capital of' --bos --plot lens.png",
            "mia logit-lens kqv_out-20..29 -p 'The capital of France is' --bos --token-idx -1 -k 3",
        ],
    )(logit_lens)
    command(
        app,
        "save",
        panel=PANEL,
        examples=["mia save l_out-14 task.safetensors -p 'Q: France\\nA:'"],
    )(save)


def tokens(model: ModelOptions, prompt: PromptOptions) -> Report:
    """Index, id and text of every token of a prompt, and whether the prompt starts with a BOS."""
    from mia.methods import overview
    from mia.notices import MissingBos, notice

    with open_model(model) as m:
        report = overview.tokens(m, prompt_ids(m, prompt))
        if prompt.bos is None and not report.bos and m.bos_token >= 0:
            notice(f"no BOS in front; --bos puts {m.piece(m.bos_token)} there", MissingBos)
        return report


def sites(
    model: ModelOptions,
    graph: Annotated[
        bool, typer.Option("--graph", help="List every node of the graph instead.")
    ] = False,
) -> Report:
    """Every site that this model has: names, shape of one token's row, layers, node of the graph."""
    from mia.methods import overview

    with open_model(model) as m:
        return overview.graph(m) if graph else overview.sites(m)


def logit_lens(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    sites: Annotated[
        list[str] | None,
        typer.Argument(
            help="Sites to read: l_out (default), kqv_out-10..20, resid_mid, …, or all."
        ),
    ] = None,
    top_k: TopOption = 5,
    layers: LayersOption = None,
    token_idx: TokensOption = None,
    norm: Annotated[
        bool,
        typer.Option(
            "--norm/--no-norm",
            help="--no-norm leaves out the division by the RMS, as the first tool did.",
        ),
    ] = True,
    colour_by: Annotated[
        Literal["probability", "entropy"],
        typer.Option("--colour-by", "--color-by", help="What a picture's colours say."),
    ] = "probability",
) -> Report:
    """What each layer would say next: final norm and unembedding applied to any residual (nostalgebraist 2020)."""
    from mia.methods import logit_lens as method

    changed = changes(change)
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        return method.logit_lens(
            m,
            ids,
            sites or "l_out",
            top_k,
            layers=layers,
            tokens="*" if token_idx is None else token_idx,
            edits=changed.edits(m, ids),
            norm=norm,
            colour_by=colour_by,
        )


def save(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    site: Annotated[
        str, typer.Argument(help="l_out-14, kqv_out, head_out-3,7 …; several joined by +.")
    ],
    file: Annotated[str, typer.Argument(help="The safetensors file to write.")],
) -> Report:
    """Save activations of a prompt: one tensor per site, a row per token."""
    from mia.io.files import check_writable
    from mia.methods.patching import today
    from mia.notices import notice

    check_writable(file)
    changed = changes(change)
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        sites = [today(part) for part in site.split("+")]
        activations = m.look(ids, sites, edits=changed.edits(m, ids))
        activations.save(file)
        notice(f"wrote {file}")
        return activations
