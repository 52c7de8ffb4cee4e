"""The numbers of a sweep as they come in, and their means over the runs."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import numpy.typing as npt

from mia.measure.estimates import bootstrap_interval
from mia.sweeps.cells import CellRow

Values = npt.NDArray[np.float64]
#: draws of the bootstrap, and numbers that it may hold at a time
_DRAWS, _HELD = 2000, 1 << 24


class Numbers:
    """Rows by run and cell, NaN where there is none yet.

    Attributes:
        n_rows: how many there are.
        n_null: how many changes too small to matter have a number.
        random: how far each random change as large as a cell's moved the metric.
    """

    def __init__(self, n_runs: int, shape: tuple[int, ...]):
        self._shape, self.n_rows, self.n_null = shape, 0, 0
        size = n_runs, prod(shape)
        #: (n_runs, n_cells) the metric in each cell, and of the unchanged run beside it
        self._values, self._unchanged = np.full(size, np.nan), np.full(size, np.nan)
        self._sources: dict[int, float] = {}
        self._floors: dict[int, float] = {}
        self.random: list[float] = []

    def put(self, rows: Iterable[CellRow]) -> None:
        for row in rows:
            self._values[row.run, row.cell] = row.value
            self._unchanged[row.run, row.cell] = row.unchanged
            if row.source is not None:
                self._sources.setdefault(row.run, row.source)
            if row.null is not None:
                moved = abs(row.null - row.unchanged)
                self.n_null += 1
                self._floors[row.run] = max(self._floors.get(row.run, 0.0), moved)
            if row.random is not None:
                self.random.append(abs(row.random - row.unchanged))
            self.n_rows += 1

    @property
    def unchanged(self) -> float:
        """The metric of the run that is changed, the mean over the runs."""
        known = self._first[~np.isnan(self._first)]
        return float(known.mean()) if len(known) else float("nan")

    @property
    def source(self) -> float | None:
        """That of the run that rows come from; None where they come from none."""
        return float(np.mean(list(self._sources.values()))) if self._sources else None

    @property
    def floor(self) -> float:
        """The largest difference that a change too small to matter made; NaN if none was tried."""
        return max(self._floors.values(), default=float("nan"))

    @property
    def _first(self) -> Values:
        """(n_runs,) the metric of each run that is changed, as its first cell has it."""
        at = np.isnan(self._unchanged).argmin(axis=1)
        return self._unchanged[np.arange(len(at)), at]

    def means(self) -> tuple[Values, Values | None, Values | None]:
        """The metric in each cell, the mean over the runs, and the ends of the 95 % interval of the
        effect; None for one run, or as long as rows are missing."""
        first = self._first[:, None]
        # chunks that end a case run in other batches, which on quantized files moves both alike
        same = self._unchanged == first
        values = np.where(same, self._values, self._values - self._unchanged + first)
        if self.n_rows < values.size:
            n = (~np.isnan(values)).sum(0)
            effect = np.where(n, np.nansum(values - first, axis=0) / np.maximum(n, 1), np.nan)
            return (effect + self.unchanged).reshape(self._shape), None, None
        mean = values.T.mean(-1).reshape(self._shape)
        if len(values) == 1:
            return mean, None, None
        low, high = self._intervals((values - first).T)
        return mean, low, high

    def _intervals(self, effects: Values) -> tuple[Values, Values]:
        """Of effects (n_cells, n_runs): a part of them at a time, for each is drawn 2,000 times."""
        step = max(1, _HELD // (_DRAWS * effects.shape[1]))
        ends = [
            bootstrap_interval(effects[i : i + step], np.random.default_rng(0), n=_DRAWS)
            for i in range(0, len(effects), step)
        ]
        low, high = np.concatenate(ends, axis=1)
        return low.reshape(self._shape), high.reshape(self._shape)
