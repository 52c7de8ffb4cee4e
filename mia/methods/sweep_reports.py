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
from mia.show.values import random_line
from mia.sweeps.axes import Axis, Cell

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.engine.dry import Count
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
        values: the metric, the mean over the runs that were changed; NaN in cells that are not
            known yet, or are another shard's.
        low, high: ends of the 95 % interval of the effect over them; None for a single run.
        unchanged, source: the metric of the run that is changed, and of the one that rows come
            from (None where they come from none); means too.
        floor: the largest difference that a change by 1e-5 made; NaN if none was tried.
        n_runs, n_null: how many runs were changed, and how many changes by 1e-5 tried so far.
        k: how many cells the text lists.
        random: of a vector: how far random directions of its norm moved the metric, in cells spread over
            the sweep; empty for other changes.
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
    random: tuple[float, ...] = ()

    @property
    def effect(self) -> Values:
        """`values` minus `unchanged`."""
        return self.values - self.unchanged

    @property
    def n_known(self) -> int:
        """How many cells have a number."""
        return int(np.isfinite(self.values).sum())

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
            **({"random": rounded(np.array(self.random))} if self.random else {}),
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
            if np.isfinite(self.values[cell])
        ]

    def plain(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        lines = [f"{self.title}, {self.metric} unchanged: {self.unchanged:.4f}{unit}"]
        if self.source is not None:
            lines[0] += f", of the source: {self.source:.4f}{unit}"
        if self.n_known < self.values.size:
            lines.append(f"{self.n_known} of {self.values.size} cells")
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
            below = self.n_known - int(self.above_floor.sum())
            changes = "1 change" if self.n_null == 1 else f"{self.n_null} changes"
            lines.append(
                f"noise floor {self.floor:.2g}{unit} ({changes} by 1e-5); "
                f"{below} of {self.n_known} cells lie within it"
            )
        if self.random:
            lines.append(random_line(self.random, unit))
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
        """Draws one axis as a curve with its interval and the noise floor, two as coloured cells, of
        which those within the noise floor are grey."""
        from mia.show import plots
        from mia.show.effect_curve import effect_curve

        if len(self.axes) > 2:
            raise UsageError(f"a picture has one axis or two, not {len(self.axes)}")
        bar = f"change of {self.metric}" + (f" ({self.unit})" if self.unit else "")
        title = f"{self.facts.name} · {self.title} at {self.site}"
        if len(self.axes) == 1:
            (axis,) = self.axes
            numbers = all(isinstance(v, (int, float)) for v in axis.values)
            plain = numbers and axis.labels == tuple(str(v) for v in axis.values)
            fig = effect_curve(
                self.effect,
                x=axis.values if plain else None,
                labels=() if plain else axis.labels,
                interval=None if self.low is None or self.high is None else (self.low, self.high),
                floor=self.floor,
                title=title,
                x_label=axis.name,
                y_label=bar,
            )
        else:
            down, across = self.axes
            fig = plots.heatmap(
                np.where(self.above_floor, self.effect, np.nan),
                x=across.name,
                y=down.name,
                bar=bar,
                title=title,
                x_labels=[visible(x) for x in across.labels],
                y_labels=[visible(x) for x in down.labels],
                diverging=True,
            )
        plots.save(fig, path)

    def _top(self) -> list[Cell]:
        """The cells of the largest effects, the largest first."""
        order = np.argsort(-np.abs(self.effect), axis=None, kind="stable")
        order = order[: min(self.k, self.n_known)]  # NaN stands behind all numbers
        cells = [np.unravel_index(i, self.values.shape) for i in order]
        return [tuple(int(i) for i in cell) for cell in cells]

    @staticmethod
    def _label(axis: Axis, i: int) -> str:
        value, label = axis.values[i], axis.labels[i]
        return str(value) if label == str(value) else f"{value} '{visible(label)}'"


@dataclass(frozen=True, eq=False)
class Explained(Report):
    """What a sweep costs, counted before it is run. A token-forward is one token through the model.

    Attributes:
        n_cells: cells, of all runs that are changed.
        n_chunks: chunks that they run in.
        one_by_one: token-forwards of the cells, each run alone.
        planned: the batches of the planned runs, with those of sources, unchanged runs and changes
            by 1e-5.
    """

    facts: ModelFacts
    n_cells: int
    n_chunks: int
    one_by_one: int
    planned: Count

    @property
    def share(self) -> float:
        """Token-forwards of the plan, as a share of those one by one."""
        return self.planned.rows / self.one_by_one

    @property
    def block_share(self) -> float:
        """The same, each token times the blocks that are run for it."""
        return self.planned.block_rows / (self.one_by_one * self.facts.n_layer)

    @property
    def mean_rows(self) -> float:
        """Rows of a batch, on average over the rows."""
        return sum(d.rows**2 for d in self.planned.decodes) / self.planned.rows

    def document(self) -> dict[str, Any]:
        decodes = self.planned.decodes
        return {
            "model": self.facts.document(),
            "cells": self.n_cells,
            "chunks": self.n_chunks,
            "token_forwards": {
                "planned": self.planned.rows,
                "one_by_one": self.one_by_one,
                "share": rounded(self.share),
                "share_in_blocks": rounded(self.block_share),
            },
            "batches": {
                "room": self.planned.room,
                "mean_rows": rounded(self.mean_rows),
                "rows": [d.rows for d in decodes],
                "sequences": [d.sequences for d in decodes],
                "first_block": [d.first_block for d in decodes],
            },
        }

    def plain(self) -> str:
        n, decodes = self.planned.rows, self.planned.decodes
        chunks = "1 chunk" if self.n_chunks == 1 else f"{self.n_chunks} chunks"
        return "\n".join(
            [
                f"{self.n_cells} cells in {chunks}",
                f"token-forwards: {n} planned, {self.one_by_one} one by one ({self.share:.3f}); "
                f"by the blocks that run {self.block_share:.3f}",
                f"batches: {len(decodes)}; a token's batch has {self.mean_rows:.0f} of "
                f"{self.planned.room} rows on average",
            ]
        )
