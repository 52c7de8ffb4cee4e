"""The command `bake`: an edit becomes a file that llama.cpp's own programs run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mia.cli._build import open_model, prompt_ids
from mia.cli._command import command, option, refuse
from mia.cli._groups import CHANGES, CoeffOption, KlBudgetOption, ModelOptions, PromptOptions
from mia.show.report import Report


def register(app: typer.Typer) -> None:
    command(
        app,
        "bake",
        panel="Run and change",
        examples=[
            "mia bake love.gguf -o without.gguf --direction-layer 14",
            "mia bake love.gguf -o without.gguf --direction-layer 14 --kl-budget 0.1 -f mine.txt",
            "mia bake love.gguf -o without-f16.gguf --kind model --weight-type f16",
            "mia bake love.gguf -o more.gguf --kind control-vector --coeff 2",
            "mia bake --ablate 3.5,4.0 -o without-heads.gguf",
        ],
    )(bake)


def bake(
    model: ModelOptions,
    prompt: PromptOptions,
    out: Annotated[str, typer.Option("-o", "--out", help="The file to write: .gguf.")],
    vector: Annotated[
        str | None, typer.Argument(help='A vector file, or arithmetic: "a.gguf - 0.5*b.gguf".')
    ] = None,
    kind: Annotated[
        Literal["lora", "model", "control-vector"],
        typer.Option(
            "--kind",
            help="lora: remove the vector's direction by an adapter beside the model; model: by a new "
            "model file; control-vector: add the vector.",
        ),
    ] = "lora",
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Layers: 3,7 or 10..20; default: all that the vector has."),
    ] = None,
    direction_layer: Annotated[
        int | None,
        typer.Option(
            "--direction-layer", help="Use this layer's direction in all layers (or in --layers)."
        ),
    ] = None,
    coeff: CoeffOption = None,
    kl_budget: KlBudgetOption = None,
    embedding: Annotated[
        bool,
        typer.Option("--embedding", help="Also remove the direction from the token embeddings."),
    ] = False,
    weight_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(
            "--weight-type", help="Store the changed matrices in this type, not in their own."
        ),
    ] = None,
    ablate: Annotated[
        str | None,
        option("--ablate", help="Heads to ablate, as LAYER.HEAD: 3.5,4.0,7.*", panel=CHANGES),
    ] = None,
) -> Report:
    """Write what an edit does into a file for llama.cpp's own programs, and test that it does the
    same: with what fraction of a direction (--coeff: 1 is all of it) attention and MLP no longer
    write, or what is added to the residual.

    The file is compared with the edit on neutral text, and on the prompt if there is one; one that
    does something else is not written."""
    from mia.methods.bake import bake as method, source_of
    from mia.ranges import parse_numbers

    if ablate is not None:
        refuse(("coeff", "kl_budget", "layers", "direction_layer", "embedding"), "is for a vector")
    with open_model(model) as m:
        given = prompt.prompt is not None or prompt.prompt_file is not None
        return method(
            m,
            source_of(m, vector, ablate),
            out,
            kind=kind,
            layers=layers,
            direction_layer=direction_layer,
            strength=1.0 if coeff is None else parse_numbers(coeff, "--coeff"),
            embedding=embedding,
            prompts=[prompt_ids(m, prompt)] if given else (),
            kl_budget=kl_budget,
            weight_type=weight_type,
        )
