"""Commands that steer a prompt with vectors: steer, steer-explain, steer-words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mia.cli._build import open_model, prompt_ids, sampling
from mia.cli._command import command, option
from mia.cli._groups import (
    ALIASES,
    CHANGES,
    BaselineOption,
    CoeffOption,
    GenerationOptions,
    KlBudgetOption,
    ModelOptions,
    PromptOptions,
    SampledOptions,
)
from mia.show.report import Report

if TYPE_CHECKING:
    from mia.methods.steer import SteeringOptions

PANEL = "Run and change"
_PROMPT = "-p 'I went to the cinema and the film was' --bos"

VectorsArgument = Annotated[
    list[str], typer.Argument(help='Vector files, or arithmetic: "a.gguf - 0.5*b.gguf".')
]


@dataclass
class SteerOptions:
    coeff: CoeffOption = None
    layers: Annotated[
        str | None,
        option(
            "--layers",
            help="Layers: 3,7 or 10..20; default: all that the vector has.",
            panel=CHANGES,
        ),
    ] = None
    operator: Annotated[
        str,
        option(
            "--operator",
            help="add, project_out (or ablate), project_out_add (or ablate-add), replace, mean, "
            "blend, clamp, cap, or your module:function.",
            panel=CHANGES,
        ),
    ] = "add"
    where: Annotated[
        Literal["all", "prompt", "generated"],
        option("--where", help="Steer all tokens, the prompt's or generated ones.", panel=CHANGES),
    ] = "all"
    token_idx: Annotated[
        str | None,
        option("--token-idx", help="Tokens of the prompt: -1, 3..7, 1,4.", panel=CHANGES),
    ] = None
    normalize: Annotated[
        bool, option("--normalize", help="Keep the norm of what is steered.", panel=CHANGES)
    ] = False


def register(app: typer.Typer) -> None:
    command(
        app,
        "steer",
        panel=PANEL,
        examples=[
            f"mia steer love.gguf {_PROMPT} --coeff 1,2",
            f"mia steer love.gguf {_PROMPT} --kl-budget 0.3",
        ],
    )(steer)
    command(
        app,
        "steer-explain",
        panel=PANEL,
        examples=[f"mia steer-explain love.gguf {_PROMPT} --operator ablate"],
    )(explain)
    command(
        app,
        "steer-words",
        panel=PANEL,
        examples=[f"mia steer-words love.gguf {_PROMPT} --coeff 2 --words positive_words"],
    )(words)


def steer(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    change: SteerOptions,
    vectors: VectorsArgument,
    kl_budget: KlBudgetOption = None,
    baseline: BaselineOption = True,
) -> Report:
    """Continue a prompt while vectors are added to what the model computes; several coefficients
    are shown side by side."""
    from mia.methods.steer import steer as method

    coeffs, how = _coeffs(change), _how(change)
    with open_model(model) as m:
        return method(
            m,
            prompt_ids(m, prompt),
            vectors,
            coeffs=coeffs,
            how=how,
            kl_budget=kl_budget,
            n_predict=generation.n_predict,
            sampling=sampling(generation),
            baseline=baseline,
        )


def explain(
    model: ModelOptions, prompt: PromptOptions, change: SteerOptions, vectors: VectorsArgument
) -> Report:
    """Which path each edit of `mia steer` takes, llama.cpp's control vector or mia's callback, and
    why; nothing is run."""
    from mia.methods.steer import explain as method

    coeffs, how = _coeffs(change), _how(change)
    with open_model(model) as m:
        return method(m, prompt_ids(m, prompt), vectors, coeffs=coeffs, how=how)


def words(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: SampledOptions,
    change: SteerOptions,
    vectors: VectorsArgument,
    words: Annotated[
        str, typer.Option("--words", help="A word list, or a shipped one (french_words).")
    ],
    samples: Annotated[
        int,
        typer.Option("--samples", help="Texts to sample, with seeds that follow --seed.", min=2),
    ] = 20,
) -> Report:
    """The share of listed words in sampled texts, with and without steering."""
    from mia.methods.listed_words import listed_words

    coeffs, how = _coeffs(change), _how(change)
    with open_model(model) as m:
        return listed_words(
            m,
            prompt_ids(m, prompt),
            vectors,
            words,
            coeffs=coeffs,
            how=how,
            samples=samples,
            n_predict=generation.n_predict,
            sampling=sampling(generation),
        )


def _coeffs(o: SteerOptions) -> list[float] | None:
    from mia.ranges import parse_numbers

    return None if o.coeff is None else parse_numbers(o.coeff, "--coeff")


def _how(o: SteerOptions) -> SteeringOptions:
    from mia.methods.steer import SteeringOptions

    return SteeringOptions(
        operator=ALIASES.get(o.operator, o.operator),
        layers=o.layers,
        where=o.where,
        tokens=o.token_idx,
        keep_norm=o.normalize,
    )
