"""A picture of effects along one axis: the line, its interval, and the noise floor around 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.errors import UsageError
from mia.show import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: inches of a point with a label, of a plain one, and of the narrowest and widest picture
_LABEL, _POINT, _NARROW, _WIDE = 0.24, 0.15, 4.5, 24.0
#: more points than this have no marks
_MARKS = 150


def effect_curve(
    effect: npt.ArrayLike,
    *,
    x: Sequence[float] | None = None,
    labels: Sequence[str] = (),
    interval: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    floor: float = 0.0,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Figure:
    """A line through n effects; where there is none (NaN) it is broken.

    Args:
        effect: (n,).
        x: (n,) where they lie, or evenly, under their labels.
        labels: (n,) texts, as the tokens of a prompt.
        interval: (low, high), each (n,), drawn as a band.
        floor: half of the width of a grey band around 0; 0 or NaN for none.

    Raises `UsageError` for shapes that do not fit.
    """
    from matplotlib.ticker import MaxNLocator

    y = np.asarray(effect, np.float64)
    at = np.arange(len(y), dtype=np.float64) if x is None else np.asarray(x, np.float64)
    band = [] if interval is None else [np.asarray(b, np.float64) for b in interval]
    if y.ndim != 1 or not y.size or any(a.shape != y.shape for a in (at, *band)):
        raise UsageError(f"a curve of shape {y.shape} over x of shape {at.shape}")
    if labels and len(labels) != len(y):
        raise UsageError(f"got {len(labels)} labels for {len(y)} points")
    width = float(np.clip(len(y) * (_LABEL if labels else _POINT) + 1.2, _NARROW, _WIDE))
    fig = plots.figure(width, 4.2 if labels else 3.6)
    axes = fig.add_subplot()
    if floor > 0:
        axes.axhspan(-floor, floor, color="0.85", label=f"noise floor, ±{floor:.2g}", zorder=0)
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    if band:
        axes.fill_between(
            at, band[0], band[1], color="C0", alpha=0.25, linewidth=0, label="95 % interval"
        )
    marks = {"marker": "o", "markersize": 4} if len(y) <= _MARKS else {}
    axes.plot(at, y, color="C0", linewidth=1.4, **marks)  # type: ignore[arg-type]
    if labels:
        # a dollar sign would begin a formula
        shown = [plots.short(text).replace("$", r"\$") for text in labels]
        axes.set_xticks(at, shown, fontsize=8, rotation=90)
    elif np.array_equal(at, np.round(at)):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.015)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set(xlabel=x_label, ylabel=plots.wrapped(y_label, 4))
    axes.set_title(plots.wrapped(title, width), fontsize=10, loc="left")
    if floor > 0 or band:
        fig.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return fig
