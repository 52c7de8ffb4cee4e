"""Cells of a sweep as one planned run: their requests, and their rows in order from results that come in any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.measure.answers import Metric
from mia.request import Request, Result
from mia.sweeps.axes import Grid
from mia.sweeps.changes import Base, Change, Nudge

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Values = npt.NDArray[np.float64]
#: cells whose change is too small to matter, by default
NULL = 12


class CellRow(NamedTuple):
    """What a sweep says of one cell of one run.

    Attributes:
        run: index of the case.
        cell: index in the grid, the last axis fastest.
        value: the metric.
        unchanged: that of the run that is changed.
        source: that of the run that rows come from; None where they come from none.
        null: that of a change too small to matter at this place; None where none was tried.
        random: that of a random change as large as the cell's; None where none was tried.
    """

    run: int
    cell: int
    value: float
    unchanged: float
    source: float | None = None
    null: float | None = None
    random: float | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """Some cells of one run, ready to be run.

    Attributes:
        run: which of the sweep's.
        cells: indices in the grid.
        nudges: cell -> the change that is too small to matter, where one is tried.
        source: what the metric gives for the run that rows come from; None where they come from none.
    """

    run: int
    base: Base
    grid: Grid
    change: Change
    metric: Metric
    cells: range
    nudges: Mapping[int, Nudge] = field(default_factory=dict)
    source: Any = None

    def prepare(self, model: Model, seeds: Mapping[int, int]) -> dict[int, Nudge]:
        """Runs what the change needs first. `seeds`: cell -> seed of its nudge. Returns the nudges."""
        places = [self.grid.place(self.grid.cell(i)) for i in self.cells]
        nudges: dict[int, Nudge] = {}
        for i, seed in seeds.items():
            place = places[i - self.cells.start]
            nudges[i] = Nudge.at(model, place, self.change.changed_tokens(place), seed)
        self.change.prepare(places, list(nudges.values()))
        return nudges

    def requests(self, first: int) -> tuple[list[Request], list[_Waiting]]:
        """The requests, of which the first has index `first`, and the rows that they make."""
        base, metric, change, grid = self.base, self.metric, self.change, self.grid
        unchanged = request_of(base, metric, change.reference())
        out = [replace(unchanged, metric=metric.of_unchanged)]
        out += [
            request_of(base, metric, change.edits(grid.place(grid.cell(i)))) for i in self.cells
        ]
        nulls = {i: first + len(out) + n for n, i in enumerate(self.nudges)}
        out += [request_of(base, metric, change.nudged(n)) for n in self.nudges.values()]
        randoms: dict[int, int] = {}
        for i in self.nudges:
            if (edits := change.random(grid.place(grid.cell(i)), i)) is not None:
                randoms[i] = first + len(out)
                out.append(request_of(base, metric, edits))
        rows = [
            _Waiting(
                self.run,
                i,
                metric,
                first + 1 + n,
                first,
                self.source,
                nulls.get(i),
                randoms.get(i),
            )
            for n, i in enumerate(self.cells)
        ]
        return out, rows


def run_prepared(
    model: Model,
    parts: Sequence[Prepared],
    on_row: Callable[[CellRow], None],
    progress: Progress | None = None,
) -> None:
    """Runs cells, all in one run. `on_row` is called with each as soon as it and all before it are
    done."""
    requests: list[Request] = []
    waiting: list[_Waiting] = []
    for part in parts:
        more, rows = part.requests(len(requests))
        requests += more
        waiting += rows
    model.run(requests, progress=progress, on_result=_Ordered(waiting, on_row).put)


def request_of(base: Base, metric: Metric, edits: Sequence[Edit] = ()) -> Request:
    n = len(base.tokens)
    positions = range(n - metric.n_positions, n)
    return Request(base.tokens, [*base.edits, *edits], logits=positions, metric=metric.function)


class _Waiting(NamedTuple):
    """A row, and the indices of the requests that it needs."""

    run: int
    cell: int
    metric: Metric
    value: int
    unchanged: int
    source: Any
    null: int | None
    random: int | None

    def row(self, values: dict[int, Any], source: float | None) -> CellRow:
        """`source`: the number of the run that rows come from."""
        number = self.metric.number
        return CellRow(
            self.run,
            self.cell,
            number(values.pop(self.value)),
            number(values[self.unchanged]),
            source,
            None if self.null is None else number(values.pop(self.null)),
            None if self.random is None else number(values.pop(self.random)),
        )

    def is_ready(self, values: dict[int, Any]) -> bool:
        needed = (self.value, self.unchanged, self.null, self.random)
        return all(i is None or i in values for i in needed)


class _Ordered:
    """Rows in the order of the cells, from results that come in any."""

    def __init__(self, rows: Sequence[_Waiting], on_row: Callable[[CellRow], None]):
        self._rows, self._on_row, self._next = rows, on_row, 0
        self._values: dict[int, Any] = {}
        #: index of an unchanged run -> the number of the run that its rows come from
        self._sources: dict[int, float] = {}

    def put(self, index: int, result: Result) -> None:
        self._values[index] = result.value
        while self._next < len(self._rows) and self._rows[self._next].is_ready(self._values):
            waiting = self._rows[self._next]
            self._next += 1
            self._on_row(waiting.row(self._values, self._source(waiting)))

    def _source(self, row: _Waiting) -> float | None:
        if row.source is None:
            return None
        if row.unchanged not in self._sources:
            self._sources[row.unchanged] = row.metric.number(row.source)
        return self._sources[row.unchanged]


def seeds_of(n_cells: int, null: int) -> dict[int, int]:
    """The cells at which a change too small to matter is tried, each with the seed of its noise."""
    return {cell: seed for seed, cell in enumerate(spread(n_cells, null))}


def spread(n: int, k: int) -> list[int]:
    """At most k of n indices, evenly over them."""
    k = min(k, n)
    return [int((i + 0.5) * n / k) for i in range(k)]


# -- one run of one case, in memory --------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cells:
    """The numbers of one run's cells.

    Attributes:
        values: the metric in each cell, as `Grid.shape`.
        unchanged: the metric of the run that is changed.
        null: (n_null,) the metric of cells whose change is too small to matter.
    """

    values: Values
    unchanged: float
    null: Values

    @property
    def floor(self) -> float:
        """The largest difference that one of these made; NaN if none was tried."""
        return float(np.abs(self.null - self.unchanged).max()) if len(self.null) else float("nan")


def run_cells(
    model: Model,
    base: Base,
    grid: Grid,
    change: Change,
    metric: Metric,
    *,
    null: int = NULL,
    progress: Progress | None = None,
) -> Cells:
    """The metric of every cell, all in one run.

    Args:
        base: the run that is changed.
        null: how many cells have a change too small to matter, spread over the grid; at most as
            many as it has.
    """
    part = Prepared(0, base, grid, change, metric, range(len(grid)))
    part = replace(part, nudges=part.prepare(model, seeds_of(len(grid), null)))
    rows: list[CellRow] = []
    run_prepared(model, [part], rows.append, progress)
    values = np.array([row.value for row in rows], np.float64).reshape(grid.shape)
    nulls = [row.null for row in rows if row.null is not None]
    return Cells(values, rows[0].unchanged, np.array(nulls, np.float64))
