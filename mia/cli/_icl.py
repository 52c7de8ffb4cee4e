"""What the commands about in-context tasks share: options, extractors, tables, pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli._options import OutputOptions, _option
from mia.cli._output import notice, progress
from mia.cli._vectors import say_other_model
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.datasets.tasks import Format, Task
    from mia.measure.estimates import Accuracy
    from mia.methods.icl import IclExperiment
    from mia.model import Model
    from mia.show import plots

TASK = "Task"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}

TaskArgument = Annotated[
    str, typer.Argument(help="A task (mia tasks), or a .json or .jsonl file of pairs.")
]
TasksArgument = Annotated[
    list[str], typer.Argument(help="Tasks (mia tasks), files of pairs, or all.")
]
PlotOption = Annotated[
    str | None, typer.Option("--plot", help="Draw it: a .png, .svg or .pdf (mia\\[plots]).")
]
MatchOption = Annotated[
    str,
    typer.Option(
        "--match", help="first: the answer's first token; exact: the whole answer, generated."
    ),
]


@dataclass
class TaskOptions:
    format: Annotated[
        str,
        _option(
            "--format",
            help="qa, arrow, or a text with {input} and {output}; \\n is read.",
            panel=TASK,
        ),
    ] = "qa"
    shots: Annotated[
        int | None,
        _option(
            "--shots",
            help="Examples in a prompt; default 5, function vectors 10.",
            panel=TASK,
            min=1,
        ),
    ] = None
    bos: Annotated[
        bool | None,
        _option(
            "--bos/--no-bos",
            help="Put the BOS token in front; default: wherever the vocabulary has one.",
            panel=TASK,
        ),
    ] = None
    seed: Annotated[
        int, _option("--seed", help="Of splits, examples and everything drawn.", panel=TASK, min=0)
    ] = 0
    known: Annotated[
        bool,
        _option(
            "--known",
            help="Only pairs whose answer the model gives after at least half of 5 other sets "
            "of examples.",
            panel=TASK,
        ),
    ] = False
    n_test: Annotated[
        int, _option("--test", help="Test queries, at most 60 % of the pairs.", panel=TASK, min=1)
    ] = 100
    n_dev: Annotated[
        int,
        _option("--dev", help="Development queries, at most 20 % of the pairs.", panel=TASK, min=1),
    ] = 40


def read_format(text: str) -> Format:
    from mia.datasets import tasks

    return tasks.read_format(re.sub(r"\\([nt\\])", lambda m: _ESCAPES[m[1]], text))


def extractor(
    m: Model,
    name: str,
    o: TaskOptions,
    output: OutputOptions,
    *,
    shots: int = 5,
) -> IclExperiment:
    """One task on the model, or what the model knows of it."""
    from mia.datasets import tasks
    from mia.methods.icl import IclExperiment

    ex = IclExperiment(
        m,
        tasks.load(name),
        fmt=read_format(o.format),
        shots=shots if o.shots is None else o.shots,
        bos=o.bos,
        seed=o.seed,
        n_test=o.n_test,
        n_dev=o.n_dev,
    )
    if o.known:
        with progress(f"what {m.name} knows of {ex.task.name}", output) as bar:
            ex.progress = bar
            ex = again(ex, o, task=ex.known())
    return ex


def again(
    ex: IclExperiment, o: TaskOptions, *, task: Task | None = None, seed: int = 0
) -> IclExperiment:
    """The same with another task, or with a seed that many further on."""
    return type(ex)(
        ex.model,
        task or ex.task,
        fmt=ex.fmt,
        shots=ex.shots,
        bos=ex.bos,
        seed=o.seed + seed,
        n_test=o.n_test,
        n_dev=o.n_dev,
    )


def task_names(names: Sequence[str]) -> list[str]:
    """`all` stands for every task that comes with mia. Raises where one is unknown."""
    from mia.datasets import tasks

    out = [
        n
        for name in names
        for n in ([e["name"] for e in tasks.index()] if name == "all" else [name])
    ]
    for name in out:
        tasks.load(name)
    return list(dict.fromkeys(out))


def numbers(text: str, what: str, most: int) -> list[int]:
    """`5,10,20`: whole numbers from 1 to most. Raises `UsageError`."""
    out = []
    for part in text.split(","):
        if not part.strip().isdigit() or not 1 <= int(part) <= most:
            raise UsageError(f"{what} {text!r}: {part!r} is not a whole number from 1 to {most}")
        out.append(int(part))
    return out


def files(out: str, names: Sequence[str]) -> list[str]:
    """A file for each task: `{name}` in -o stands for the task's. Checked before any work."""
    from pathlib import Path

    from mia.io.files import check_writable

    found = [out.replace("{name}", Path(n).stem) for n in names]
    if len(set(found)) < len(found):
        raise UsageError(f"{len(names)} tasks need {len(names)} files: -o '{{name}}.safetensors'")
    for f in found:
        if not f.endswith(".safetensors"):
            raise UsageError(f"{f}: the file's name must end in .safetensors")
        check_writable(f)
    return found


