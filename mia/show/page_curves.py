"""Curves and bars of a page, with their intervals: inline SVG, and a table with the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mia.arrays import Floats
from mia.errors import UsageError
from mia.show.markup import attributes, element, interval, number, text
from mia.show.page_maps import Axis, Command, Of

#: the size of a drawing, and its margins: left, right, above
_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _ABOVE = 64, 16, 12
#: of text below it: numbers, or tokens that stand upright
_BELOW, _BELOW_UPRIGHT = 46, 104
#: lines have as many colours
_COLOURS = 6
#: letters of a token on an axis, points between two labels
_LETTERS, _APART = 12, 15
#: from as many points on, only hovering shows where they are
_DOTS = 120


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """A line of a `Curve`: (n,) numbers, and the ends of their 95 % intervals."""

    name: str
    y: npt.ArrayLike
    low: npt.ArrayLike | None = None
    high: npt.ArrayLike | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Lines over one axis.

    Attributes:
        x: the axis; numbers without labels lie as far apart as they are, all else evenly.
        y_name: what the numbers are, with their unit.
        floor: half of the width of a grey band around 0: the noise.
        signed: numbers have their sign.
        command: the command line that computes a point, whose value on the axis is `Of.COLUMN`.
    """

    title: str
    x: Axis
    lines: Sequence[Line]
    y_name: str = ""
    floor: float = 0.0
    signed: bool = False
    command: Command = ()
    note: str = ""

    def html(self, n: int) -> str:
        """The drawing, and its numbers folded. Raises `UsageError` for lines that do not fit."""
        lines = [_Drawn(self, line) for line in self.lines]
        names = "".join(
            f'<span class="key l{i % _COLOURS}"></span> {text(line.name)} '
            for i, line in enumerate(self.lines)
            if len(self.lines) > 1
        )
        bands = ["the band is the 95 % interval"] if any(d.low is not None for d in lines) else []
        if self.floor > 0:
            bands.append(f"grey: within the noise floor, ±{self.floor:.2g}")
        legend = f'<p class="legend">{names}{text("; ".join(bands))}</p>'
        note = f'<p class="note">{text(self.note)}</p>' if self.note else ""
        return (
            f'<figure><figcaption id="title-{n}">{text(self.title)}</figcaption>{legend}'
            f"{_drawing(self, lines, n)}"
            f'<p class="chosen" role="status"></p>{note}{_numbers(self, lines)}</figure>'
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Bar:
    """A bar of a `BarList`: its number, its interval, and the command that computes it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    command: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class BarList:
    """Numbers by name, each with a bar. Those no farther from 0 than `floor` are grey."""

    title: str
    bars: Sequence[Bar]
    unit: str = ""
    floor: float = 0.0
    note: str = ""

    def html(self, n: int) -> str:
        finite = [abs(b.value) for b in self.bars if math.isfinite(b.value)]
        top = max(finite, default=0.0) or 1.0
        both = any(b.value < 0 for b in self.bars)
        rows = "\n".join(self._row(b, top, both) for b in self.bars)
        grey = f"grey: within the noise floor, ±{self.floor:.2g}" if self.floor > 0 else ""
        note = "".join(f'<p class="note">{text(t)}</p>' for t in (grey, self.note) if t)
        opening = attributes(
            role="grid", class_="bars both" if both else "bars", aria_labelledby=f"title-{n}"
        )
        return (
            f'<figure><figcaption id="title-{n}">{text(self.title)}</figcaption>\n'
            f'<div class="scroll"><table{opening}><tbody>\n{rows}\n</tbody></table></div>'
            f'<p class="chosen" role="status"></p>{note}</figure>'
        )

    def _row(self, b: Bar, top: float, both: bool) -> str:
        share = min(abs(b.value) / top, 1.0) * 100 if math.isfinite(b.value) else 0.0
        side = "below" if b.value < 0 else "above"
        quiet = " quiet" if self.floor > 0 and abs(b.value) <= self.floor else ""
        if both:  # 0 stands in the middle
            share /= 2
            start = 50 - share if b.value < 0 else 50.0
        else:
            start = 0.0
        drawn = (
            f'<span class="bar {side}{quiet}" style="margin-left:{start:.1f}%;width:{share:.1f}%">'
        )
        ends = "" if b.low is None or b.high is None else interval(b.low, b.high, signed=both)
        shown = number(b.value, signed=both)
        full = f"{b.label}\n{shown} {self.unit} {ends}".rstrip()
        value = element("td", text(f"{shown} {ends}"), data_tip=full, data_run=b.command or None)
        track = f'<td class="track" aria-hidden="true">{drawn}</span></td>'
        return f'<tr><th scope="row">{text(b.label)}</th>{track}{value}</tr>'


class _Drawn:
    """The numbers of a line. Raises `UsageError` where they are not of the curve's axis."""

    def __init__(self, curve: Curve, line: Line) -> None:
        self.name = line.name
        self.y: Floats = np.asarray(line.y, np.float64)
        ends = (line.low, line.high)
        self.low, self.high = (None if b is None else np.asarray(b, np.float64) for b in ends)
        for a in (self.y, self.low, self.high):
            if a is not None and a.shape != (len(curve.x),):
                raise UsageError(
                    f"{curve.title}: line {line.name!r} has shape {a.shape}, the axis "
                    f"{curve.x.name} {len(curve.x)} values"
                )

    def said(self, i: int, *, signed: bool) -> str:
        ends = ""
        if self.low is not None and self.high is not None and np.isfinite(self.low[i]):
            ends = " " + interval(self.low[i], self.high[i], signed=signed)
        return number(float(self.y[i]), signed=signed) + ends


class _Scale:
    """From numbers to places of a drawing."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = (low, high) if high > low else (low - 1, high + 1)
        self.start, self.end = start, end

    def __call__(self, x: float) -> float:
        share = (x - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        """Round numbers, about five of them."""
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def _drawing(curve: Curve, lines: Sequence[_Drawn], n: int) -> str:
    upright = bool(curve.x.labels)
    below = _BELOW_UPRIGHT if upright else _BELOW
    bottom = _HEIGHT - _BELOW
    at = _places(curve.x)
    x = _Scale(min(at, default=0.0), max(at, default=1.0), _LEFT, _WIDTH - _RIGHT)
    y = _Scale(*_range(curve, lines), bottom, _ABOVE)
    parts = []
    if curve.floor > 0:
        top, end = y(curve.floor), y(-curve.floor)
        parts.append(
            f'<rect class="floor" x="{_LEFT}" y="{top}" width="{_WIDTH - _RIGHT - _LEFT}" '
            f'height="{round(end - top, 2)}"/>'
        )
    for tick in y.ticks():
        parts.append(
            f'<line class="{"zero" if tick == 0 else "rule"}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{y(tick)}" y2="{y(tick)}"/><text class="end" x="{_LEFT - 6}" y="{y(tick) + 4}">'
            f"{tick:g}</text>"
        )
    parts += _x_labels(curve.x, at, x, bottom)
    for i, line in enumerate(lines):
        parts += _line(curve, line, at, x, y, i)
    middle = (_ABOVE + bottom) / 2
    parts.append(
        f'<text class="name" transform="rotate(-90)" x="{-middle}" y="14">{text(curve.y_name)}</text>'
        f'<text class="name" x="{(_LEFT + _WIDTH) / 2}" y="{bottom + below - 8}">{text(curve.x.name)}</text>'
    )
    opening = attributes(
        viewBox=f"0 0 {_WIDTH} {bottom + below}", role="group", aria_labelledby=f"title-{n}"
    )
    return f'<div class="scroll"><svg class="curve"{opening}>{"".join(parts)}</svg></div>'


def _places(axis: Axis) -> list[float]:
    """Where the values of an axis lie: as far apart as they are if they are numbers."""
    numbers = [v for v in axis.values if isinstance(v, (int, float)) and math.isfinite(v)]
    if axis.labels or len(numbers) < len(axis):
        return [float(i) for i in range(len(axis))]
    return [float(v) for v in numbers]


def _range(curve: Curve, lines: Sequence[_Drawn]) -> tuple[float, float]:
    """The least and the largest number, with some room; of a curve with a floor also that."""
    all_ = [a for line in lines for a in (line.y, line.low, line.high) if a is not None]
    numbers = np.concatenate([*(a[np.isfinite(a)] for a in all_), np.zeros(0)])
    if curve.floor > 0 or curve.signed:
        numbers = np.append(numbers, [-curve.floor, curve.floor])
    if not numbers.size:
        return 0.0, 1.0
    low, high = float(numbers.min()), float(numbers.max())
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _x_labels(axis: Axis, at: Sequence[float], x: _Scale, bottom: float) -> list[str]:
    """As many labels as have room; tokens stand upright."""
    room = (x.end - x.start) / max(len(at) - 1, 1)
    need = (
        _APART if axis.labels else 9 * max((len(axis.label(i)) for i in range(len(at))), default=1)
    )
    step = max(1, math.ceil(need / max(room, 1e-9)))
    out = []
    for i in range(0, len(at), step):
        label = axis.label(i)
        cut = text(label if len(label) <= _LETTERS else label[: _LETTERS - 1] + "…")
        if axis.labels:
            out.append(
                f'<text class="end" transform="rotate(-90)" x="{-(bottom + 6)}" y="{x(at[i]) + 4}">{cut}</text>'
            )
        else:
            out.append(f'<text class="name" x="{x(at[i])}" y="{bottom + 16}">{cut}</text>')
    return out


def _line(
    curve: Curve, line: _Drawn, at: Sequence[float], x: _Scale, y: _Scale, i: int
) -> list[str]:
    """A line, its band, and a dot at each number; where there is no number it is broken."""
    colour = f"l{i % _COLOURS}"
    parts = []
    here = np.isfinite(line.y)
    for run in _runs(here):
        if line.low is not None and line.high is not None:
            upper = [f"{x(at[k])},{y(line.high[k])}" for k in run]
            lower = [f"{x(at[k])},{y(line.low[k])}" for k in reversed(run)]
            parts.append(f'<polygon class="band {colour}" points="{" ".join(upper + lower)}"/>')
        points = " ".join(f"{x(at[k])},{y(line.y[k])}" for k in run)
        parts.append(f'<polyline class="{colour}" points="{points}"/>')
    size = 3.5 if len(at) <= _DOTS else 1.5
    first = True
    for k in np.flatnonzero(here).tolist():
        name = f"{line.name}\n" if len(curve.lines) > 1 and line.name else ""
        tip = f"{name}{curve.x.full(k)}\n{curve.y_name} {line.said(k, signed=curve.signed)}"
        dot = attributes(
            class_=f"dot {colour}",
            cx=str(x(at[k])),
            cy=str(y(line.y[k])),
            r=str(size),
            role="img",
            tabindex=0 if first and i == 0 else -1,
            aria_label=tip.replace("\n", ", "),
            data_tip=tip,
            data_run=_command(curve, k),
        )
        parts.append(f"<circle{dot}/>")
        first = False
    return parts


def _command(curve: Curve, k: int) -> str | None:
    """The command line of a point."""
    value = str(curve.x.values[k])
    return "".join(value if part is Of.COLUMN else str(part) for part in curve.command) or None


def _runs(here: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Stretches of neighbours that have a number."""
    runs: list[list[int]] = []
    for k in np.flatnonzero(here).tolist():
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


def _numbers(curve: Curve, lines: Sequence[_Drawn]) -> str:
    """The numbers as a table, folded."""
    head = "".join(
        element("th", text(t), scope="col")
        for t in (curve.x.name, *(line.name or curve.y_name for line in lines))
    )
    rows = "\n".join(
        f"<tr>{element('th', text(curve.x.full(i)), scope='row')}"
        + "".join(
            element("td", text(line.said(i, signed=curve.signed)), class_="number")
            for line in lines
        )
        + "</tr>"
        for i in range(len(curve.x))
    )
    return (
        '<details><summary>Numbers</summary><div class="scroll"><table class="plain">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div></details>"
    )
