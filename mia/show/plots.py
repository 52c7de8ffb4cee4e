"""Pictures, by matplotlib (extra `plots`): heatmaps, attention grids, curves with intervals.

Every function returns a `matplotlib.figure.Figure` that no window knows of; `save` writes it
as .png, .svg or .pdf. Nothing here changes matplotlib's global state.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.arrays import Array
from mia.errors import FileError, UsageError
from mia.io.files import check_writable, write_bytes
from mia.show.text import safe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
#: ten colours of inferno from least to most (van der Walt & Smith 2015), for pages and terminals
INFERNO = (
    (0, 0, 4),
    (27, 12, 65),
    (74, 12, 107),
    (120, 28, 109),
    (165, 44, 96),
    (207, 68, 70),
    (237, 105, 37),
    (251, 155, 6),
    (247, 209, 61),
    (252, 255, 164),
)
#: maps that are drawn large, with axes of their own; more become one grid
_LARGE = 12
_DPI = 150
#: more lines than this have no bands: they would hide each other
_BANDS = 6
#: how the first ten lines are drawn, the next ten, …: there are ten colours
_DASHES = ("solid", "dashed", "dotted", "dashdot", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
#: where the colours of a clipped heatmap end, in percent of |value|, and how many cells it frames
_CLIP, _FRAMED = 99, 10
_GAP = 0.08  # of a tile, between tiles


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches. Raises `UsageError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise UsageError("pictures need matplotlib: pip install 'mia[plots]'") from err
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(path: str | Path, more: Sequence[str] = ()) -> Path:
    """Sees before any work that a picture can be written. Raises `FileError` or `UsageError`."""
    path = Path(path)
    known = (*FORMATS, *more)
    if path.suffix.lower() not in known:
        raise FileError(f"cannot draw {path}: its name must end in {', '.join(known)}")
    if path.suffix.lower() in FORMATS:
        figure(1, 1)
    return check_writable(path)


def save(fig: Figure, path: str | Path, *, dpi: int = _DPI) -> None:
    """Writes .png, .svg or .pdf, whole or not at all. Raises `FileError`."""
    import matplotlib as mpl
    from matplotlib.text import Text

    kind = check_picture(path).suffix.lower().removeprefix(".")
    # text stays text, and the same picture gives the same file
    fixed = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    for text in fig.findobj(Text):  # control characters are no XML
        assert isinstance(text, Text)
        if text.get_text() != (shown := safe(text.get_text(), "\n")):
            text.set_text(shown)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mia"}):
        # drawn first: what draws would say of a full disk no more than that it could not
        drawn = io.BytesIO()
        fig.savefig(drawn, format=kind, dpi=dpi, metadata=fixed)
    write_bytes(path, drawn.getbuffer())


def heatmap(
    array: npt.ArrayLike,
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    bar: str = "",
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    diverging: bool = False,
    clipped: bool = False,
) -> Figure:
    """One array (n_rows, n_columns) as coloured cells, row 0 on top.

    Args:
        x: what the columns are.
        y: what the rows are.
        bar: what the colours are.
        x_labels: of each column, its number by default; as many are written as fit.
        y_labels: the same of each row.
        diverging: red above 0, blue below it, white at 0; else inferno from least to most.
        clipped: of the diverging colours: they end at the 99th percentile of |value|, so that
            one large value leaves the others visible. The largest beyond is written at the bar,
            and the values farthest from 0, ten at most, are framed.
    """
    a = np.asarray(array, np.float64)
    if a.ndim != 2 or not a.size:
        raise UsageError(f"a heatmap is of two axes with something in them, not of shape {a.shape}")
    rows, columns = a.shape
    cell = float(np.clip(9 / max(rows, columns), 0.12, 0.45))
    width, height = cell * columns + 2.2, cell * rows + 1.2
    fig = figure(max(width, 3.6), max(height, 2.4))
    axes = fig.add_subplot()
    finite = a[np.isfinite(a)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if diverging:
        high = max(abs(low), abs(high), 1e-12)
        if clipped:
            # "lower" leaves the largest out of a small model's few heads too
            high = float(np.percentile(np.abs(finite), _CLIP, method="lower")) or high
        low = -high
    image = axes.imshow(
        a,
        cmap="RdBu_r" if diverging else "inferno",
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_facecolor("0.85")  # where there is no number
    _ticks(axes, "x", columns, x_labels, cell * columns)
    _ticks(axes, "y", rows, y_labels, cell * rows)
    axes.set(xlabel=x, ylabel=y)
    _title(fig, axes, title)
    above, below = bool((finite > high).any()), bool((finite < low).any())
    extend = {(1, 0): "max", (0, 1): "min", (1, 1): "both"}.get((above, below), "neither")
    if clipped:
        notes = [f"framed: the {_frame(axes, a)} strongest"]
        for name, there, find in (("max", above, np.nanargmax), ("min", below, np.nanargmin)):
            if there:
                i, k = divmod(int(find(a)), columns)
                where = f"{y_labels[i] if y_labels else i}.{x_labels[k] if x_labels else k}"
                notes.append(f"{name} {a[i, k]:.2g} at {where}")
        bar = f"{bar}\n{wrapped('; '.join(notes), cell * rows)}"
    fig.colorbar(image, ax=axes, label=bar, extend=extend)
    return fig


def _frame(axes: Axes, a: npt.NDArray[np.float64]) -> int:
    """Frames the cells farthest from 0, at most every tenth; how many."""
    from matplotlib.patches import Rectangle

    strength = np.nan_to_num(np.abs(a))
    n = min(_FRAMED, -(-a.size // 10), int(np.count_nonzero(strength)))
    for cell in np.argsort(-strength, axis=None, kind="stable")[:n]:
        row, column = divmod(int(cell), a.shape[1])
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, linewidth=1.4, clip_on=False))
    return n


def attention_grid(
    weights: Array,
    *,
    layers: Sequence[int],
    heads: Sequence[int],
    pieces: Sequence[str],
    title: str = "",
    bar: str = "attention weight",
) -> Figure:
    """Attention maps (n_layer, n_head, n_query, n_key): layers down, heads across.

    Up to a dozen maps get axes of their own with tokens on the ticks; more become the tiles of
    one picture. The largest weight of a map that is smaller on paper than its tokens are many
    is kept, so that thin lines stay visible.
    """
    if weights.ndim != 4 or weights.shape[:2] != (len(layers), len(heads)) or not weights.size:
        raise UsageError(
            f"maps of shape {weights.shape} are not of {len(layers)} layers and {len(heads)} heads"
        )
    names = [[f"layer {i} · head {h}" for h in heads] for i in layers]
    if len(layers) * len(heads) > _LARGE:
        return _tiles(weights, layers=layers, heads=heads, title=title, bar=bar)
    n = len(layers) * len(heads)
    return large_maps(
        weights.reshape(n, *weights.shape[2:]),
        names=[name for row in names for name in row],
        pieces=pieces,
        columns=len(heads),
        title=title,
        bar=bar,
    )


def large_maps(
    maps: Array,
    *,
    names: Sequence[str],
    pieces: Sequence[str],
    columns: int | None = None,
    title: str = "",
    bar: str = "attention weight",
) -> Figure:
    """Some maps (n, n_query, n_key), each with its own axes and tokens on the ticks."""
    n, n_query, n_key = maps.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    side = float(np.clip(0.16 * n_query + 1.2, 2.4, 9.0 if n == 1 else 5.0))
    fig = figure(columns * side + 1.2, rows * side + (0.5 if title else 0.1))
    top = float(maps.max()) or 1.0
    image: Any = None
    grid = fig.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[n:]:
        axes.set_axis_off()
    labels = [short(p) for p in pieces]
    for axes, a, name in zip(grid.flat, maps, names, strict=False):
        image = axes.imshow(a, cmap="inferno", vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        _ticks(axes, "x", n_key, labels, side - 1.0, size=7)
        _ticks(axes, "y", n_query, labels, side - 1.0, size=7)
    for axes in grid[-1]:
        axes.set_xlabel("key", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("query", fontsize=8)
    if title:
        fig.suptitle(wrapped(title, columns * side + 1.2), fontsize=10)
    fig.colorbar(image, ax=grid, label=bar, shrink=min(1.0, 5 / (rows * side)), aspect=30)
    return fig


def _tiles(
    weights: Array, *, layers: Sequence[int], heads: Sequence[int], title: str, bar: str
) -> Figure:
    """All maps as one image: 80 layers × 64 heads are 5,120 of them, too many for axes each."""
    n_layer, n_head = weights.shape[:2]
    inches = float(np.clip(22 / max(n_layer, n_head), 0.36, 0.9))  # of one map on paper
    tile = _pooled(weights, round(inches * _DPI / (1 + _GAP)))  # (n_layer, n_head, side, side)
    side = tile.shape[-1]
    gap = max(1, round(_GAP * side))
    pitch = side + gap
    canvas = np.full((n_layer * pitch - gap, n_head * pitch - gap), np.nan, np.float32)
    for i in range(n_layer):
        for h in range(n_head):
            canvas[i * pitch : i * pitch + side, h * pitch : h * pitch + side] = tile[i, h]
    fig = figure(n_head * inches + 2.0, n_layer * inches + 1.2)
    axes = fig.add_subplot()
    image = axes.imshow(canvas, cmap="inferno", vmin=0, interpolation="antialiased")
    axes.set_facecolor("0.75")
    for spine in axes.spines.values():
        spine.set_visible(False)
    centre = (side - 1) / 2
    for axis, numbers in (("x", heads), ("y", layers)):
        step = _step(len(numbers), inches * len(numbers), 0.3)
        at = range(0, len(numbers), step)
        ticks = [i * pitch + centre for i in at]
        getattr(axes, f"set_{axis}ticks")(ticks, [str(numbers[i]) for i in at], fontsize=8)
    axes.set(xlabel="head", ylabel="layer")
    axes.tick_params(length=0)
    _title(fig, axes, title)
    height = n_layer * inches
    fig.colorbar(
        image, ax=axes, label=bar, shrink=min(1.0, 6 / height), anchor=(0.0, 1.0), aspect=30
    )
    return fig


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a `Panel`.

    Attributes:
        name: lines of the same name have the same colour, in all panels.
        y: (n,), or one number: a thin line across the panel.
        x: (n,), of this line's own.
        band: (low, high), each (n,).
        kind: what this line of its name is; the lines of a kind have the same dashes.
        dashes: of the kind; by default solid up to ten names.
    """

    name: str
    y: npt.ArrayLike
    x: npt.ArrayLike = ()
    band: tuple[npt.ArrayLike, npt.ArrayLike] | None = None
    kind: str = ""
    dashes: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes with lines. `share`: y goes from 0 to 1; `log`: by powers of ten; `bars`: bars instead."""

    lines: Sequence[Line]
    y_label: str = ""
    share: bool = False
    log: bool = False
    bars: bool = False


def curves(
    x: npt.ArrayLike,
    lines: Mapping[str, npt.ArrayLike],
    *,
    intervals: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]] | None = None,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Figure:
    """Lines over x, each (n,), with intervals (low, high) as bands where given."""
    bands = intervals or {}
    drawn = [Line(name=n, x=x, y=y, band=bands.get(n)) for n, y in lines.items()]
    return panels([Panel(lines=drawn, y_label=y_label)], title=title, x_label=x_label)


def trade_off(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    front: tuple[Sequence[float], Sequence[float]],
    limit: float,
    marked: tuple[float, float, str] | None = None,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Figure:
    """What is gained (y) against what it costs (x): points of several groups, and their front.

    Points of more than twice the limit lie beyond the picture, and so do those that are far worse than
    where the front begins.

    Args:
        points: (x, y) of each group by its name.
        front: the ends of its steps; the area below it is shaded.
        limit: the most that it may cost.
        marked: (x, y, name) of one point.
    """
    fig = figure(6.4, 4.4)
    axes = fig.add_subplot()
    xs, ys = (np.asarray(a, np.float64) for a in front)
    axes.fill_between(xs, ys[0], ys, step="post", color="0.5", alpha=0.12, linewidth=0)
    axes.step(xs, ys, where="post", color="0.2", linewidth=1.2, label="front", zorder=2)
    markers = "os^Dv<>Ph*"
    for i, (name, (x, y)) in enumerate(points.items()):
        look: dict[str, Any] = {"marker": markers[i % len(markers)], "color": f"C{i % 10}"}
        axes.scatter(x, y, s=14, alpha=0.75, linewidths=0, label=_entry(name), zorder=3, **look)
    axes.axvline(limit, color="C3", linewidth=1, linestyle="dashed", label="KL budget")
    shown = [b for x, y in points.values() for a, b in zip(x, y, strict=True) if a <= 2 * limit]
    low, high = min([*shown, *ys]), max([*shown, *ys])
    if (height := float(np.ptp(ys))) > 0:
        low, high = max(low, min(ys) - 0.7 * height), min(high, max(ys) + 0.7 * height)
    room = 0.09 * (high - low) or 1.0
    axes.set_xlim(-0.03 * limit, 2 * limit)
    axes.set_ylim(low - room, high + room)
    if marked is not None:
        at_x, at_y, name = marked
        axes.scatter(
            [at_x], [at_y], s=80, facecolors="none", edgecolors="k", linewidths=1.2, zorder=4
        )
        axes.annotate(
            safe(name).replace("$", r"\$"),
            (at_x, at_y),
            xytext=(0, 9),
            ha="left" if at_x < limit / 2 else "right",
            textcoords="offset points",
            fontsize=8,
            zorder=5,
        )
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set(xlabel=x_label, ylabel=y_label)
    _title(fig, axes, title)
    fig.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return fig


def panels(shown: Sequence[Panel], *, title: str = "", x_label: str = "") -> Figure:
    """Panels below each other over the same x, with one legend below them all.

    Bands are left out where a panel has more than six lines.
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(line.name for panel in shown for line in panel.lines))
    looks = {name: (f"C{i % 10}", _DASHES[i // 10 % len(_DASHES)]) for i, name in enumerate(names)}
    width, height = (6.4, 4.0) if len(names) <= 10 else (8.0, 4.8)
    fig = figure(width, height if len(shown) == 1 else 0.75 * height * len(shown))
    grid = fig.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, shown, strict=True):
        _lines(axes, panel, looks)
        axes.set_ylabel(panel.y_label)
        if panel.share:
            axes.set_ylim(0, 1)
        if panel.log and any((np.asarray(line.y, np.float64) > 0).any() for line in panel.lines):
            axes.set_yscale("log")  # of zeros alone there is no logarithm
        axes.margins(x=0.015)  # no tick for a layer after the last
        axes.grid(alpha=0.3, linewidth=0.5)
    at = np.concatenate([np.ravel(line.x) for panel in shown for line in panel.lines])
    if np.array_equal(at, np.round(at)):  # layers, steps
        grid[-1].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    if len(set(at)) == 1:
        grid[-1].set_xlim(at[0] - 1, at[0] + 1)
    grid[-1].set_xlabel(x_label)
    _title(fig, grid[0], title)
    _legend(fig, [line for panel in shown for line in panel.lines], looks)
    return fig


def _lines(axes: Axes, panel: Panel, looks: Mapping[str, tuple[str, Any]]) -> None:
    banded = sum(np.ndim(line.y) > 0 for line in panel.lines) <= _BANDS
    # a share of 0 or 1 lies on the frame, which would cut the line
    style: dict[str, Any] = {"clip_on": not panel.share, "zorder": 3}
    markers: dict[str, Any] = {"marker": "o", "markersize": 3} if len(looks) <= 10 else {}
    for line in panel.lines:
        colour, dashes = looks[line.name]
        style |= {"color": colour, "linestyle": line.dashes or dashes}
        y = np.asarray(line.y, np.float64)
        if not y.ndim:
            axes.axhline(float(y), linewidth=0.8, **style)
            continue
        x = np.asarray(line.x, np.float64)
        if y.shape != x.shape:
            raise UsageError(f"line {line.name!r} has shape {y.shape}, x has {x.shape}")
        if panel.bars:
            axes.bar(x, y, color=colour, zorder=3)
            continue
        axes.plot(x, y, linewidth=1.2, **style, **markers)
        if line.band is not None and banded:
            low, high = (np.asarray(b, np.float64) for b in line.band)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _legend(fig: Figure, lines: Sequence[Line], looks: Mapping[str, tuple[str, Any]]) -> None:
    """The names by their colours, the kinds by their dashes. The figure grows by its height."""
    from matplotlib.lines import Line2D

    def entry(text: str, colour: str, dashes: Any) -> tuple[str, Line2D]:
        return _entry(text), Line2D([], [], color=colour, linestyle=dashes, linewidth=1.2)

    names = [entry(name, *look) for name, look in looks.items()] if len(looks) > 1 else []
    dashes = {line.kind: line.dashes or "solid" for line in lines if line.kind}
    # a kind comes in the colour of every name: it is shown in it where there is one name only
    colour = "0.3" if names else "C0"
    kinds = [entry(kind, colour, d) for kind, d in dashes.items()] if len(dashes) > 1 else []
    if not names and not kinds:
        return
    width, height = fig.get_size_inches()
    size = 8 / 72  # inches
    longest = max(len(text) for text, _ in [*names, *kinds])
    most = max(int((width - 0.2) / (size * (0.6 * longest + 4.5))), 1)
    rows = -(-len(names) // most)  # of names; the kinds begin a row of their own
    columns = max(-(-len(names) // max(rows, 1)), min(most, len(kinds)))
    kind_rows = -(-len(kinds) // columns)
    cells = []
    for c in range(columns):
        column = names[c * rows : (c + 1) * rows]
        column += [entry(" ", "none", "solid")] * (rows - len(column)) + kinds[c::columns]
        cells += column + [entry(" ", "none", "solid")] * (rows + kind_rows - len(column))
    fig.set_size_inches(width, height + 1.6 * size * (rows + kind_rows))
    fig.legend(
        [handle for _, handle in cells],
        [text for text, _ in cells],
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
        handlelength=2.8,
        columnspacing=1.2,
    )


def _entry(text: str, most: int = 60) -> str:
    """A legend's text. One that begins with an underscore would be left out."""
    text = safe(text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


# -- labels that do not overlap ----------------------------------------------------------


def _title(fig: Figure, axes: Axes, title: str) -> None:
    if title:
        shown = wrapped(title, fig.get_size_inches()[0])
        axes.set_title(shown, fontsize=10, loc="left")


def wrapped(title: str, inches: float) -> str:
    """As many lines as it takes; a dollar sign would begin a formula."""
    shown = textwrap.fill(safe(title, "\n"), max(int(10 * inches), 20))
    return shown.replace("$", r"\$")


def _ticks(
    axes: Axes, axis: str, n: int, labels: Sequence[str] | None, inches: float, size: float = 8
) -> None:
    """As many labels as fit on an axis of this many inches: every one, or each second, fifth, …"""
    texts = [str(i) for i in range(n)] if labels is None else [safe(x) for x in labels]
    if len(texts) != n:
        raise UsageError(f"got {len(texts)} labels for {n} cells")
    upright = axis == "x" and max(map(len, texts)) > 3
    need = (
        size / 72 * 1.25
        if upright or axis == "y"
        else size / 72 * 0.75 * (1 + max(map(len, texts)))
    )
    at = range(0, n, _step(n, inches, need))
    # a dollar sign would begin a formula
    shown = [texts[i].replace("$", r"\$") for i in at]
    getattr(axes, f"set_{axis}ticks")(list(at), shown, fontsize=size, rotation=90 if upright else 0)


def _step(n: int, inches: float, need: float) -> int:
    """The least of 1, 2, 5, 10, … so that every n-th label has `need` inches."""
    room = inches / max(n, 1)
    for scale in (1, 10, 100, 1000):
        for step in (1, 2, 5):
            if step * scale * room >= need:
                return step * scale
    return max(n, 1)


def short(piece: str, most: int = 12) -> str:
    """A token for a tick: spaces and line ends shown, long ones cut, what fonts lack replaced."""
    table = {"\n": "\\n", "\r": "\\r", "\t": "\\t", " ": "·"}
    text = "".join(table.get(c, c if c.isprintable() and ord(c) < 0x2000 else "�") for c in piece)
    return text if len(text) <= most else text[: most - 1] + "…"


def _pooled(maps: Array, side: int) -> Array:
    """The last two axes brought to at most `side` cells each, by the maximum."""
    n = maps.shape[-1]
    if n <= side:
        return maps
    starts = np.linspace(0, n, side, endpoint=False).astype(np.intp)
    return np.maximum.reduceat(np.maximum.reduceat(maps, starts, axis=-2), starts, axis=-1)
