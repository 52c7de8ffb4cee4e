"""function-vector: Todd et al. 2023 (arXiv 2310.15213)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _icl, _work
from mia.cli._icl import PlotOption, TaskOptions, TasksArgument
from mia.cli._options import ModelOptions, OutputOptions, command
from mia.cli._output import finish, model_facts, notice, progress, visible
from mia.cli.vector import FileOption, JsonOption, QuietOption
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.datasets.tasks import Composition
    from mia.methods.function_vectors import Evaluation, FunctionVector
    from mia.methods.icl import IclExperiment

PromptsOption = Annotated[
    int, typer.Option("--prompts", help="Prompts that mean head outputs are over.", min=1)
]
EffectsOption = Annotated[
    int, typer.Option("--effect-prompts", help="Prompts with shuffled answers for effects.", min=1)
]
HeadsOption = Annotated[
    str | None,
    typer.Option("--heads", help="How many heads to sum; default: the best on dev of 10,20,40."),
]
CoeffOption = Annotated[
    str | None,
    typer.Option("--coeff", help="How many times it is added (1); of several the best on dev."),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Function vectors (Todd et al. 2023).")
    command(group, name="extract")(extract)
    command(group, name="eval")(evaluate)
    command(group, name="compose")(compose)
    app.add_typer(group, name="function-vector")


def extract(
    model: ModelOptions,
    task: TaskOptions,
    tasks: TasksArgument,
    out: FileOption,
    prompts: PromptsOption = 100,
    effect_prompts: EffectsOption = 25,
    heads: HeadsOption = None,
    coeff: CoeffOption = None,
    top_k: Annotated[int, typer.Option("-k", "--top-k", help="Decoded tokens to show.", min=1)] = 8,
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", help="Draw the heads' effects: a .png, .svg or .pdf (mia\\[plots])."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Mean head outputs, effects of all heads, and the best ones summed up. Heads of several
    tasks given together are those with the best mean effect: -o '{name}.safetensors'."""
    import numpy as np

    from mia.methods import function_vectors as fv

    output = OutputOptions(json=json, quiet=quiet)
    _icl.check_plot(plot)
    names = _icl.task_names(tasks)
    files = _icl.files(out, names)
    rows: list[dict[str, Any]] = []
    with _work.open_model(model) as m:
        counts, coeffs = _choices(heads, coeff, m.n_layer * m.n_head)
        exs = [_icl.extractor(m, name, task, output, shots=10) for name in names]
        found = []
        for ex in exs:
            with progress(f"heads of {ex.task.name}", output) as bar:
                ex.progress = bar
                found.append(fv.head_statistics(ex, prompts=prompts, effect_prompts=effect_prompts))
            ex.progress = None
        effects = np.mean([e for _, e in found], 0)  # (n_layer, n_head)
        for ex, (means, _), file in zip(exs, found, files, strict=True):
            made = fv.choose(ex, means, effects, counts=counts, coeffs=coeffs)
            fv.as_vector(ex, made).save(file)
            notice(f"wrote {file}", output)
            rows.append({**ex.facts, "file": file, **_facts(ex, made, top_k)})
        document = {
            "model": model_facts(m),
            "effects": effects.round(6).tolist(),
            "vectors": rows,
        }
    if plot is not None:
        _plot_effects(plot, effects, names)
        notice(f"wrote {plot}", output)

    def human() -> None:
        for r in rows:
            print(f"{r['task']}: layer {r['layer']}, {r['dev_accuracy']:.2f} on dev; {r['file']}")
            shown = ", ".join(
                f"{h['layer']}.{h['head']} {h['effect']:+.3f}" for h in r["heads"][:10]
            )
            print(f"  heads: {shown}{' …' if len(r['heads']) > 10 else ''}")
            _print_decoded(r["decoded"])

    finish(document, output, human)


def _choices(heads: str | None, coeff: str | None, n_heads: int) -> tuple[list[int], list[float]]:
    from mia.cli import _vectors
    from mia.methods.function_vectors import HEAD_COUNTS

    counts = list(HEAD_COUNTS) if heads is None else _icl.numbers(heads, "--heads", n_heads)
    return counts, _vectors.numbers(coeff or "1", "--coeff")


def _facts(ex: IclExperiment, made: FunctionVector, k: int) -> dict[str, Any]:
    import numpy as np

    from mia.methods import function_vectors as fv

    return {
        "layer": made.layer,
        "coeff": made.coeff,
        "norm": round(float(np.linalg.norm(made.vector)), 4),
        "dev_accuracy": round(float(made.dev[made.layer]), 4),
        "heads": [
            {"layer": i, "head": h, "effect": round(float(made.effects[i, h]), 6)}
            for i, h in made.heads
        ],
        "decoded": fv.decode(ex.model, made.vector, k),
    }


