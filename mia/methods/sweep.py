"""Sweeps: one run changed along axes, with a number for each cell.

Sources: causal tracing, Meng et al. 2022 (arXiv 2202.05262), sec. 2.1; activation patching, Wang et
al. 2022 (2211.00593) and Heimersheim & Nanda 2024 (2404.15255), on which way to patch.

| in the papers                          | here                                                |
|----------------------------------------|-----------------------------------------------------|
| clean, corrupted run                   | `prompt`, `corrupted`                               |
| denoising: clean rows into corrupted   | `into="corrupted"`                                  |
| noising: corrupted rows into clean     | `into="clean"`                                      |
| corrupted-with-restoration, h_i^l      | the cell (l, i) of `over="layer,token"`             |
| noise ε ~ N(0, (3σ)²) on the subject   | `noise_on=` the subject, `noise=3`                  |
| indirect effect of a cell              | `Sweep.effect`: its number minus the unchanged run's |

Deviation: σ is that of the prompt's own embeddings, not of all subjects of a data set.

Among the cells run some whose change is too small to matter, 1e-5 of a row. In exact arithmetic they
give the unchanged run's number to four digits; on quantized files they do not, for each change flips
roundings of activations to 8 bits (`mia.measure.noise`). The largest such difference is the noise
floor, and cells within it say nothing.

Long work goes into a file of rows (`rows=`), cell by cell; it can be resumed, cut into shards and merged, and
spread over workers. `load` reads such a file, `explain` says what a sweep would cost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import FileError, MiaError, UsageError
from mia.io.files import check_writable
from mia.io.provenance import StoredFacts
from mia.measure.answers import UNITS
from mia.methods.sweep_reports import Explained, Sweep
from mia.progress import step
from mia.ranges import Ranges
from mia.sweeps.axes import Axis, Grid, Place, axis_names
from mia.sweeps.cells import NULL, CellRow, Cells as Cells, run_cells as run_cells, spread as spread
from mia.sweeps.experiments import Experiment, Prompt
from mia.sweeps.manifest import FORMAT, command, provenance, read_manifest, settings
from mia.sweeps.numbers import Numbers
from mia.sweeps.rows import RowsFile, joined, read_rows, write_joined
from mia.sweeps.work import MEMORY, Chunk, Task, Work

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model
    from mia.progress import Progress

#: cells that the text lists
_LISTED = 10


def sweep(
    model: Model,
    prompt: Prompt | None,
    experiment: Experiment,
    *,
    over: str | Sequence[str] = "layer,token",
    answer: str = "",
    against: str = "",
    metric: str | None = None,
    site: str | Sequence[str] | None = None,
    layers: Ranges | None = None,
    tokens: Ranges | None = None,
    heads: Ranges | None = None,
    neurons: Ranges | None = None,
    coeffs: Sequence[float] | None = None,
    window: int = 1,
    null: int = NULL,
    k: int = _LISTED,
    memory: int = MEMORY,
    rows: str | Path | None = None,
    resume: bool = False,
    shard: str | None = None,
    dask: str | None = None,
) -> Sweep:
    """Changes one run along axes, a number for each cell, all cells of a prompt side by side.

    Args:
        prompt: a text or token ids; of a patch, the clean prompt. `PatchingPairs` has its own.
        experiment: of `mia.sweeps.experiments`: `Patching`, `PatchingPairs`, `PathPatching`,
            `Ablation`, `Steering`, `Blocking`.
        over: axes: layer, head, token, site, neuron, coeff.
        answer, against: what should follow the prompt, and what should not.
        metric: as `mia.measure.answers` names it; by default the logit difference where there is
            another answer, the log-probability where there is one, KL where there is none.
        site: where, `resid_post` by default; several for the axis `site`. `Steering`, `Blocking` and
            `PathPatching` have their own.
        layers, tokens, heads, neurons: those of an axis, or of every cell where there is no such
            axis; all of them by default.
        coeffs: of `Steering`: of the axis `coeff`, or one of every cell; 1 by default.
        window: layers around that of a cell that are changed with it.
        null: how many changes by 1e-5 measure the noise floor.
        k: how many cells the text lists.
        memory: bytes that the cells of one run may take. Cells run in chunks that fit.
        rows: a file that gets each cell as a line of JSON as soon as it is known; its manifest lies
            beside it.
        resume: go on with such a file that is there already.
        shard: "3/16": only the third of sixteen parts. The other cells are NaN.
        dask: address of a dask scheduler ("tcp://host:port"), whose workers run the chunks, each
            with the model open.

    Raises:
        UsageError: an unknown axis or metric, or one that lacks an answer; prompts of two lengths; more
            shards than chunks; dask is not installed.
        RangeError: no such layer, token, head or neuron.
        SiteError: no such site.
        FileError: the file of rows is there already, or of another sweep, or being written.
        EngineError: the scheduler or its workers fail.
    """
    if resume and rows is None:
        raise UsageError("there is no file of rows to go on with")
    task = Task(
        prompt,
        experiment,
        axis_names(over),
        answer=answer,
        against=against,
        metric=metric,
        site=site,
        layers=layers,
        tokens=tokens,
        heads=heads,
        neurons=neurons,
        coeffs=coeffs,
        window=window,
        null=null,
        memory=memory,
    )
    work = Work(model, task)
    head = _head(work, k)
    chunks, part = _of_shard(work.chunks, shard)
    numbers = Numbers(head["runs"], work.grids[0].shape)
    file = nullcontext() if rows is None else _rows_file(work, head, rows, chunks, part, resume)
    with file as f, step("sweeping") as bar:
        if f is not None:
            numbers.put(f.rows)
        _run(work, chunks, numbers, f, dask=dask, progress=bar)
    return _report(head, numbers, model.facts)


def explain(
    model: Model,
    prompt: Prompt | None,
    experiment: Experiment,
    *,
    over: str | Sequence[str] = "layer,token",
    shard: str | None = None,
    **options: Any,
) -> Explained:
    """What a sweep would cost: token-forwards planned and one by one, batches and how full they are.
    Only what finds the model's sites is run.

    Args:
        options: those of `sweep` that say what is swept.

    Raises what `sweep` raises.
    """
    from mia.engine.dry import counted

    with counted() as count:
        work = Work(model, Task(prompt, experiment, axis_names(over), **options))
        chunks, _ = _of_shard(work.chunks, shard)
        for chunk in chunks:
            work.run(chunk, lambda row: None)
    parts = [part for chunk in chunks for part in chunk]
    lengths = [(len(work.cases[p.case].base.tokens), p.stop - p.start) for p in parts]
    return Explained(
        model.facts,
        n_cells=sum(n for _, n in lengths),
        n_chunks=len(chunks),
        one_by_one=sum(length * n for length, n in lengths),
        planned=count,
    )


def load(path: str | Path) -> Sweep:
    """A sweep from its file of rows. Cells that are not known yet are NaN.

    Raises `FileError` if it is none, or its manifest is not beside it.
    """
    manifest = read_manifest(path)
    with _damage_told(path):
        numbers = Numbers(manifest["runs"], _grid(manifest).shape)
        numbers.put(_stored(path, manifest))
        return _report(manifest, numbers, StoredFacts.read(manifest["model"]))


def merge(paths: Sequence[str | Path], out: str | Path) -> Sweep:
    """Joins the shards of a sweep into one file of rows, the same as if it had been written at once.

    Raises `FileError` for shards of other settings, missing ones, repeated ones, unfinished ones.
    """
    if not paths:
        raise UsageError("there is nothing to merge")
    check_writable(out)
    whole, ordered = joined(paths, out, command())
    with _damage_told(ordered[0]):
        numbers = Numbers(whole["runs"], _grid(whole).shape)
        for path in ordered:
            manifest, before = read_manifest(path), numbers.n_rows
            numbers.put(_stored(path, manifest))
            if (n := numbers.n_rows - before) != manifest["rows"]:
                raise FileError(f"{path} has {n} of its {manifest['rows']} rows: resume it first")
        write_joined(ordered, out, whole)
        return _report(whole, numbers, StoredFacts.read(whole["model"]))


def _stored(path: str | Path, manifest: Mapping[str, Any]) -> Iterator[CellRow]:
    """The rows of a file."""
    grid, first = _grid(manifest), manifest["first"]
    cells = (divmod(i, len(grid)) for i in range(first, first + manifest["rows"]))
    return (row for row, _ in read_rows(path, grid, cells))


def _grid(manifest: Mapping[str, Any]) -> Grid:
    """Its axes; of nothing else is asked."""
    return Grid(_axes(manifest["axes"]), Place(manifest["site"], (), ()), 0)


@contextmanager
def _damage_told(path: str | Path) -> Iterator[None]:
    """What is wrong with a manifest, in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        if isinstance(err, MiaError):
            raise
        raise FileError(f"the manifest of {path} is damaged: {type(err).__name__} {err}") from err


