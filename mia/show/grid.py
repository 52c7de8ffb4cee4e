"""Coloured cells for a terminal: a value for each layer and head, tokens, and maps of attention.

Where there is no colour (NO_COLOR, a terminal without), cells that would be bare have a digit:
tenths of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.text import Text

from mia.show.plots import INFERNO
from mia.show.text import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

Array = npt.NDArray[np.floating[Any]]
#: red above 0, blue below it
_ABOVE, _BELOW, _ZERO = (220, 50, 47), (38, 110, 210), 40
#: columns of a number, and of a cell where the numbers do not fit
_NUMBER, _BARE = 6, 2
#: columns that name a query of a map
_QUERY = 16
#: columns of a token at least and at most
_TOKEN, _LONG_TOKEN = 10, 14


@dataclass(frozen=True)
class Cells:
    """Cells that are drawn with colours where there are any; `draw` is told."""

    draw: Callable[[bool], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.draw(not console.no_color and console.color_system is not None)


def _note(top: str) -> Text:
    return Text(f"digits: tenths of {top}, # for ten", style="dim")


def digit(share: float, *, signed: bool = False) -> str:
    """A share as two characters: " 7" for 0.7, "#" for 1, "." for almost 0, "+7" where signed."""
    n = min(round(abs(share) * 10), 10)
    if n == 0:
        return " ."
    return f"{('+' if share > 0 else '-') if signed else ' '}{'#' if n == 10 else n}"


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

    top = (float(np.nanmax(np.abs(a))) if np.isfinite(a).any() else 1.0) or 1.0
    labels = [str(n) for n in (range(len(a)) if names is None else names)]
    margin = max(4, *(len(label) for label in labels))
    cell = _NUMBER if _NUMBER * a.shape[1] + margin + 2 <= width else _BARE
    heads = [str(h) for h in (range(a.shape[1]) if columns is None else columns)]
    colour = diverging_style if diverging else _sequential

    def draw(coloured: bool) -> RenderableType:
        bare = cell == _BARE and not coloured
        lines = [
            Text(f"{title} ({down} down, {across} across)", style="bold"),
            Text(" " * (margin + 1) + "".join(f"{h[:cell]:>{cell}s}" for h in heads), style="dim"),
        ]
        for label, row in zip(labels, a, strict=True):
            line = Text().append(f"{label:>{margin}s} ", style="dim")
            for x in row.tolist():
                if not np.isfinite(x):
                    line.append(" " * cell)
                    continue
                empty = digit(x / top, signed=diverging) if bare else " " * cell
                text = f"{x:{cell}.2f}" if cell > _BARE else empty
                line.append(text, style=colour(x, top) if coloured else "")
            lines.append(line)
        return Group(*lines, *([_note(f"{top:.3g}")] if bare else []))

    return Cells(draw)


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


def diverging_style(x: float, top: float) -> str:
    colour = _ABOVE if x > 0 else _BELOW
    r, g, b = (round(_ZERO + (c - _ZERO) * abs(x) / top) for c in colour)
    return f"rgb(255,255,255) on rgb({r},{g},{b})"


def _sequential(x: float, top: float) -> str:
    if not np.isfinite(x):
        return ""
    ink = 0 if abs(x) / top > 0.6 else 255
    return f"rgb({ink},{ink},{ink}) {inferno(abs(x) / top)}"


def map_fits(n_tokens: int, width: int) -> bool:
    """Whether a map of this many tokens fits into this many columns."""
    return 2 * n_tokens + _QUERY <= width


def attention_map(a: Array, pieces: Sequence[str]) -> RenderableType:
    """A map (n_query, n_key) as coloured cells of two columns each; queries down, by name."""
    from rich.console import Group

    top = float(a.max()) or 1.0
    numbers = "".join(f"{k:<4d}" for k in range(0, len(pieces), 2))

    def draw(coloured: bool) -> RenderableType:
        text = Text()
        for q, piece in enumerate(pieces):
            text.append(f"{visible(piece)[:11]:>11s} {q:3d} ", style="dim")
            for k in range(len(pieces)):
                share = float(a[q, k]) / top
                bare = "  " if coloured or k > q else digit(share)
                text.append(bare, style=inferno(share) if coloured and k <= q else "")
            text.append("\n")
        text.append(" " * _QUERY + numbers, style="dim")
        return text if coloured else Group(text, _note(f"{top:.3g}"))

    return Cells(draw)


def token_cells(
    texts: Sequence[Sequence[str]],
    shares: Array,
    width: int,
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
) -> RenderableType:
    """Cells (n_rows, n_columns) with a token in each, coloured by a share from 0 to 1; the last row
    stands on top. What is wider than the terminal goes on below. Without colour a digit follows
    each token."""
    from rich.cells import cell_len, set_cell_size
    from rich.console import Group

    margin = max(map(len, rows)) + 1
    room = max(width - margin, _TOKEN)
    longest = max(cell_len(text) for line in (*texts, columns) for text in line) + 3
    cell = min(int(np.clip(room // len(columns), _TOKEN, _LONG_TOKEN)), longest)
    n_lines = -(-len(columns) // max(room // cell, 1))
    per_line = -(-len(columns) // n_lines)

    def draw(coloured: bool) -> RenderableType:
        letters = cell - 1 if coloured else cell - 3
        lines = [Text(title, style="bold")]
        for start in range(0, len(columns), per_line):
            chosen = range(start, min(start + per_line, len(columns)))
            head = "".join(set_cell_size(columns[k], cell - 1) + " " for k in chosen)
            lines.append(Text(" " * margin + head, style="dim"))
            for i in reversed(range(len(rows))):
                line = Text().append(f"{rows[i]:>{margin - 1}s} ", style="dim")
                for k in chosen:
                    share, token = float(shares[i, k]), set_cell_size(texts[i][k], letters)
                    if coloured:
                        line.append(f"{token} ", style=_sequential(share, 1.0))
                    else:
                        line.append(f"{token}{digit(share)} ")
                lines.append(line)
        return Group(*lines, *([] if coloured else [_note("that number")]))

    return Cells(draw)


def inferno(share: float) -> str:
    """A rich style: the background colour of a share from 0 to 1."""
    x = min(max(float(share), 0.0), 1.0) * (len(INFERNO) - 1)
    i = min(int(x), len(INFERNO) - 2)
    r, g, b = (
        round(u + (x - i) * (v - u)) for u, v in zip(INFERNO[i], INFERNO[i + 1], strict=True)
    )
    return f"on rgb({r},{g},{b})"