def _print_decoded(decoded: dict[str, list[dict[str, Any]]]) -> None:
    for name, title in (("raw", "unembedding"), ("norm", "with final norm")):
        print(f"  decoded, {title}: {' | '.join(visible(t['text']) for t in decoded[name])}")


def _plot_effects(path: str, effects: Any, names: list[str]) -> None:
    from mia.show import plots

    of = ", ".join(names) if len(names) <= 3 else f"mean of {len(names)} tasks"
    figure = plots.heatmap(
        effects,
        title=f"average indirect effect: {of}",
        x="head",
        y="layer",
        bar="change of p(answer)",
        diverging=True,
        clipped=True,
    )
    plots.save(figure, path)


def evaluate(
    model: ModelOptions,
    task: TaskOptions,
    output: OutputOptions,
    tasks: TasksArgument,
    vector: Annotated[
        str | None,
        typer.Option(
            "--vector", help="A saved vector, {name} for the task's; default: extract it."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Add it there; default: its own, or dev's best.")
    ] = None,
    prompts: PromptsOption = 100,
    effect_prompts: EffectsOption = 25,
    heads: HeadsOption = None,
    coeff: CoeffOption = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Added at every layer on the test part too.")
    ] = False,
    plot: PlotOption = None,
) -> None:
    """The table: without examples and after shuffled ones, each with and without the vector."""
    _icl.check_plot(plot)
    names = _icl.task_names(tasks)
    if vector is not None and heads is not None:
        raise UsageError("--heads chooses the heads of a new vector; it does not go with --vector")
    rows: list[dict[str, Any]] = []
    curves: dict[str, Any] = {"without examples": {}, "after shuffled examples": {}}
    with _work.open_model(model) as m:
        counts, coeffs = _choices(heads, coeff, m.n_layer * m.n_head)
        if vector is not None and len(coeffs) > 1:
            raise UsageError("a saved vector takes one --coeff")
        if layer is not None and not 0 <= layer < m.n_layer:
            raise UsageError(f"--layer {layer} is out of range; {m.name} has 0 to {m.n_layer - 1}")
        for name in names:
            ex = _icl.extractor(m, name, task, output, shots=10)
            with progress(ex.task.name, output) as bar:
                ex.progress = bar
                if vector is not None:
                    at, v, c = _loaded(ex, vector.replace("{name}", ex.task.name), output)
                    made = v, at if layer is None else layer, c if coeff is None else coeffs[0]
                else:
                    made = _extracted(
                        ex,
                        prompts=prompts,
                        effect_prompts=effect_prompts,
                        counts=counts,
                        coeffs=coeffs,
                        layers=None if layer is None else [layer],
                    )
                e = _evaluated(ex, *made, by_layer=by_layer or plot is not None)
            rows.append(_as_row(ex, made[1], made[2], e))
            for which, curve in enumerate(curves.values()):
                curve[ex.task.name] = {i: pair[which] for i, pair in e.by_layer.items()}
        columns = ("zero_shot", "icl", "wrong", "zero_shot_vector", "wrong_vector")
        mean = _icl.rows_mean(rows, columns)
        document = {"model": model_facts(m), "rows": rows, "mean": mean}
    if plot is not None:
        _icl.plot_curves(plot, curves, "function vector added, by layer")
        notice(f"wrote {plot}", output)
    finish(document, output, lambda: _print_rows(rows, mean))


def _loaded(ex: IclExperiment, path: str, output: OutputOptions) -> tuple[int, Any, float]:
    """Layer, vector and coefficient of a file."""
    from mia import vectors

    v = vectors.load(path)
    v.check(ex.model.n_layer, ex.model.n_embd, path)
    _icl.say_where_from(v.metadata, ex, path, "function vector", output)
    if len(v.layers) != 1:
        raise UsageError(f"{path} has {len(v.layers)} layers; a function vector has one")
    at = v.layers[0]
    return at, v[at], float(v.metadata.get("coeff", "1"))


def _extracted(ex: IclExperiment, **how: Any) -> tuple[Any, int, float]:
    from mia.methods import function_vectors as fv

    made = fv.extract(ex, **how)
    return made.vector, made.layer, made.coeff


def _evaluated(
    ex: IclExperiment, v: Any, layer: int, coeff: float, *, by_layer: bool
) -> Evaluation:
    from mia.methods import function_vectors as fv

    return fv.evaluate(ex, v, layer, coeff, by_layer=by_layer)


