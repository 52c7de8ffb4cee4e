"""task-vector: Hendel et al. 2023 (arXiv 2310.15916)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _icl, _work
from mia.cli._icl import MatchOption, PlotOption, TaskArgument, TaskOptions, TasksArgument
from mia.cli._options import ModelOptions, OutputOptions, command
from mia.cli._output import finish, model_facts, notice, progress
from mia.cli.vector import FileOption, JsonOption, QuietOption
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.methods.icl import IclExperiment
    from mia.methods.task_vectors import TaskVector
    from mia.model import Model

SetsOption = Annotated[
    int, typer.Option("--sets", help="Sets of examples to choose from on dev.", min=1)
]
DummiesOption = Annotated[
    int,
    typer.Option("--dummies", help="Dummy queries that a set's vector is the mean over.", min=1),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="ICL task vectors (Hendel et al. 2023).")
    command(group, name="extract")(extract)
    command(group, name="eval")(evaluate)
    command(group, name="conflict")(conflict)
    app.add_typer(group, name="task-vector")


def extract(
    model: ModelOptions,
    task: TaskOptions,
    tasks: TasksArgument,
    out: FileOption,
    sets: SetsOption = 16,
    dummies: DummiesOption = 8,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The residual of the last token after examples, and the layer where it works best on dev.
    Several tasks: -o '{name}.safetensors'."""
    output = OutputOptions(json=json, quiet=quiet)
    names = _icl.task_names(tasks)
    files = _icl.files(out, names)
    rows: list[dict[str, Any]] = []
    with _work.open_model(model) as m:
        for name, file in zip(names, files, strict=True):
            ex = _icl.extractor(m, name, task, output)
            theta = _extracted(ex, sets, dummies, output)
            theta.vector.save(file)
            notice(f"wrote {file}", output)
            layers = theta.vector.layers
            dev = {str(i): round(a, 4) for i, a in zip(layers, theta.dev.tolist(), strict=True)}
            rows.append(
                {
                    **ex.facts,
                    "file": file,
                    "layer": theta.layer,
                    "dev": dev,
                    "sets": list(theta.sets),
                    "dev_by_set": theta.dev_by_set.round(4).tolist(),
                }
            )
        document = {"model": model_facts(m), "vectors": rows}

    def human() -> None:
        for r in rows:
            best = r["dev"][str(r["layer"])]
            print(f"{r['task']}: layer {r['layer']}, {best:.2f} on dev; {r['file']}")

    finish(document, output, human)


def _extracted(
    ex: IclExperiment,
    sets: int,
    dummies: int,
    output: OutputOptions,
    *,
    layers: Sequence[int] | None = None,
) -> TaskVector:
    from mia.methods import task_vectors

    with progress(f"vector of {ex.task.name}", output) as bar:
        ex.progress = bar
        theta = task_vectors.extract(ex, sets=sets, dummies=dummies, layers=layers)
    ex.progress = None
    return theta


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
        int | None,
        typer.Option(
            "--layer", help="Put it there; default: a saved vector's own, else dev's best."
        ),
    ] = None,
    sets: SetsOption = 16,
    dummies: DummiesOption = 8,
    repeats: Annotated[
        int,
        typer.Option("--repeats", help="Pool this many splits, of seeds that follow on.", min=1),
    ] = 1,
    match: MatchOption = "first",
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="The vector of every layer on the test part too.")
    ] = False,
    plot: PlotOption = None,
) -> None:
    """The table: without examples, with them, and with the vector in their place."""
    from mia.methods.icl import MATCHES

    if match not in MATCHES:
        raise UsageError(f"unknown match {match!r}; known: {', '.join(MATCHES)}")
    if vector is not None and repeats > 1:
        raise UsageError("--repeats extracts a vector for each split; it does not go with --vector")
    _icl.check_plot(plot)
    names = _icl.task_names(tasks)
    rows: list[dict[str, Any]] = []
    curves: dict[str, Any] = {}
    with _work.open_model(model) as m:
        for name in names:
            row, curve = _row(
                m,
                name,
                task,
                output,
                source=(vector, layer, sets, dummies),
                repeats=repeats,
                match=match,
                by_layer=by_layer or plot is not None,
            )
            rows.append(row)
            curves[row["task"]] = curve
        document = {
            "model": model_facts(m),
            "match": match,
            "rows": rows,
            "mean": _icl.rows_mean(rows, ("zero_shot", "icl", "vector")),
        }
    if plot is not None:
        _icl.plot_curves(
            plot,
            {"with the task vector": curves},
            "task vector in place of the examples, by layer",
            {
                "with examples": {r["task"]: r["icl"]["value"] for r in rows},
                "without examples": {r["task"]: r["zero_shot"]["value"] for r in rows},
            },
        )
        notice(f"wrote {plot}", output)
    finish(document, output, lambda: _print_rows(document))


