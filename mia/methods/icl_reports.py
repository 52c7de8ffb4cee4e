"""What the reports of in-context methods share: files of vectors, tables of tasks, curves by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia import vectors
from mia.errors import UsageError
from mia.io.files import check_writable
from mia.io.provenance import as_strings, warn_of_other_model, warn_of_other_task
from mia.measure.estimates import Accuracy
from mia.show.text import columns

if TYPE_CHECKING:
    from mia.datasets.tasks import Task
    from mia.methods.icl import IclExperiment
    from mia.show import plots
    from mia.vectors import Vector

#: accuracies of one task by name; None if there was no query to count
Accuracies = Mapping[str, Accuracy | None]
#: accuracy by layer
Curve = Mapping[int, Accuracy]

# -- files -------------------------------------------------------------------------


def vector_files(given: str | Sequence[str], tasks: Sequence[Task]) -> list[str]:
    """A .safetensors file for each task: as many names, or one in which `{name}` stands for the
    task's name.

    Raises before any work: `UsageError` for names that are the same, too few or too many, or do
    not end so, `FileError` if a file cannot be written."""
    if isinstance(given, str):
        given = [given.replace("{name}", t.name) for t in tasks]
    files = list(given)
    if not len(tasks) == len(files) == len(set(files)):
        raise UsageError(f"{len(tasks)} tasks need {len(tasks)} files, like {{name}}.safetensors")
    for file in files:
        if not file.endswith(".safetensors"):
            raise UsageError(f"{file}: the file's name must end in .safetensors")
        check_writable(file)
    return files


def load_vector(pattern: str | Path, ex: IclExperiment, method: str) -> tuple[Vector, str]:
    """A saved vector for a task, and its file; `{name}` stands for the task's name.

    Raises `UsageError` if the vector does not fit the model or another method made it."""
    path = str(pattern).replace("{name}", ex.task.name)
    vector = vectors.load(path)
    vector.check(ex.model.n_layer, ex.model.n_embd, path)
    check_saved(vector.metadata, path, ex, method)
    return vector, path


def check_saved(metadata: Mapping[str, str], path: str, ex: IclExperiment, method: str) -> None:
    """Notices if a saved vector was made with another model, task, seed or split.

    Raises `UsageError` if another method made it."""
    made_by = metadata.get("method", "")
    if made_by and not made_by.startswith(method):
        raise UsageError(f"{path} is not a {method}; it is a {made_by.split(':')[0]}")
    warn_of_other_model([metadata], path, ex.model.facts)
    warn_of_other_task(metadata, path, ex.facts)


def vector_metadata(ex: IclExperiment, method: str, **facts: str) -> dict[str, str]:
    """What a file says of a vector: task, method, what it was made with, model."""
    return {
        "name": ex.task.name,
        "method": method,
        **facts,
        **as_strings(ex.facts),
        **ex.model.file_metadata(),
    }


# -- documents and tables ------------------------------------------------------------


def accuracy_documents(accuracies: Accuracies) -> dict[str, dict[str, Any] | None]:
    return {k: None if a is None else a.document() for k, a in accuracies.items()}


def rows_mean(rows: Sequence[Accuracies], names: Sequence[str]) -> dict[str, float]:
    """Means over tasks."""
    values = {n: [a.value for r in rows if (a := r[n]) is not None] for n in names}
    return {n: round(sum(x) / len(x), 4) for n, x in values.items()}


def flat(accuracies: Accuracies) -> dict[str, float | None]:
    """Accuracies as entries of a flat record: `icl`, `icl_low`, `icl_high`."""
    record: dict[str, float | None] = {}
    for name, a in accuracies.items():
        low, high = (None, None) if a is None else a.interval
        record |= {
            name: None if a is None else a.value,
            f"{name}_low": low,
            f"{name}_high": high,
        }
    return record


def cell(accuracy: Accuracy | None) -> str:
    """An accuracy in a table: "0.83 [0.74, 0.89]"."""
    return "-" if accuracy is None else str(accuracy)


def task_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    mean: Sequence[str],
    curves: Mapping[str, Curve],
) -> str:
    """A row for each task, their means if there are several, and curves by layer below."""
    table = columns(titles, [*rows, mean] if len(rows) > 1 else rows)
    layers = sorted({i for curve in curves.values() for i in curve})
    if not layers:
        return table
    by_layer = [
        [str(i), *(f"{c[i].value:.2f}" if i in c else "-" for c in curves.values())] for i in layers
    ]
    return f"{table}\n\n{columns(['layer', *curves], by_layer)}"


# -- pictures ------------------------------------------------------------------------


def plot_curves(
    path: str | Path,
    curves: Mapping[str, Mapping[str, Curve]],
    title: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draws accuracy by layer, with intervals.

    Args:
        curves: one or two kinds of curves of the same tasks: kind -> task -> curve.
        levels: kind -> task -> an accuracy without a layer, drawn for up to three tasks.

    Raises `UsageError` if there are no accuracies by layer."""
    from mia.show import plots

    tasks = list(next(iter(curves.values())))
    if not any(curve for kind in curves.values() for curve in kind.values()):
        raise UsageError("there is nothing to draw: ask for accuracies by layer")
    groups = [
        [_line(task, curve, kind, dashes) for task, curve in by_task.items()]
        for (kind, by_task), dashes in zip(curves.items(), ("", "dashed"), strict=False)
    ]
    if levels is not None and len(tasks) <= 3:
        for (kind, by_task), dashes in zip(levels.items(), ("dashed", "dotted"), strict=False):
            groups[0] += [
                plots.Line(name=task, y=y, kind=kind, dashes=dashes) for task, y in by_task.items()
            ]
    if len(curves) > 1 and len(tasks) > 5:
        # two curves of each task would cover each other
        panels = [
            plots.Panel(
                lines=[replace(line, kind="", dashes="") for line in group],
                y_label=f"accuracy {kind}",
                share=True,
            )
            for group, kind in zip(groups, curves, strict=True)
        ]
    else:
        lines = [line for group in groups for line in group]
        panels = [plots.Panel(lines=lines, y_label="accuracy", share=True)]
    title = f"{tasks[0]}: {title}" if len(tasks) == 1 else title
    plots.save(plots.panels(panels, title=title, x_label="layer"), path)


def _line(task: str, curve: Curve, kind: str, dashes: str) -> plots.Line:
    from mia.show import plots

    x = sorted(curve)
    low, high = ([curve[i].interval[end] for i in x] for end in (0, 1))
    y = [curve[i].value for i in x]
    return plots.Line(name=task, x=x, y=y, band=(low, high), kind=kind, dashes=dashes)