def _as_row(ex: IclExperiment, layer: int, coeff: float, e: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {"family": ex.task.family, "layer": layer, "coeff": coeff, **ex.facts}
    for name in ("zero_shot", "icl", "wrong", "zero_shot_vector", "wrong_vector"):
        row[name] = getattr(e, name).document()
    given = e.vector_given_icl
    row["vector_given_icl"] = None if given is None else given.document()
    if e.by_layer:
        row["by_layer"] = {
            str(i): {"zero_shot_vector": a.document(), "wrong_vector": b.document()}
            for i, (a, b) in e.by_layer.items()
        }
    return row


def _print_rows(rows: list[dict[str, Any]], mean: dict[str, float]) -> None:
    columns = ("icl", "zero_shot", "zero_shot_vector", "vector_given_icl", "wrong", "wrong_vector")
    table = [
        [r["task"], str(r["layer"]), str(r["icl"]["n"]), *(_icl.share(r[c]) for c in columns)]
        for r in rows
    ]
    if len(rows) > 1:
        cells = [f"{mean[c]:.2f}" if c in mean else "" for c in columns]
        table.append(["mean", "", "", *cells])
    titles = ("task", "layer", "n", "in-context", "zero-shot", "+ vector", "where ICL is right")
    _icl.print_table((*titles, "shuffled", "+ vector"), table)
    _icl.print_layers(
        {
            f"{r['task']}{after}": {i: a[kind] for i, a in r.get("by_layer", {}).items()}
            for r in rows
            for after, kind in (("", "zero_shot_vector"), (", shuffled", "wrong_vector"))
        }
    )


def _composition(name: str) -> Composition:
    """One of mia's, or four tasks with commas between. Raises `UsageError`."""
    from mia.datasets import tasks as library

    parts = name.split(",")
    if len(parts) == 1:
        return library.composition(name)
    if len(parts) != 4:
        raise UsageError(f"{name!r} is no composition: AC,BC,BD,AD are four tasks")
    _icl.task_names(parts)
    return library.Composition(parts[3], *parts)


def compose(
    model: ModelOptions,
    task: TaskOptions,
    output: OutputOptions,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Compositions (mia tasks lists them), or AC,BC,BD,AD: four tasks of your own; "
            "default: all that come with mia."
        ),
    ] = None,
    prompts: PromptsOption = 100,
    effect_prompts: EffectsOption = 25,
    heads: Annotated[
        int | None, typer.Option("--heads", help="How many heads to sum; default 40.", min=1)
    ] = None,
    top_k: Annotated[int, typer.Option("-k", "--top-k", help="Decoded tokens to show.", min=1)] = 5,
) -> None:
    """v(AD) = v(BD) - v(BC) + v(AC): does the composed vector do the composed task?"""
    from mia.datasets import tasks as library
    from mia.methods import function_vectors as fv

    wanted = [_composition(n) for n in names] if names else library.compositions()
    rows = []
    with _work.open_model(model) as m:
        n_heads = min(40, m.n_layer * m.n_head) if heads is None else heads
        if n_heads > m.n_layer * m.n_head:
            raise UsageError(f"--heads {n_heads}: {m.name} has {m.n_layer * m.n_head} heads")
        known: dict[str, Any] = {}
        for c in wanted:
            exs = [_icl.extractor(m, t, task, output, shots=10) for t in (c.ac, c.bc, c.bd, c.ad)]
            for ex in exs:
                if ex.task.name not in known:
                    with progress(f"heads of {ex.task.name}", output) as bar:
                        ex.progress = bar
                        known[ex.task.name] = fv.head_statistics(
                            ex, prompts=prompts, effect_prompts=effect_prompts
                        )
                    ex.progress = None
            made = fv.compose(*exs, n_heads=n_heads, known=known)
            rows.append(
                {
                    "composition": c.name,
                    **exs[3].facts,
                    "zero_shot": made.evaluation.zero_shot.document(),
                    "icl": made.evaluation.icl.document(),
                    "direct": made.direct_evaluation.zero_shot_vector.document(),
                    "composed": made.evaluation.zero_shot_vector.document(),
                    "layers": {"direct": made.direct.layer, "composed": made.layer},
                    "cosine": round(made.cosine, 4),
                    "decoded": {
                        "direct": fv.decode(m, made.direct.vector, top_k),
                        "composed": fv.decode(m, made.vector, top_k),
                    },
                }
            )
        document = {"model": model_facts(m), "rows": rows}

    def human() -> None:
        columns = ("icl", "zero_shot", "direct", "composed")
        table = [
            [
                r["composition"],
                r["task"],
                *(_icl.share(r[c]) for c in columns),
                f"{r['cosine']:.2f}",
            ]
            for r in rows
        ]
        _icl.print_table(
            ("composition", "task", "in-context", "zero-shot", "+ direct", "+ composed", "cosine"),
            table,
        )

    finish(document, output, human)
