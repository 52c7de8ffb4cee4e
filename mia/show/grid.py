"""Coloured cells for a terminal: a value for each layer and head, and maps of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.text import Text

from mia.show.plots import INFERNO
from mia.show.text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

Array = npt.NDArray[np.floating[Any]]
#: red above 0, blue below it
_ABOVE, _BELOW, _ZERO = (220, 50, 47), (38, 110, 210), 40
#: columns of a number, and of a cell where the numbers do not fit
_NUMBER, _BARE = 6, 2
#: columns that name a query of a map
_QUERY = 16


def grid(
    a: Array,
    title: str,
    width: int,
    *,
    diverging: bool = False,
    names: Sequence[int | str] | None = None,
    down: str = "layers",
    across: str = "heads",
    columns: Sequence[int | str] | None = None,
) -> RenderableType:
    """An array (n_layer, n_head) as coloured cells, with their numbers where these fit.

    Args:
        width: columns of the terminal.
        diverging: red above 0, blue below it; else inferno from 0 to the largest.
        names, columns: the layer of each row, and the head of each column, from 0 by default.
        down, across: what the rows and the columns are.
    """
    from rich.console import Group

    top = float(np.nanmax(np.abs(a))) if np.isfinite(a).any() else 1.0
    labels = [str(n) for n in (range(len(a)) if names is None else names)]
    margin = max(4, *(len(label) for label in labels))
    cell = _NUMBER if _NUMBER * a.shape[1] + margin + 2 <= width else _BARE
    heads = [str(h) for h in (range(a.shape[1]) if columns is None else columns)]
    lines = [
        Text(f"{title} ({down} down, {across} across)", style="bold"),
        Text(" " * (margin + 1) + "".join(f"{h[:cell]:>{cell}s}" for h in heads), style="dim"),
    ]
    for label, row in zip(labels, a, strict=True):
        line = Text().append(f"{label:>{margin}s} ", style="dim")
        for x in row:
            text = f"{x:{cell}.2f}" if cell > _BARE else " " * cell
            if np.isfinite(x):
                style = _diverging if diverging else _sequential
                line.append(text, style=style(float(x), top or 1.0))
            else:
                line.append(" " * cell)
        lines.append(line)
    return Group(*lines)


def cells_fit(n_columns: int, width: int) -> bool:
    """Whether a `grid` of so many columns fits into a terminal."""
    return _BARE * n_columns + 5 <= width


def words(
    texts: Sequence[Sequence[str]],
    shares: Array,
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
) -> RenderableType:
    """Cells (n_rows, n_columns) with a word in each, coloured by a share from 0 to 1. The names of
    columns are cut to fit."""
    from rich.console import Group

    cell = max(len(text) for row in texts for text in row) + 1
    name = max(map(len, rows)) + 1
    lines = [
        Text(title, style="bold"),
        Text(" " * name + "".join(f"{c[: cell - 1]:>{cell}s}" for c in columns), style="dim"),
    ]
    for label, row, values in zip(rows, texts, shares, strict=True):
        line = Text().append(f"{label:>{name - 1}s} ", style="dim")
        for text, share in zip(row, values, strict=True):
            line.append(f"{text:>{cell}s}", style=_sequential(float(share), 1.0))
        lines.append(line)
    return Group(*lines)


def _diverging(x: float, top: float) -> str:
    colour = _ABOVE if x > 0 else _BELOW
    r, g, b = (round(_ZERO + (c - _ZERO) * abs(x) / top) for c in colour)
    return f"rgb(255,255,255) on rgb({r},{g},{b})"


def _sequential(x: float, top: float) -> str:
    ink = 0 if abs(x) / top > 0.6 else 255
    return f"rgb({ink},{ink},{ink}) {inferno(abs(x) / top)}"


def map_fits(n_tokens: int, width: int) -> bool:
    """Whether a map of this many tokens fits into this many columns."""
    return 2 * n_tokens + _QUERY <= width


def attention_map(a: Array, pieces: Sequence[str]) -> Text:
    """A map (n_query, n_key) as coloured cells of two columns each; queries down, by name."""
    text = Text()
    top = float(a.max()) or 1.0
    for q, piece in enumerate(pieces):
        text.append(f"{visible(piece)[:11]:>11s} {q:3d} ", style="dim")
        for k in range(len(pieces)):
            text.append("  ", style=inferno(a[q, k] / top) if k <= q else "")
        text.append("\n")
    numbers = "".join(f"{k:<4d}" for k in range(0, len(pieces), 2))
    return text.append(" " * _QUERY + numbers, style="dim")


def inferno(share: float) -> str:
    """A rich style: the background colour of a share from 0 to 1."""
    x = min(max(float(share), 0.0), 1.0) * (len(INFERNO) - 1)
    i = min(int(x), len(INFERNO) - 2)
    r, g, b = (
        round(u + (x - i) * (v - u)) for u, v in zip(INFERNO[i], INFERNO[i + 1], strict=True)
    )
    return f"on rgb({r},{g},{b})"
