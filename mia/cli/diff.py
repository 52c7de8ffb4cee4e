"""The command `diff`: two files of one model side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from mia.cli._build import open_model, prompt_ids
from mia.cli._command import command, option, refuse
from mia.cli._groups import (
    MODEL,
    AsOption,
    CtxOption,
    GpuLayersOption,
    ModelOptions,
    NullOption,
    PromptOptions,
    SteerCoeffOption,
    SteerLayersOption,
    SteerOption,
    ThreadsOption,
    TopOption,
)
from mia.show.report import Report


@dataclass
class SetupOptions:
    """How the two models are opened."""

    threads: ThreadsOption = None
    gpu_layers: GpuLayersOption = None
    ctx: CtxOption = None
    as_type: AsOption = None

    lora_a: Annotated[
        list[str] | None,
        option(
            "--lora-a",
            help="A LoRA adapter to add to A's weights, =0.5 behind its name for half of it. May be "
            "repeated.",
            panel=MODEL,
            metavar="FILE[=SCALE]",
        ),
    ] = None
    lora_b: Annotated[
        list[str] | None,
        option(
            "--lora-b",
            help="The same for B: the file with and without an adapter.",
            panel=MODEL,
            metavar="FILE[=SCALE]",
        ),
    ] = None

    def of(self, model: str, lora: list[str] | None) -> ModelOptions:
        return ModelOptions(
            model,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
            ctx=self.ctx,
            as_type=self.as_type,
            lora=lora,
        )


def register(app: typer.Typer) -> None:
    command(
        app,
        "diff",
        panel="Look inside",
        plot=True,
        examples=[
            "mia diff smollm2-f16.gguf smollm2 -f book.txt --plot diff.png",
            "mia diff base.gguf finetuned.gguf -p 'The capital of France is' --bos",
            "mia diff base.gguf base.gguf --lora-b style.gguf -f book.txt",
            "mia diff smollm2-f16.gguf smollm2 -f book.txt --diff-window 256 --blame-tokens 0",
            "mia diff base.gguf finetuned.gguf -f book.txt --steer love.gguf --sweep map.json",
        ],
    )(diff)


def diff(
    a: Annotated[str, typer.Argument(help="The base: a .gguf file, or a name (mia models).")],
    b: Annotated[str, typer.Argument(help="The file that is compared with it.")],
    setup: SetupOptions,
    prompt: PromptOptions,
    diff_window: Annotated[
        int,
        typer.Option(
            "--diff-window",
            help="Tokens read at a time, as llama-perplexity's -c: the second half of each window is "
            "scored; of a text of less than two windows, all.",
            min=4,
        ),
    ] = 512,
    lens_tokens: Annotated[
        int,
        typer.Option("--lens-tokens", help="Tokens at which the lens is read, 0 for none.", min=0),
    ] = 64,
    blame_tokens: Annotated[
        int,
        typer.Option(
            "--blame-tokens",
            help="The text's first tokens, of which the blame is run, 0 for none.",
            min=0,
        ),
    ] = 64,
    null: NullOption = 4,
    steer: SteerOption = None,
    steer_coeff: SteerCoeffOption = None,
    steer_layers: SteerLayersOption = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", help="A result of mia sweep on A: run it on B and compare."),
    ] = None,
    top_k: TopOption = 10,
) -> Report:
    """Two files of one model, layer by layer: tensors, residuals, lens, predictions, and the blame.

    The blame puts each of B's blocks alone into A, and A's residual and parts into B, and measures what
    that does to the predictions. KL and perplexity are as llama-perplexity gives them.
    --steer and --sweep try on both files what was made on A. One file twice, with --lora-b, shows what an
    adapter does.
    """
    from mia.methods.diff import diff as method
    from mia.methods.transfer import Made

    if not steer:
        refuse(("steer_coeff", "steer_layers"), "needs --steer")
    made = Made(
        steer=" + ".join(steer) if steer else None,
        coeff=1.0 if steer_coeff is None else steer_coeff,
        layers=steer_layers,
        sweep=sweep,
    )
    if not blame_tokens:
        refuse(("null", "top_k"), "is of the blame, and --blame-tokens 0 asks for none")
    with (
        open_model(setup.of(a, setup.lora_a)) as base,
        open_model(setup.of(b, setup.lora_b)) as other,
    ):
        return method(
            base,
            other,
            prompt_ids(base, prompt),
            window=diff_window,
            lens_tokens=lens_tokens,
            blame_tokens=blame_tokens,
            null=null,
            made=made,
            k=top_k,
        )