def say_where_from(
    facts: Mapping[str, str], ex: IclExperiment, path: str, method: str, output: OutputOptions
) -> None:
    """Notices about a saved vector that was made otherwise than what it is now tried on.

    Raises `UsageError` where another method made it."""
    made = facts.get("method", "")
    if made and not made.startswith(method):
        raise UsageError(f"{path} is no {method}; it is a {made.split(':')[0]}")
    say_other_model([facts], path, ex.model, output)
    if (task := facts.get("task")) and task != ex.task.name:
        notice(f"{path} was made for the task {task}", output)
        return
    here = {k: v if isinstance(v, str) else json.dumps(v) for k, v in ex.facts.items()}
    other = [k for k in ("seed", "pairs", "known_of") if facts.get(k, here.get(k)) != here.get(k)]
    if other:
        notice(
            f"{path} was made with another {' and '.join(other)}: some of these test queries may have been among "
            "its training ones; give the same --seed, --test, --dev and --known",
            output,
        )


def check_plot(path: str | None) -> None:
    """Sees before any work that a picture can be drawn."""
    if path is not None:
        from mia.show import plots

        plots.check_picture(path)


def plot_curves(
    path: str,
    curves: Mapping[str, Mapping[str, Mapping[int, Accuracy]]],
    title: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Accuracy by layer, with intervals.

    Args:
        curves: one or two kinds of curves, each of the same tasks: kind -> task -> layer -> share.
        levels: kind -> task -> a share that has no layer, drawn for up to three tasks.
    """
    from mia.show import plots

    tasks = list(next(iter(curves.values())))
    groups = [
        [_line(task, curve, kind, dashes) for task, curve in found.items()]
        for (kind, found), dashes in zip(curves.items(), ("", "dashed"), strict=False)
    ]
    if levels is not None and len(tasks) <= 3:
        for (kind, found), dashes in zip(levels.items(), ("dashed", "dotted"), strict=False):
            groups[0] += [
                plots.Line(name=task, y=y, kind=kind, dashes=dashes) for task, y in found.items()
            ]
    if len(curves) > 1 and len(tasks) > 5:
        # two curves of each task would cover each other
        shown = [
            plots.Panel(
                lines=[replace(line, kind="", dashes="") for line in group],
                y_label=f"accuracy {kind}",
                share=True,
            )
            for group, kind in zip(groups, curves, strict=True)
        ]
    else:
        lines = [line for group in groups for line in group]
        shown = [plots.Panel(lines=lines, y_label="accuracy", share=True)]
    title = f"{tasks[0]}: {title}" if len(tasks) == 1 else title
    plots.save(plots.panels(shown, title=title, x_label="layer"), path)


def _line(task: str, curve: Mapping[int, Accuracy], kind: str, dashes: str) -> plots.Line:
    from mia.show import plots

    x = sorted(curve)
    low, high = ([curve[i].interval[end] for i in x] for end in (0, 1))
    y = [curve[i].value for i in x]
    return plots.Line(name=task, x=x, y=y, band=(low, high), kind=kind, dashes=dashes)


def share(a: Mapping[str, Any] | None) -> str:
    """An accuracy of a document as a cell: 0.83 [0.74, 0.89]."""
    return "-" if a is None else f"{a['value']:.2f} [{a['low']:.2f}, {a['high']:.2f}]"


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first from the left, the others from the right."""
    widths = [max(len(r[i]) for r in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_layers(curves: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracies of documents by layer, a row for each layer and a column for each curve."""
    rows = [
        [i, *(f"{c[i]['value']:.2f}" if i in c else "-" for c in curves.values())]
        for i in sorted({i for curve in curves.values() for i in curve}, key=int)
    ]
    if rows:
        print()
        print_table(["layer", *curves], rows)


def rows_mean(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Means of accuracies over the rows of a document."""
    return {n: round(sum(r[n]["value"] for r in rows) / len(rows), 4) for n in names}
