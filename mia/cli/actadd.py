"""actadd: activation addition, the difference of two prompts added to a third."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import (
    CHANGES,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
)
from mia.cli._output import finish, model_facts, progress, token_list
from mia.cli.run import BaselineOption, generate, print_generation
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.methods.actadd import Addition
    from mia.model import Model


def register(app: typer.Typer) -> None:
    command(app, name="actadd")(actadd)


def _change(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=CHANGES)


def actadd(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    output: OutputOptions,
    plus: Annotated[list[str], _change("--plus", help="Toward this prompt; may be repeated.")],
    minus: Annotated[
        list[str] | None, _change("--minus", help="Away from this one; as often as --plus.")
    ] = None,
    coeff: Annotated[
        list[float] | None, _change("--coeff", help="How much; once, or for each --plus.")
    ] = None,
    layer: Annotated[
        list[int] | None,
        _change("--layer", help="Before which block; once, or for each --plus. Default 6."),
    ] = None,
    compare: Annotated[
        int | None,
        typer.Option(
            "--compare",
            help="Show N steered and unsteered samples beside each other.",
            rich_help_panel=CHANGES,
            min=1,
        ),
    ] = None,
    baseline: BaselineOption = True,
) -> None:
    """Add the difference of two prompts' activations to the first tokens of a prompt."""
    from mia.methods import actadd as method

    if compare is not None and not baseline:
        raise UsageError("--compare shows the unsteered samples too; it takes no --no-baseline")
    if compare is not None and generation.temperature == 0:
        raise UsageError(
            "--compare shows samples; give --temperature (1 is the model's own, 0 always the same)"
        )
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        additions = _additions(m, plus, minus or [], coeff or [1.0], layer or [6])
        # the contrast gets a BOS where the prompt has one
        bos = m.bos_token >= 0 and ids[0] == m.bos_token
        edits = method.edits(m, additions, len(ids), bos=bos)
        if not bos:
            _work.warn_first_tokens(m, ids, [0], output)
        added = [_described(m, a, bos) for a in additions]
        if compare is None:
            document, _ = generate(m, ids, edits, generation, baseline=baseline, output=output)
            document["additions"] = added
            finish(document, output, lambda: print_generation(document))
            return
        with progress("sampling", output):
            samples = method.compare(
                m,
                ids,
                edits,
                n=compare,
                n_predict=generation.n_predict,
                sampling=_work.sampling(generation),
            )
        document = {
            "model": model_facts(m),
            "tokens": token_list(m, ids),
            "additions": added,
            "samples": [
                {"seed": s.seed, "baseline": s.plain, "output": s.steered} for s in samples
            ],
        }
        finish(document, output, lambda: _print(document["samples"]))


def _additions(
    m: Model, plus: list[str], minus: list[str], coeffs: list[float], layers: list[int]
) -> list[Addition]:
    from mia.methods.actadd import Addition

    n = len(plus)
    minus = minus or [" "] * n
    for name, values in (("--minus", minus), ("--coeff", coeffs), ("--layer", layers)):
        if len(values) not in ((n,) if name == "--minus" else (1, n)):
            raise UsageError(f"{n} --plus are given and {len(values)} {name}")
    coeffs = coeffs * n if len(coeffs) == 1 else coeffs
    layers = layers * n if len(layers) == 1 else layers
    made = zip(plus, minus, coeffs, layers, strict=True)
    return [Addition(p, q, c, i + m.n_layer if i < 0 else i) for p, q, c, i in made]


def _described(m: Model, a: Addition, bos: bool) -> dict[str, Any]:
    """An addition with the tokens of both texts as they are set against each other."""
    from mia.methods.actadd import padded

    plus, minus = padded(m, a.plus, a.minus, bos=bos)
    return {
        "plus": a.plus,
        "minus": a.minus,
        "coeff": a.coeff,
        "layer": a.layer,
        "plus_tokens": token_list(m, plus),
        "minus_tokens": token_list(m, minus),
    }


def _print(samples: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from mia.cli._output import console, on_terminal

    if not on_terminal():
        for s in samples:
            print(f"{s['seed']} unsteered: {s['baseline']!r}")
            print(f"{s['seed']} steered:   {s['output']!r}")
        return
    table = Table("seed", "unsteered", "steered", show_lines=True)
    for s in samples:
        table.add_row(str(s["seed"]), s["baseline"], s["output"])
    console().print(table)
