"""The report of a sweep: a number for each cell, as text, table, picture and document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.errors import UsageError
from mia.show.report import Report
from mia.show.text import rounded, visible
from mia.sweeps.axes import Axis, Cell

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts

Values = npt.NDArray[np.float64]
#: more rows than this are no picture for a terminal
_ROWS = 80


@dataclass(frozen=True, eq=False)
class Sweep(Report):
    """A number for each cell of a grid.

    Attributes:
        title: what is done in a cell.
        prompt: the tokens of the run that is changed.
        axes: names, values and labels, in the order of the axes of `values`.
        metric, unit: what the numbers are.
        values: the metric, the mean over the runs that were changed.
        low, high: ends of the 95 % interval of the effect over them; None for a single run.
        unchanged, source: the metric of the run that is changed, and of the one that rows come
            from (None where they come from none); means too.
        floor: the largest difference that a change by 1e-5 made; NaN if none was tried.
        n_runs, n_null: how many runs were changed, and how many changes by 1e-5 tried.
        k: how many cells the text lists.
    """

    facts: ModelFacts
    title: str
    site: str
    prompt: Sequence[Token]
    answer: Sequence[Token]
    against: Sequence[Token]
    axes: tuple[Axis, ...]
    metric: str
    unit: str
    values: Values
    low: Values | None
    high: Values | None
    unchanged: float
    source: float | None
    floor: float
    n_runs: int
    n_null: int
    k: int

    @property
    def effect(self) -> Values:
        """`values` minus `unchanged`."""
        return self.values - self.unchanged

    @property
    def restored(self) -> Values:
        """The effect as a share of what parts the two runs: 0 as unchanged, 1 as the source.

        Raises `UsageError` where rows come from no other run, or it gives the same number.
        """
        if self.source is None or self.source == self.unchanged:
            raise UsageError("the run that is changed and its source do not differ in the metric")
        return self.effect / (self.source - self.unchanged)

    @property
    def above_floor(self) -> npt.NDArray[np.bool_]:
        """The cells whose effect is larger than the noise floor; all where it is not known."""
        seen: npt.NDArray[np.bool_] = np.abs(self.effect) > np.nan_to_num(self.floor)
        return seen

    def document(self) -> dict[str, Any]:
        interval = {}
        if self.low is not None and self.high is not None:
            interval = {"low": rounded(self.low), "high": rounded(self.high)}
        return {
            "model": self.facts.document(),
            "change": self.title,
            "site": self.site,
            "tokens": [t.document() for t in self.prompt],
            "answer": [t.document() for t in self.answer],
            "against": [t.document() for t in self.against],
            "axes": [
                {"name": a.name, "values": list(a.values), "labels": list(a.labels)}
                for a in self.axes
            ],
            "metric": self.metric,
            "unit": self.unit,
            "values": rounded(self.values),
            **interval,
            "unchanged": rounded(self.unchanged),
            "source": None if self.source is None else rounded(self.source),
            "noise_floor": None if np.isnan(self.floor) else rounded(self.floor),
            "null": self.n_null,
            "runs": self.n_runs,
        }

    def rows(self) -> list[dict[str, Any]]:
        seen = self.above_floor
        return [
            {
                **{a.name: a.values[i] for a, i in zip(self.axes, cell, strict=True)},
                "value": float(self.values[cell]),
                "effect": float(self.effect[cell]),
                "above_floor": bool(seen[cell]),
                **({} if self.low is None else {"low": float(self.low[cell])}),
                **({} if self.high is None else {"high": float(self.high[cell])}),
            }
            for cell in np.ndindex(*self.values.shape)
        ]

    def plain(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        lines = [f"{self.title}, {self.metric} unchanged: {self.unchanged:.4f}{unit}"]
        if self.source is not None:
            lines[0] += f", of the source: {self.source:.4f}{unit}"
        for cell in self._top():
            where = ", ".join(
                f"{a.name} {self._label(a, i)}" for a, i in zip(self.axes, cell, strict=True)
            )
            interval = ""
            if self.low is not None and self.high is not None:
                interval = f" [{self.low[cell]:+.4f}, {self.high[cell]:+.4f}]"
            effect = f"{self.effect[cell]:+.4f}{interval}"
            lines.append(f"{where}: {self.values[cell]:.4f} ({effect})")
        if self.n_null:
            below = int((~self.above_floor).sum())
            lines.append(
                f"noise floor {self.floor:.2g}{unit} ({self.n_null} changes by 1e-5); "
                f"{below} of {self.values.size} cells lie within it"
            )
        return "\n".join(lines)

    def table(self, width: int) -> RenderableType:
        """The effects as coloured cells, then the text."""
        from rich.console import Group

        from mia.show.grid import cells_fit, grid

        down = self.axes[0]
        effect = self.effect.reshape(len(down), -1)
        if len(self.axes) > 2 or len(down) > _ROWS or not cells_fit(effect.shape[1], width):
            return super().table(width)
        across = self.axes[1] if len(self.axes) == 2 else None
        cells = grid(
            np.where(self.above_floor.reshape(effect.shape), effect, np.nan),
            f"change of {self.metric}",
            width,
            diverging=True,
            names=down.values,
            down=f"{down.name}s",
            across="one run" if across is None else f"{across.name}s",
            columns=[""] if across is None else across.values,
        )
        return Group(cells, super().table(width))

    def plot(self, path: str | Path) -> None:
        """Draws one axis or two as coloured cells. Those within the noise floor are grey."""
        from mia.show import plots

        if len(self.axes) > 2:
            raise UsageError(f"a picture has one axis or two, not {len(self.axes)}")
        bar = f"change of {self.metric}" + (f" ({self.unit})" if self.unit else "")
        title = f"{self.facts.name} · {self.title} at {self.site}"
        down, across = self.axes if len(self.axes) == 2 else (None, self.axes[0])
        effect = np.where(self.above_floor, self.effect, np.nan)
        fig = plots.heatmap(
            effect if down is not None else effect[None],
            x=across.name,
            y="" if down is None else down.name,
            bar=bar,
            title=title,
            x_labels=[visible(x) for x in across.labels],
            y_labels=None if down is None else [visible(x) for x in down.labels],
            diverging=True,
        )
        plots.save(fig, path)

    def _top(self) -> list[Cell]:
        """The cells of the largest effects, the largest first."""
        order = np.argsort(-np.abs(self.effect), axis=None, kind="stable")[: self.k]
        cells = [np.unravel_index(i, self.values.shape) for i in order]
        return [tuple(int(i) for i in cell) for cell in cells]

    @staticmethod
    def _label(axis: Axis, i: int) -> str:
        value, label = axis.values[i], visible(axis.labels[i])
        return str(value) if label == str(value) else f"{value} {label!r}"
