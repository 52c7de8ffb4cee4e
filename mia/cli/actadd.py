"""actadd: activation addition, the difference of two prompts added to a third."""

from __future__ import annotations

from typing import Annotated

import typer

from mia.cli._build import open_model, prompt_ids, sampling
from mia.cli._command import command, option
from mia.cli._groups import (
    CHANGES,
    BaselineOption,
    CoeffOption,
    GenerationOptions,
    ModelOptions,
    PromptOptions,
)
from mia.errors import UsageError
from mia.show.report import Report

_EXAMPLE = "mia actadd --plus Love --minus Hate --coeff 3 -p 'I hate you because' --bos"


def register(app: typer.Typer) -> None:
    command(
        app,
        "actadd",
        panel="Run and change",
        examples=[_EXAMPLE, f"{_EXAMPLE} --samples 3 --temperature 1"],
    )(actadd)


def actadd(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    plus: Annotated[list[str], option("--plus", help="Toward this prompt.", panel=CHANGES)],
    minus: Annotated[
        list[str] | None,
        option("--minus", help="Away from this one; default a space.", panel=CHANGES),
    ] = None,
    coeff: CoeffOption = None,
    layers: Annotated[
        str, option("--layers", help="Layers: 3,7 or 10..20; default 6.", panel=CHANGES)
    ] = "6",
    samples: Annotated[
        int | None,
        option("--samples", help="Texts to sample, with seeds that follow --seed.", min=1),
    ] = None,
    baseline: BaselineOption = True,
) -> Report:
    """Add the difference of two prompts' activations before a block, at the first tokens of a
    prompt. --plus and --minus may be repeated; --coeff and --layers then have one number for all,
    or one for each. --samples N prints N steered and unsteered samples side by side."""
    from mia.methods import actadd as method
    from mia.ranges import parse_numbers

    if samples is not None and not baseline:
        raise UsageError("--samples cannot be combined with --no-baseline")
    coeffs = parse_numbers(coeff or "1", "--coeff", repeats=True)
    with open_model(model) as m:
        ids = prompt_ids(m, prompt)
        additions = method.additions(m, plus, minus or (), coeffs=coeffs, layers=layers)
        n, how = generation.n_predict, sampling(generation)
        if samples is not None:
            return method.compare(m, ids, additions, n=samples, n_predict=n, sampling=how)
        return method.add(m, ids, additions, n_predict=n, sampling=how, baseline=baseline)
