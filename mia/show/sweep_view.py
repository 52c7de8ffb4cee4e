"""A sweep's document as parts of a page: a curve of one axis, maps of more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mia.arrays import Floats
from mia.show.again import Again
from mia.show.page import Axis, Bar, BarList, Command, Curve, HeatMap, Line, Of, Paragraph, Part
from mia.show.values import Document, array, number_or_none, random_line, texts

#: maps of one result, and bars of a list, at most
_MAPS, _BARS = 24, 20
#: an axis -> the argument of a sweep that chooses along it
_CHOICES = {
    "layer": "layers",
    "token": "token_idx",
    "head": "head_idx",
    "neuron": "neurons",
    "coeff": "coeff",
    "site": "at",
}
#: arguments of long work
_LONG = ("shard", "batch_mem")


def sweep_parts(d: Document, again: Again | None) -> list[Part]:
    axes = [Axis(str(a["name"]), a["values"], _labels(a)) for a in d["axes"]]
    values = array(d["values"])
    unchanged = float(d["unchanged"])
    effect = values - unchanged
    floor = float(d.get("noise_floor") or 0.0)
    low, high = (None if d.get(k) is None else array(d[k]) for k in ("low", "high"))
    if effect.shape != tuple(map(len, axes)):
        raise ValueError(f"values of shape {effect.shape}")
    named = f"change of {d['metric']}"
    parts: list[Part] = [Paragraph(_summary(d, effect, floor))]
    if len(axes) == 1:
        parts.append(
            Curve(
                title=f"{named} by {axes[0].name}",
                x=axes[0],
                lines=[Line(name="", y=effect, low=low, high=high)],
                y_name=_with_unit(named, d),
                floor=floor,
                signed=True,
                command=_cell_command(again, {axes[0].name: Of.COLUMN}),
            )
        )
    else:
        parts += _sweep_maps(d, axes, effect, low, high, floor, again)
    strongest = _strongest(axes, effect, low, high, floor, again)
    return [*parts, BarList(title="The strongest", bars=strongest, unit=_unit(d), floor=floor)]


def _labels(axis: Mapping[str, Any]) -> Sequence[str]:
    labels, values = axis.get("labels") or [], axis["values"]
    return [] if [str(v) for v in values] == list(labels) else [str(x) for x in labels]


def _unit(d: Document) -> str:
    return str(d.get("unit") or "")


def _with_unit(name: str, d: Document) -> str:
    return f"{name} ({_unit(d)})" if _unit(d) else name


def _summary(d: Document, effect: Floats, floor: float) -> str:
    lines = [f"{d['change']} at {d['site']}"]
    answers = [(k, texts(d[k])) for k in ("answer", "against") if d.get(k)]
    lines += [f'{k} "{text}"' for k, text in answers]
    lines.append(f"{d['metric']} unchanged: {number_or_none(d['unchanged'])} {_unit(d)}".rstrip())
    if d.get("source") is not None:
        lines[-1] += (
            f"; of the run that rows come from: {number_or_none(d['source'])} {_unit(d)}".rstrip()
        )
    if d.get("runs", 1) > 1:
        lines.append(
            f"means over {d['runs']} runs, with 95 % intervals; the texts are the first one's"
        )
    if d.get("null"):
        below, known = int((np.abs(effect) <= floor).sum()), int(np.isfinite(effect).sum())
        changes = "1 change" if d["null"] == 1 else f"{d['null']} changes"
        lines.append(
            f"noise floor {floor:.2g} {_unit(d)} ({changes} by 1e-5); "
            f"{below} of {known} cells lie within it"
        )
    if d.get("random"):
        lines.append(random_line(d["random"], f" {_unit(d)}".rstrip()))
    return "\n".join(lines)


def _sweep_maps(
    d: Document,
    axes: Sequence[Axis],
    effect: Floats,
    low: Floats | None,
    high: Floats | None,
    floor: float,
    again: Again | None,
) -> list[Part]:
    """A map of the last two axes for each value of those before."""
    *outer, rows, columns = axes
    maps: list[Part] = []
    top = float(np.nanmax(np.abs(effect), initial=0.0))
    for cell in list(np.ndindex(*(len(a) for a in outer)))[:_MAPS]:
        where = ", ".join(a.full(i) for a, i in zip(outer, cell, strict=True))
        fixed = {a.name: a.values[i] for a, i in zip(outer, cell, strict=True)}
        maps.append(
            HeatMap(
                title=f"change of {d['metric']}" + (f", {where}" if where else ""),
                values=effect[cell],
                rows=rows,
                columns=columns,
                unit=_unit(d),
                low=None if low is None else low[cell],
                high=None if high is None else high[cell],
                floor=floor,
                top=top,
                command=_cell_command(again, {**fixed, rows.name: Of.ROW, columns.name: Of.COLUMN}),
            )
        )
    n = math.prod(len(a) for a in outer)
    return [*maps, *([Paragraph(f"{_MAPS} of {n} maps are shown.")] if n > _MAPS else [])]


def _cell_command(again: Again | None, values: Mapping[str, Any]) -> Command:
    """The sweep's command line for one cell; none if nothing chooses along an axis."""
    if again is None or any(name not in _CHOICES for name in values):
        return ()
    return again.cell({_CHOICES[name]: v for name, v in values.items()}, without=_LONG)


def _strongest(
    axes: Sequence[Axis],
    effect: Floats,
    low: Floats | None,
    high: Floats | None,
    floor: float,
    again: Again | None,
) -> list[Bar]:
    finite = np.where(np.isfinite(effect), np.abs(effect), -1.0)
    order = np.argsort(-finite, axis=None, kind="stable")[:_BARS]
    bars = []
    for i in order:
        cell = tuple(int(k) for k in np.unravel_index(int(i), effect.shape))
        if not np.isfinite(effect[cell]):
            continue
        values = {a.name: a.values[k] for a, k in zip(axes, cell, strict=True)}
        bars.append(
            Bar(
                label=", ".join(a.full(k) for a, k in zip(axes, cell, strict=True)),
                value=float(effect[cell]),
                low=None if low is None else float(low[cell]),
                high=None if high is None else float(high[cell]),
                command="".join(str(part) for part in _cell_command(again, values)),
            )
        )
    return bars
