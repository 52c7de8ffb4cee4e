"""What the commands about in-context tasks share: options, extractors, tables, pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli._options import _option
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.methods.extractor import Extractor
    from mia.metrics import Accuracy
    from mia.model import Model
    from mia.tasks import Format

TASK = "Task"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}

TaskArgument = Annotated[
    str, typer.Argument(help="A task (mia tasks), or a .json or .jsonl file of pairs.")
]
TasksArgument = Annotated[
    list[str], typer.Argument(help="Tasks (mia tasks), files of pairs, or all.")
]
PlotOption = Annotated[
    str | None, typer.Option("--plot", help="Draw it: a .png, .svg or .pdf (mia[plots]).")
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
    from mia import tasks

    return tasks.read_format(re.sub(r"\\([nt\\])", lambda m: _ESCAPES[m[1]], text))


def extractor(m: Model, name: str, o: TaskOptions, *, shots: int = 5, seed: int = 0) -> Extractor:
    """One task on the model; `seed` is added to the one asked for."""
    from mia import tasks
    from mia.methods.extractor import Extractor

    def extract_from(task: tasks.Task) -> Extractor:
        return Extractor(
            m,
            task,
            fmt=read_format(o.format),
            shots=shots if o.shots is None else o.shots,
            bos=o.bos,
            seed=o.seed + seed,
            n_test=o.n_test,
            n_dev=o.n_dev,
        )

    ex = extract_from(tasks.load(name))
    return extract_from(ex.known()) if o.known else ex


def task_names(names: Sequence[str]) -> list[str]:
    """`all` stands for every task that comes with mia. Raises where one is unknown."""
    from mia import tasks

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

    from mia.files import check_writable

    found = [out.replace("{name}", Path(n).stem) for n in names]
    if len(set(found)) < len(found):
        raise UsageError(f"{len(names)} tasks need {len(names)} files: -o '{{name}}.safetensors'")
    for f in found:
        if not f.endswith(".safetensors"):
            raise UsageError(f"{f}: the file's name must end in .safetensors")
        check_writable(f)
    return found


def check_plot(path: str | None) -> None:
    """Sees before any work that a picture can be drawn."""
    if path is not None:
        from mia import plots

        plots.check_picture(path)


def plot_curves(path: str, curves: Mapping[str, Mapping[int, Accuracy]], title: str) -> None:
    """Accuracy by layer, with intervals."""
    from mia import plots

    layers = sorted({i for c in curves.values() for i in c})
    lines = {n: [c[i].value if i in c else float("nan") for i in layers] for n, c in curves.items()}
    bands = {
        n: tuple([c[i].interval[end] if i in c else float("nan") for i in layers] for end in (0, 1))
        for n, c in curves.items()
    }
    figure = plots.curves(
        layers,
        lines,
        intervals=bands,  # type: ignore[arg-type]
        title=title,
        x_label="layer",
        y_label="accuracy",
    )
    plots.save(figure, path)


def share(a: Mapping[str, Any] | None) -> str:
    """An accuracy of a document as a cell: 0.83 [0.74, 0.89]."""
    return "-" if a is None else f"{a['accuracy']:.2f} [{a['low']:.2f}, {a['high']:.2f}]"


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first from the left, the others from the right."""
    widths = [max(len(r[i]) for r in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def rows_mean(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Means of accuracies over the rows of a document."""
    return {n: round(sum(r[n]["accuracy"] for r in rows) / len(rows), 4) for n in names}
