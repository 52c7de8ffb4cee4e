"""Commands about perplexity: perplexity, perplexity-sweep."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import changes, open_model, prompt_ids
from mia.cli._command import command, option
from mia.cli._groups import (
    CHANGES,
    BosOption,
    ChangeOptions,
    CoeffOption,
    LayersOption,
    ModelOptions,
    PromptOptions,
    SeedOption,
    SteerOption,
)
from mia.errors import UsageError
from mia.show.report import Report

PANEL = "Directions"


def register(app: typer.Typer) -> None:
    command(
        app,
        "perplexity",
        panel=PANEL,
        examples=[
            "mia perplexity -f book.txt --bos",
            "mia perplexity -p 'The quick brown fox jumps over the dog.' --steer love.gguf",
        ],
    )(perplexity)
    command(
        app,
        "perplexity-sweep",
        panel=PANEL,
        plot=True,
        examples=[
            "mia perplexity-sweep --on weddings_on --off weddings_off --plus ' weddings' --bos",
            "mia perplexity-sweep --on weddings_on --steer love.gguf --coeff 2 --plot sweep.png",
        ],
    )(sweep)


def perplexity(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ChangeOptions,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            help="Tokens read at a time; default 256, at most the context. Windows do not overlap, "
            "and all their tokens but the first are scored (llama-perplexity: the second half of "
            "windows of 512).",
            min=2,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            help="Sliding windows, N tokens apart; each scores only its last N tokens.",
            metavar="N",
            min=1,
        ),
    ] = None,
) -> Report:
    """How surprised the model is by a text, plain and under --steer, --ablate or --patch."""
    from mia.methods.perplexity import WINDOW, measure

    changed = changes(change)
    with open_model(model) as m:
        return measure(m, prompt_ids(m, prompt), changed, window=window or WINDOW, stride=stride)


def sweep(
    model: ModelOptions,
    on: Annotated[
        str | None,
        typer.Option("--on", help="On-topic texts, one per line, or a shipped file (weddings_on)."),
    ] = None,
    off: Annotated[
        str | None, typer.Option("--off", help="Off-topic texts, one per line, or a shipped file.")
    ] = None,
    steer: SteerOption = None,
    plus: Annotated[str | None, option("--plus", help="Toward this prompt.", panel=CHANGES)] = None,
    minus: Annotated[
        str | None,
        option("--minus", help="Away from this one; default a space.", panel=CHANGES),
    ] = None,
    coeff: CoeffOption = None,
    layers: LayersOption = None,
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> Report:
    """Ratio of steered to plain perplexity, by injection layer. The injection is a vector
    (--steer) or an activation addition (--plus, --minus), with one --coeff."""
    from mia.methods.actadd import Addition
    from mia.methods.perplexity_sweep import sweep as method
    from mia.ranges import parse_numbers

    texts = {k: v for k, v in (("on-topic", on), ("off-topic", off)) if v is not None}
    if not texts:
        raise UsageError("a sweep needs texts: --on FILE, --off FILE or both")
    if (plus is None) == (not steer):
        raise UsageError("a sweep injects one thing: --steer FILE, or --plus TEXT")
    if plus is None and minus is not None:
        raise UsageError("--minus needs --plus")
    coeffs = parse_numbers(coeff or "1", "--coeff")
    if len(coeffs) > 1:
        raise UsageError(f"--coeff {coeff!r}: a sweep takes one coefficient")
    injection = (
        " + ".join(steer or ()) if plus is None else Addition(plus, " " if minus is None else minus)
    )
    with open_model(model) as m:
        return method(m, texts, injection, coeff=coeffs[0], layers=layers, bos=bos, seed=seed)
