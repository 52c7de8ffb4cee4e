"""perplexity: of a text, with and without changes; or against the layer of an injection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import (
    ChangeOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
)
from mia.cli._output import finish, model_facts, progress
from mia.cli._vectors import SeedOption, layer_list, load_vector, rounded
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.edits import Edit
    from mia.model import Model


def register(app: typer.Typer) -> None:
    command(app, name="perplexity")(perplexity)


def perplexity(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    window: Annotated[int, typer.Option("--window", help="Tokens read at a time.", min=2)] = 256,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", help="layers: steered over plain perplexity, by injection layer."),
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="On-topic texts for --sweep, one per line.")
    ] = None,
    off: Annotated[
        str | None, typer.Option("--off", help="Off-topic texts for --sweep, one per line.")
    ] = None,
    plus: Annotated[
        str | None, typer.Option("--plus", help="For --sweep: an activation addition …")
    ] = None,
    minus: Annotated[str, typer.Option("--minus", help="… and what it is contrasted with.")] = " ",
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the sweep into an image file.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """How surprised the model is by a text, plain and under --steer, --ablate or --patch."""
    if sweep is not None:
        if sweep != "layers":
            raise UsageError(f"--sweep {sweep!r} is not known; known: layers")
        return _sweep(model, prompt, changes, output, on, off, plus, minus, plot, seed)
    from mia.methods.perplexity import perplexity as measure

    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        edits = _work.change_edits(m, changes, ids, output)
        with progress("reading", output) as bar:
            plain = measure(m, ids, window=window, progress=bar)
        document: dict[str, Any] = {
            "model": model_facts(m),
            "n_tokens": len(ids),
            "n_scored": len(plain.nll),
            "window": window,
            "perplexity": rounded(plain.value),
        }
        if edits:
            with progress("reading, changed", output) as bar:
                changed = measure(m, ids, edits=edits, window=window, progress=bar)
            document["changed"] = rounded(changed.value)
            document["ratio"] = rounded(changed.value / plain.value)

        def human() -> None:
            print(f"perplexity {plain.value:.3f} over {len(plain.nll)} tokens")
            if edits:
                print(
                    f"changed    {document['changed']:.3f}, {document['ratio']:.3f} times as much"
                )

        finish(document, output, human)


def _sweep(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    on: str | None,
    off: str | None,
    plus: str | None,
    minus: str,
    plot: str | None,
    seed: int,
) -> None:
    import numpy as np

    from mia import plots
    from mia.methods.perplexity import by_layer
    from mia.shipped import read_lines

    if plot is not None:
        plots.check_picture(plot)

    groups = {"on-topic": on, "off-topic": off}
    given = {k: read_lines(v) for k, v in groups.items() if v is not None}
    if not given:
        raise UsageError("--sweep layers needs texts: --on FILE, --off FILE or both")
    if (plus is None) == (not changes.steer):
        raise UsageError("--sweep layers injects one thing: --steer FILE, or --plus TEXT")
    with _work.open_model(model) as m:
        edits, layers = _injection(m, changes, plus, minus, prompt.bos)
        rng = np.random.default_rng(seed)
        rows: dict[str, Any] = {}
        for name, lines in given.items():
            texts = [m.tokenize(t, bos=prompt.bos) for t in lines]
            with progress(name, output) as bar:
                found = by_layer(m, texts, edits, layers, progress=bar)
            rows[name] = {"ratio": rounded(found.ratio), "interval": rounded(found.interval(rng))}
        document = {"model": model_facts(m), "seed": seed, "layers": layers, "sweep": rows}

        def human() -> None:
            print("layer  " + "  ".join(f"{name + ' ratio [95 %]':<26s}" for name in rows))
            for i, layer in enumerate(layers):
                cells = [
                    f"{r['ratio'][i]:.3f} [{r['interval'][i][0]:.3f}, {r['interval'][i][1]:.3f}]"
                    for r in rows.values()
                ]
                print(f"{layer:5d}  " + "  ".join(f"{c:<26s}" for c in cells))

        finish(document, output, human)
    if plot is not None:
        figure = plots.curves(
            layers,
            {k: r["ratio"] for k, r in rows.items()},
            intervals={k: tuple(np.transpose(r["interval"])) for k, r in rows.items()},
            x_label="injection layer",
            y_label="perplexity, steered / plain",
        )
        plots.save(figure, plot)


def _injection(
    m: Model, changes: ChangeOptions, plus: str | None, minus: str, bos: bool | None
) -> tuple[Callable[[int, int], Sequence[Edit]], list[int]]:
    """(layer, n_tokens) -> edits, and the layers."""
    from mia.methods import actadd
    from mia.methods.steering import check_fits

    if plus is not None:
        layers = layer_list(changes.steer_layers, m, range(m.n_layer))
        h = actadd.difference(m, actadd.Addition(plus, minus), layers, bos=bos)

        def front(layer: int, n: int) -> list[Edit]:
            # where a text is shorter than the addition, its first rows
            return [actadd.front_edit(h[layer][:n], changes.coeff, layer, n)]

        return front, layers
    assert changes.steer
    if len(changes.steer) > 1:
        raise UsageError(
            "--sweep layers takes one --steer; mia vector combine makes one of several"
        )
    vector = load_vector(changes.steer[0])
    check_fits(m, vector, changes.steer[0])
    layers = vector.at(layer_list(changes.steer_layers, m, vector.layers)).layers
    by_layer = {i: vector.edits(coeff=changes.coeff, layers=[i]) for i in layers}
    return lambda layer, n: by_layer[layer], layers
