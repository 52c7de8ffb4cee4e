"""Commands that continue a prompt: run, patch."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import changes, open_model, prompt_ids, sampling
from mia.cli._command import OUTPUT, command, given, refuse, split_words
from mia.cli._groups import (
    BaselineOption,
    ChangeOptions,
    GenerationOptions,
    ModelOptions,
    PromptOptions,
)
from mia.errors import UsageError
from mia.show.report import Report
from mia.show.streams import on_terminal, write_part

PANEL = "Run and change"


def register(app: typer.Typer) -> None:
    command(
        app,
        "run",
        panel=PANEL,
        examples=[
            "mia run -p 'The capital of France is' --bos -n 8",
            "mia run -p 'The capital of France is' --bos -n 8 --ablate 3.5,4.* --block '5->0'",
        ],
    )(run)
    command(
        app,
        "patch",
        panel=PANEL,
        examples=["mia patch l_out-21 task.safetensors -p 'Q: France\\nA:' --bos -n 1"],
    )(patch)


def run(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    change: ChangeOptions,
    save: Annotated[
        list[str] | None,
        typer.Option(
            "--save",
            help="SITE FILE: save activations of the changed run. May be repeated.",
            metavar="SITE FILE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    baseline: BaselineOption = True,
) -> Report:
    """Continue a prompt, with any changes and captures together."""
    from dataclasses import replace

    from mia.io.files import check_writable
    from mia.methods.patching import today
    from mia.notices import notice
    from mia.request import Capture

    changed = changes(change)
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        saves = [(Capture(today(site)), file) for site, file in split_words(save)]
        for _, file in saves:
            check_writable(file)
        edits = changed.edits(m, ids)
        if not edits and given("baseline"):
            notice("nothing is changed, so that there is one run with or without --baseline")
        live = on_terminal() and not (given("json") or given("out") or (edits and baseline))
        report = m.generate(
            ids,
            generation.n_predict,
            edits=edits,
            captures=[capture for capture, _ in saves],
            sampling=sampling(generation),
            baseline=baseline,
            on_text=write_part if live else None,
        )
        for capture, file in saves:
            m.activations(ids, report.result, capture).save(file)
            notice(f"wrote {file}")
        return replace(report, is_written=True) if live else report


def patch(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    change: ChangeOptions,
    site: Annotated[str, typer.Argument(help="Where: l_out-14, l_out-10..20, kqv_out-3 …")],
    files: Annotated[
        list[str] | None, typer.Argument(help="Files of activations (mia save), or .npy.")
    ] = None,
    from_token_idx: Annotated[
        str, typer.Option("--from-token-idx", help="Tokens of the file: 13, -1, 3..7.")
    ] = "-1",
    to_token_idx: Annotated[
        str, typer.Option("--to-token-idx", help="Tokens of this prompt.")
    ] = "-1",
    subtract_token: Annotated[
        list[str] | None,
        typer.Option(
            "--subtract-token", help="Remove this token's unembedding direction from the site."
        ),
    ] = None,
    baseline: BaselineOption = True,
) -> Report:
    """Run a prompt with activations of another run in it (activation patching by token index)."""
    from mia.methods.patching import patches

    if not files and not subtract_token:
        raise UsageError("give a file of activations (mia save makes one), or --subtract-token")
    if not files:
        refuse(("from_token_idx",), "needs a file of activations")
    changed = changes(change, patched=bool(files))
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        edits = patches(
            m,
            ids,
            site,
            files or [],
            from_tokens=from_token_idx,
            to_tokens=to_token_idx,
            mode=change.patch_mode or "replace",
            subtract_tokens=subtract_token or [],
        )
        return m.generate(
            ids,
            generation.n_predict,
            edits=[*edits, *changed.edits(m, ids)],
            sampling=sampling(generation),
            baseline=baseline,
        )
