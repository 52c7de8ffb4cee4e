"""caa: contrastive activation addition, trained and evaluated on A/B questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import ModelOptions, OutputOptions, command
from mia.cli._output import finish, model_facts, progress
from mia.cli._vectors import (
    BosOption,
    SeedOption,
    check_vector_file,
    in_file,
    item_range,
    layer_list,
    load_vector,
    made_of,
    numbers,
    rounded,
    save_vector,
    say_where_from,
    span,
)
from mia.cli.vector import (
    FileOption,
    JsonOption,
    LayerZeroOption,
    QuietOption,
    facts,
)
from mia.errors import UsageError

ItemsOption = Annotated[
    str | None, typer.Option("--items", help="Only these, counted from 0: 0..39, 40..")
]
ByTextOption = Annotated[
    bool,
    typer.Option(
        "--by-text",
        help="Read and score the answers themselves, not their letters; lists no choices.",
    ),
]
DataArgument = Annotated[
    str, typer.Argument(help="A/B JSON, or a shipped set: agree_vs_accurate, refuse_vs_comply.")
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, help="Contrastive activation addition (Rimsky et al. 2023)."
    )
    command(group, name="train")(train)
    command(group, name="eval")(evaluate)
    app.add_typer(group, name="caa")


def train(
    model: ModelOptions,
    data: Annotated[
        list[str],
        typer.Argument(help="A/B JSON, or a shipped set: agree_vs_accurate, refuse_vs_comply."),
    ],
    out: FileOption,
    items: ItemsOption = None,
    equal_norm: Annotated[
        bool,
        typer.Option("--equal-norm", help="Scale the behaviours' vectors to one norm per layer."),
    ] = False,
    by_text: ByTextOption = False,
    bos: BosOption = None,
    layer_zero: LayerZeroOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The mean difference at the answer's letter. Several behaviours: -o '{name}.gguf'."""
    from mia.methods import caa

    output = OutputOptions(json=json, quiet=quiet)
    names = [Path(d).stem for d in data]
    files = [out.replace("{name}", n) for n in names]
    if len(set(files)) < len(files):
        raise UsageError(f"{len(data)} behaviours need {len(data)} files: -o '{{name}}.gguf'")
    if equal_norm and len(data) < 2:
        raise UsageError("--equal-norm is for several behaviours; one is given")
    for f in files:
        check_vector_file(f)
    sets = [caa.load_items(d) for d in data]
    chosen = [item_range(items, range(len(s))) for s in sets]
    with _work.open_model(model) as m:
        vectors = []
        for d, name, found, at in zip(data, names, sets, chosen, strict=True):
            some = [found[i] for i in at]
            with progress(f"reading {name}", output) as bar:
                v = caa.train(m, some, bos=bos, name=name, by_text=by_text, progress=bar)
            vectors.append(made_of(v, [caa.find_items(d)], at))
        if equal_norm:
            vectors = caa.equal_norms(vectors)
        for v, f in zip(vectors, files, strict=True):
            save_vector(v, f, output, layer_zero=layer_zero)
        vectors = [in_file(v, f, layer_zero) for v, f in zip(vectors, files, strict=True)]
        document = {
            "model": model_facts(m),
            "vectors": [{"file": f, **facts(v)} for v, f in zip(vectors, files, strict=True)],
        }

        def human() -> None:
            for v, f in zip(vectors, files, strict=True):
                print(f"{f}: {v.metadata['n_items']} items, layers {v.layers[0]}-{v.layers[-1]}")

        finish(document, output, human)


def evaluate(
    model: ModelOptions,
    output: OutputOptions,
    vector: Annotated[str, typer.Argument(help="The vector file.")],
    data: DataArgument,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Default: every third that the vector has.")
    ] = None,
    multipliers: Annotated[str, typer.Option("--multipliers", help="-1,1 …")] = "-1,1",
    items: ItemsOption = None,
    together: Annotated[
        bool, typer.Option("--together", help="All the layers at once, not one after the other.")
    ] = False,
    by_text: ByTextOption = False,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the table into an image file.")
    ] = None,
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> None:
    """The probability of the behaviour's answer, over layers and multipliers."""
    import numpy as np

    from mia.measure.estimates import format_estimate
    from mia.methods import caa
    from mia.show import plots

    v = load_vector(vector)
    factors = numbers(multipliers, "--multipliers")
    found = caa.load_items(data)
    at = item_range(items, range(len(found)))
    if len(at) < 2:
        raise UsageError("one question has no interval; give at least two by --items")
    some = [found[i] for i in at]
    if plot is not None:
        plots.check_picture(plot)
    with _work.open_model(model) as m:
        say_where_from(v, vector, caa.find_items(data), at, m, output)
        chosen = layer_list(layers, m, v.layers[::3])
        with progress("asking", output) as bar:
            table = caa.evaluate(
                m,
                v,
                some,
                layers=chosen,
                multipliers=factors,
                bos=bos,
                together=together,
                by_text=by_text,
                progress=bar,
            )
        rng = np.random.default_rng(seed)
        plain = float(table.plain.mean())
        rows: list[dict[str, Any]] = [
            {
                "layers": chosen if together else [layer],
                "multiplier": c,
                "p_matching": rounded(table.means[i, j]),
                "change": table.change(layer, c, rng).document(),
            }
            for i, layer in enumerate(table.layers)
            for j, c in enumerate(factors)
        ]
        document = {
            "model": model_facts(m),
            "vector": vector,
            "data": data,
            "n_items": len(some),
            "items": span(at),
            "bos": m.wants_bos(bos),
            "by_text": by_text,
            "seed": seed,
            "p_matching_plain": rounded(plain),
            "table": rows,
        }

        def human() -> None:
            print(f"P(matching answer), {len(some)} items; without steering {plain:.3f}")
            print("layer  multiplier  P      change [95 %]")
            for r in rows:
                shown = format_estimate(r["change"], sign="+")
                name = f"{r['layers'][0]}-{r['layers'][-1]}" if together else str(r["layers"][0])
                print(f"{name:>5s}  {r['multiplier']:>10g}  {r['p_matching']:.3f}  {shown}")

        finish(document, output, human)
    if plot is not None:
        curves = {f"× {c:g}": table.means[:, j] for j, c in enumerate(factors)}
        curves["unsteered"] = np.full(len(table.layers), plain)
        figure = plots.curves(
            table.layers, curves, x_label="layer", y_label="P(matching answer)", title=data
        )
        plots.save(figure, plot)
