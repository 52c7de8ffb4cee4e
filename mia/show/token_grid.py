"""A picture of tokens: a cell for each row and column, its text the token, its colour a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.show import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: letters of a token; inches of a column, and of the widest picture
_LETTERS = 10
_COLUMN, _WIDEST = 0.85, 60


def token_grid(
    texts: Sequence[Sequence[str]],
    values: npt.ArrayLike,
    *,
    title: str,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    bar: str,
    top: float = 1.0,
) -> Figure:
    """Cells with the text of a token in each, from the last row at the bottom to the first.

    Args:
        texts, values: (n_rows, n_columns); values from 0 to `top` are the colours.
        x_labels: a token for each column; y_labels: a name for each row.
    """
    a = np.asarray(values, np.float64)  # (n_rows, n_columns)
    n_rows, n_columns = a.shape
    width = float(np.clip(_COLUMN * n_columns, 2.5, _WIDEST))
    height = 0.24 * n_rows
    fig = plots.figure(width + 2.2, height + 1.4)
    axes = fig.add_subplot()
    image = axes.imshow(a, cmap="viridis", vmin=0, vmax=top, aspect="auto", origin="lower")
    size = min(8.0, 72 * width / n_columns / _LETTERS / 0.62)
    for i, row in enumerate(texts):
        for k, text in enumerate(row):
            axes.text(
                k,
                i,
                plots.short(text, _LETTERS),
                ha="center",
                va="center",
                fontsize=size,
                color="black" if a[i, k] > 0.6 * top else "white",
            )
    axes.set_xticks(range(n_columns), [plots.short(t) for t in x_labels], fontsize=8, rotation=45)
    axes.set_yticks(range(n_rows), list(y_labels), fontsize=7)
    axes.set_title(plots.wrapped(title, width + 2), fontsize=10, loc="left")
    axes.tick_params(length=0)
    fig.colorbar(image, ax=axes, label=bar, fraction=0.03, pad=0.01)
    return fig