# -- running -----------------------------------------------------------------------------


def _of_shard(chunks: Sequence[Chunk], shard: str | None) -> tuple[list[Chunk], list[int] | None]:
    """The chunks of a shard, and which of how many it is."""
    if shard is None:
        return list(chunks), None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"shard {shard!r} is not I/N, like 3/16")
    i, n = int(match[1]), int(match[2])
    if n > len(chunks):
        cut = "1 chunk" if len(chunks) == 1 else f"{len(chunks)} chunks"
        raise UsageError(f"the sweep runs in {cut}: too few for {n} shards; less memory makes more")
    return list(chunks[len(chunks) * (i - 1) // n : len(chunks) * i // n]), [i, n]


def _cells(chunk: Chunk) -> list[tuple[int, int]]:
    return [(part.case, i) for part in chunk for i in range(part.start, part.stop)]


def _rows_file(
    work: Work,
    head: Mapping[str, Any],
    path: str | Path,
    chunks: Sequence[Chunk],
    shard: list[int] | None,
    resume: bool,
) -> RowsFile:
    cells = [_cells(chunk) for chunk in chunks]
    manifest = {
        "format": FORMAT,
        "model": work.model.facts.document(),
        **head,
        "shard": shard,
        "first": cells[0][0][0] * work.n_cells + cells[0][0][1],
        "rows": sum(map(len, cells)),
        "settings": settings(work),
        **provenance(work),
    }
    return RowsFile(path, manifest, work.grids[0], cells, resume=resume)


def _run(
    work: Work,
    chunks: Sequence[Chunk],
    numbers: Numbers,
    file: RowsFile | None,
    *,
    dask: str | None,
    progress: Progress | None,
) -> None:
    """Runs the chunks that are not known yet."""
    total, done = sum(len(_cells(c)) for c in chunks), numbers.n_rows

    def on_row(row: CellRow) -> None:
        numbers.put([row])
        if file is not None:
            file.write(row)

    left, n = list[Chunk](), 0
    for chunk in chunks:
        n += len(_cells(chunk))
        if n > done:
            left.append(chunk)
    if dask is not None and left:
        from mia.sweeps.workers import results

        for rows in results(work, left, dask):
            for row in rows:
                on_row(row)
            if file is not None:
                file.keep()
            if progress is not None:
                progress(numbers.n_rows, total)
        return
    for chunk in left:
        work.run(chunk, on_row, _share(progress, numbers.n_rows, len(_cells(chunk)), total))
        if file is not None:
            file.keep()


def _share(bar: Progress | None, before: int, n: int, total: int) -> Progress | None:
    """The progress of a chunk of n of `total` cells."""
    if bar is None:
        return None
    return lambda done, of: bar(before + n * done // of, total)


# -- what is told of it --------------------------------------------------------------------


def _head(work: Work, k: int) -> dict[str, Any]:
    """What a `Sweep` tells besides its numbers, as a manifest has it."""
    token_rows = work.model.token_rows
    case, n_null = work.cases[0], len(spread(work.n_cells, work.task.null))
    return {
        "change": work.task.experiment.title,
        "site": work.grids[0].rest.site,
        "tokens": [t.document() for t in token_rows(work.prompts[0])],
        "answer": [t.document() for t in token_rows(case.answer)],
        "against": [t.document() for t in token_rows(case.against)],
        "axes": [
            {"name": a.name, "values": list(a.values), "labels": list(a.labels)}
            for a in _common_axes(work.prompts, work.grids)
        ],
        "metric": work.metric,
        "unit": UNITS.get(work.metric, ""),
        "runs": len(work.cases),
        "null": n_null * len(work.cases),
        "listed": k,
    }


def _report(head: Mapping[str, Any], numbers: Numbers, facts: ModelFacts) -> Sweep:
    """The mean over the runs, with intervals if there are several."""
    from mia.generation import Token

    values, low, high = numbers.means()
    return Sweep(
        facts=facts,
        title=head["change"],
        site=head["site"],
        prompt=[Token(**t) for t in head["tokens"]],
        answer=[Token(**t) for t in head["answer"]],
        against=[Token(**t) for t in head["against"]],
        axes=_axes(head["axes"]),
        metric=head["metric"],
        unit=head["unit"],
        values=values,
        low=low,
        high=high,
        unchanged=numbers.unchanged,
        source=numbers.source,
        floor=numbers.floor,
        n_runs=head["runs"],
        n_null=numbers.n_null,
        random=tuple(numbers.random),
        k=head["listed"],
    )


def _axes(documents: Sequence[Mapping[str, Any]]) -> tuple[Axis, ...]:
    return tuple(Axis(a["name"], tuple(a["values"]), tuple(a["labels"])) for a in documents)


def _common_axes(prompts: Sequence[Sequence[int]], grids: Sequence[Grid]) -> tuple[Axis, ...]:
    """The axes, with labels where they are those of every run. Tokens of prompts of several lengths
    are counted from the end.

    Raises `UsageError` where tokens are the same neither from the start nor from the end."""
    out = []
    for axes in zip(*(grid.axes for grid in grids), strict=True):
        if all(a == axes[0] for a in axes):
            out.append(axes[0])
            continue
        values = [a.values for a in axes]
        if any(v != values[0] for v in values):  # tokens: all else is the same in every run
            values = [
                tuple(i - len(prompt) for i in v) for v, prompt in zip(values, prompts, strict=True)
            ]
        if any(v != values[0] for v in values):
            raise UsageError("the prompts have other tokens at the same places; count from the end")
        out.append(Axis(axes[0].name, values[0]))
    return tuple(out)
