"""Maps of a page: a number, or a token, for each row and column, as a table with coloured cells.

It is a table so that a screen reader reads it and so that it needs no script. The page's script
(`data/page.html`) adds what hovering and the arrow keys show: the cell's names, its number with
the interval, and the command that computes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.arrays import Floats
from mia.errors import UsageError
from mia.show.markup import attributes, decimals, element, interval, number, shade, text
from mia.show.text import safe

#: cells of one map: a page with more is slow
MOST_CELLS = 50_000
#: maps of more columns are drawn without numbers in the cells
_NUMBERS = 40


class Of(IntEnum):
    """What stands in a cell's command for the value of its row or column."""

    ROW = 0
    COLUMN = 1


#: a command line with places for a cell's row and column: `("mia run --layers ", Of.ROW)`
Command = Sequence["str | Of"]


@dataclass(frozen=True)
class Axis:
    """An axis of a map or a curve.

    Attributes:
        name: "layer".
        values: what a command has for each row: 0, 1, …
        labels: what a person reads: the text of each token; the values by default.
    """

    name: str
    values: Sequence[Any]
    labels: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.values)

    def label(self, i: int) -> str:
        """The text at a row or column."""
        return str(self.labels[i]) if self.labels else str(self.values[i])

    def full(self, i: int) -> str:
        """The axis's name with the value, and the text where that says more: `token 4 " is"`."""
        value, label = str(self.values[i]), self.label(i)
        return f"{self.name} {value}" if value == label else f'{self.name} {value} "{label}"'


@dataclass(frozen=True, kw_only=True, eq=False)
class HeatMap:
    """A number for each row and column.

    Attributes:
        title: what the numbers are.
        values: (n_rows, n_columns); NaN where there is none.
        rows, columns: the axes.
        unit: of the numbers.
        low, high: ends of their 95 % intervals, as `values`; None where there are none.
        floor: cells no farther from 0 than this are grey: they lie within the noise.
        diverging: red above 0, blue below it; else one scale from 0 to the largest.
        top: where the colours end; by default the largest |value|.
        command: the command line that computes a cell.
        note: a line below the map.
    """

    title: str
    values: npt.ArrayLike
    rows: Axis
    columns: Axis
    unit: str = ""
    low: npt.ArrayLike | None = None
    high: npt.ArrayLike | None = None
    floor: float = 0.0
    diverging: bool = True
    top: float | None = None
    command: Command = ()
    note: str = ""

    def html(self, n: int) -> str:
        """The map as HTML. Raises `UsageError` for arrays that are not of the axes."""
        a = _of_axes(self.values, self)
        low, high = (None if b is None else _of_axes(b, self) for b in (self.low, self.high))
        top = _top(a) if self.top is None else self.top
        digits = decimals(np.array([top]))
        cells = []
        for i, row in enumerate(a):
            line = []
            for k, x in enumerate(row.tolist()):
                quiet = self.floor > 0 and abs(x) <= self.floor
                more = {
                    "n": number(x, signed=self.diverging),
                    "i": None
                    if low is None or high is None or not np.isfinite(low[i, k])
                    else interval(low[i, k], high[i, k], signed=self.diverging),
                }
                colour = "z" if quiet else shade(x, top, diverging=self.diverging)
                shown = f"{x:.{digits}f}" if np.isfinite(x) else ""
                line.append(_cell(shown, colour, **more))
            cells.append(line)
        legend = _legend(top, digits, diverging=self.diverging, unit=self.unit, floor=self.floor)
        return _figure(self, cells, legend, n, "map", bare=len(self.columns) > _NUMBERS)