def _row(
    m: Model,
    name: str,
    task: TaskOptions,
    output: OutputOptions,
    *,
    source: tuple[str | None, int | None, int, int],
    repeats: int,
    match: str,
    by_layer: bool,
) -> tuple[dict[str, Any], dict[int, Any]]:
    """A task's row, pooled over the repeats, and its curve."""
    from mia import vectors
    from mia.methods import task_vectors as tv

    file, layer, sets, dummies = source
    found, layers = [], []
    fixed = None if layer is None else [layer]
    first = _icl.extractor(m, name, task, output)
    for repeat in range(repeats):
        ex = _icl.again(first, task, seed=repeat) if repeat else first
        if file is not None:
            path = file.replace("{name}", ex.task.name)
            loaded = vectors.load(path)
            loaded.check(m.n_layer, m.n_embd, path)
            _icl.say_where_from(loaded.metadata, ex, path, "task vector", output)
            theta = tv.load(loaded, layer)
        else:
            theta = _extracted(ex, sets, dummies, output, layers=fixed)
        with progress(f"evaluating {ex.task.name}", output) as bar:
            ex.progress = bar
            found.append(tv.evaluate(ex, theta, by_layer=by_layer, match=match))
        layers.append(theta.layer)
    pooled = tv.pool(found)
    row = {**tv.as_row(ex, pooled), **ex.facts, "seed": task.seed, "repeats": repeats}
    row["layers"] = layers
    return row, pooled.by_layer


def _print_rows(document: dict[str, Any]) -> None:
    table = [
        [
            r["task"],
            ",".join(map(str, dict.fromkeys(r["layers"]))),
            str(r["vector"]["n"]),
            *(_icl.share(r[c]) for c in ("zero_shot", "icl", "vector", "vector_given_icl")),
        ]
        for r in document["rows"]
    ]
    titles = (
        "task",
        "layer",
        "n",
        "zero-shot",
        "in-context",
        "vector",
        "vector where ICL is right",
    )
    if len(table) > 1:
        mean = document["mean"]
        table.append(
            ["mean", "", "", *(f"{mean[c]:.2f}" for c in ("zero_shot", "icl", "vector")), ""]
        )
    _icl.print_table(titles, table)
    _icl.print_layers({r["task"]: r.get("by_layer", {}) for r in document["rows"]})


def conflict(
    model: ModelOptions,
    task: TaskOptions,
    output: OutputOptions,
    shown: TaskArgument,
    put: Annotated[str, typer.Argument(help="The task whose vector is put into these examples.")],
    sets: SetsOption = 16,
    dummies: DummiesOption = 8,
) -> None:
    """Examples of one task, vector of another, on inputs that both have: which one wins?"""
    from mia.methods import task_vectors as tv

    _icl.task_names([shown, put])
    with _work.open_model(model) as m:
        ex = _icl.extractor(m, shown, task, output)
        source = _icl.extractor(m, put, task, output)
        theta = _extracted(source, sets, dummies, output)
        c = tv.conflict(ex, theta, source)
        document = {
            "model": model_facts(m),
            **ex.facts,
            "examples": ex.task.name,
            "vector": source.task.name,
            "layer": theta.layer,
            "with_vector": {"examples": c.shown.document(), "vector": c.put.document()},
            "without": {"examples": c.shown_plain.document(), "vector": c.put_plain.document()},
        }

    def human() -> None:
        titles = (
            f"answers of (n = {c.shown.n})",
            "examples alone",
            f"with the vector of {source.task.name}",
        )
        _icl.print_table(
            titles,
            [
                [f"{ex.task.name} (examples)", str(c.shown_plain), str(c.shown)],
                [f"{source.task.name} (vector)", str(c.put_plain), str(c.put)],
            ],
        )

    finish(document, output, human)