@dataclass(frozen=True, kw_only=True, eq=False)
class LensGrid:
    """A token for each row and column: what each layer would say next.

    Attributes:
        top: the best tokens of each cell, best first, each (text, probability).
        values: (n_rows, n_columns), the colours.
        rows, columns: the axes; the last row stands on top.
        name: what the values are: "probability", or "entropy" with its `unit`.
        largest: where the colours end; by default the largest value.
        others: more numbers of a cell, by name, each as `values`.
        command: the command line that computes a cell.
    """

    title: str
    top: Sequence[Sequence[Sequence[tuple[str, float]]]]
    values: npt.ArrayLike
    rows: Axis
    columns: Axis
    name: str = "probability"
    unit: str = ""
    largest: float | None = None
    others: Sequence[tuple[str, npt.ArrayLike]] = ()
    command: Command = ()
    note: str = ""

    def html(self, n: int) -> str:
        """The grid as HTML. Raises `UsageError` for values that are not of the axes."""
        a = _of_axes(self.values, self)
        others = [(name, _of_axes(b, self)) for name, b in self.others]
        if len(self.top) != len(a) or any(len(row) != a.shape[1] for row in self.top):
            raise UsageError(f"{self.title}: the tokens are not of {len(a)} × {a.shape[1]} cells")
        largest = _top(a) if self.largest is None else self.largest
        cells = []
        for i, row in enumerate(self.top):
            line = []
            for k, best in enumerate(row):
                x = float(a[i, k])
                numbers = [f"{self.name} {number(x)} {self.unit}".rstrip()]
                numbers += [f"{name} {number(float(b[i, k]))}" for name, b in others]
                listed = [f'{p:.3f}  "{safe(piece)}"' for piece, p in best]
                line.append(
                    _cell(
                        best[0][0] if best else "",
                        shade(x, largest, diverging=False),
                        n="; ".join(numbers),
                        tip="\n".join(listed),
                    )
                )
            cells.append(line)
        digits = decimals(np.array([largest]))
        legend = _legend(largest, digits, diverging=False, unit=self.unit, name=self.name)
        # the model's end on top, as its outputs are drawn
        return _figure(self, cells, legend, n, "lens", upside_down=True)


def _of_axes(values: npt.ArrayLike, of: HeatMap | LensGrid) -> Floats:
    a = np.asarray(values, np.float64)
    shape = (len(of.rows), len(of.columns))
    if a.shape != shape:
        raise UsageError(f"{of.title}: an array of shape {a.shape} is not of {shape} cells")
    if a.size > MOST_CELLS:
        raise UsageError(f"{of.title}: {a.size} cells; a page has {MOST_CELLS} at most")
    for axis in (of.rows, of.columns):
        if axis.labels and len(axis.labels) != len(axis.values):
            raise UsageError(f"{of.title}: {len(axis.labels)} labels for {len(axis)} {axis.name}s")
    return a


def _top(a: Floats) -> float:
    finite = np.abs(a[np.isfinite(a)])
    return float(finite.max()) if finite.size else 0.0


def _cell(shown: str, colour: str, **data: str | None) -> str:
    more = {f"data-{name}": value for name, value in data.items() if value}
    return element("td", text(shown), class_=colour, **more)


def _figure(
    part: HeatMap | LensGrid,
    cells: Sequence[Sequence[str]],
    legend: str,
    n: int,
    kind: str,
    *,
    bare: bool = False,
    upside_down: bool = False,
) -> str:
    """The table, its names and its legend."""
    columns = "".join(
        element(
            "th",
            f"<span>{text(part.columns.label(k))}</span>",
            scope="col",
            data_v=str(part.columns.values[k]),
            data_full=part.columns.full(k),
        )
        for k in range(len(part.columns))
    )
    corner = f"{text(part.rows.name)} ↓ {text(part.columns.name)} →"
    order = range(len(cells))
    rows = "\n".join(
        "<tr>"
        + element(
            "th",
            text(part.rows.label(i)),
            scope="row",
            data_v=str(part.rows.values[i]),
            data_full=part.rows.full(i),
        )
        + "".join(cells[i])
        + "</tr>"
        for i in (reversed(order) if upside_down else order)
    )
    upright = max((len(part.columns.label(k)) for k in range(len(part.columns))), default=0) > 4
    classes = [kind, "bare" if bare else "", "upright" if upright and kind == "map" else ""]
    command = json.dumps([c if isinstance(c, str) else int(c) for c in part.command])
    opening = attributes(
        role="grid",
        class_=" ".join(filter(None, classes)),
        aria_labelledby=f"title-{n}",
        data_unit=getattr(part, "unit", "") if kind == "map" else None,
        data_command=command if part.command else None,
    )
    note = f'<p class="note">{text(part.note)}</p>' if part.note else ""
    return (
        f'<figure><figcaption id="title-{n}">{text(part.title)}</figcaption>{legend}\n'
        f'<div class="scroll"><table{opening}>\n<thead><tr><th class="corner">{corner}</th>{columns}'
        f'</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n<p class="chosen" role="status">'
        f"</p>{note}</figure>"
    )


def _legend(
    top: float, digits: int, *, diverging: bool, unit: str, floor: float = 0.0, name: str = ""
) -> str:
    low = f"−{top:.{digits}f}" if diverging else "0"
    high = f"{'+' if diverging else ''}{top:.{digits}f}"
    grey = ""
    if floor > 0:
        grey = f' <span class="ramp z"></span> within the noise floor, ±{floor:.2g}'
    return (
        f'<p class="legend">{text(name)} {low} <span class="ramp {"d" if diverging else "s"}"></span> '
        f"{high} {text(unit)}{grey}</p>"
    )
