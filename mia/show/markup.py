"""Pieces of HTML: escaped text, numbers, and the colours of cells in light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from mia.arrays import Floats
from mia.show.plots import INFERNO
from mia.show.text import safe

Colour = tuple[int, int, int]
#: colours on each side of 0, and of a scale that begins at 0
LEVELS = 20
#: from 0 outwards: above it red, below it blue; and from 0 to the largest
_SCALES: dict[str, dict[str, Sequence[Colour]]] = {
    "light": {
        "p": ((247, 247, 247), (253, 219, 199), (244, 165, 130), (214, 96, 77), (158, 20, 40)),
        "n": ((247, 247, 247), (209, 229, 240), (146, 197, 222), (67, 147, 195), (28, 88, 155)),
        "s": ((250, 250, 245), (199, 233, 180), (65, 182, 196), (34, 94, 168), (8, 29, 88)),
    },
    "dark": {
        "p": ((34, 34, 36), (95, 30, 32), (165, 42, 42), (225, 75, 60), (255, 150, 120)),
        "n": ((34, 34, 36), (25, 50, 95), (30, 85, 160), (60, 130, 220), (140, 190, 255)),
        "s": INFERNO,
    },
}


def text(value: Any, keep: str = "") -> str:
    """A text from outside as HTML: escaped, and with what cannot be seen spelled out."""
    return escape(safe(str(value), keep), quote=True)


def attributes(**values: str | int | None) -> str:
    """Attributes of an element, each with a space before it; those of None are left out."""
    return "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value, keep=chr(10))}"'
        for name, value in values.items()
        if value is not None
    )


def element(tag: str, inner: str, **values: str | int | None) -> str:
    """An element around HTML."""
    return f"<{tag}{attributes(**values)}>{inner}</{tag}>"


def items(tag: str, texts: Iterable[Any]) -> str:
    """An element around each text."""
    return "".join(element(tag, text(t)) for t in texts)


# -- numbers ---------------------------------------------------------------------------


def decimals(numbers: Floats) -> int:
    """How many decimals give the largest of some numbers three digits."""
    finite = np.abs(numbers[np.isfinite(numbers)])
    top = float(finite.max()) if finite.size else 0.0
    return int(np.clip(2 - math.floor(math.log10(top)), 0, 6)) if top > 0 else 2


def number(x: float, *, signed: bool = False) -> str:
    """A number with five digits."""
    if not math.isfinite(x):
        return "no number" if math.isnan(x) else str(x)
    return f"{x:+.5g}" if signed else f"{x:.5g}"


def interval(low: float, high: float, *, signed: bool = False) -> str:
    """A 95 % interval: "[+0.1, +0.3]"."""
    return f"[{number(low, signed=signed)}, {number(high, signed=signed)}]"


# -- colours ---------------------------------------------------------------------------


def shade(x: float, top: float, *, diverging: bool) -> str:
    """The class of a cell's colour: `p7` is 7 of `LEVELS` above 0, `n7` below it, `s7` of a scale
    that begins at 0; `x` for no number."""
    if not math.isfinite(x):
        return "x"
    level = min(round(abs(x) / top * LEVELS), LEVELS) if top > 0 else 0
    if not diverging:
        return f"s{level if x > 0 else 0}"
    return f"{'p' if x >= 0 else 'n'}{level}"


def colour_rules() -> str:
    """The style of all classes of `shade`, in light and dark, and of the bars that explain them."""
    parts = []
    for theme, scales in _SCALES.items():
        rules = []
        for name, stops in scales.items():
            colours = [_between(stops, i / LEVELS) for i in range(LEVELS + 1)]
            for i, c in enumerate(colours):
                rules.append(f".{name}{i}{{background:{_hex(c)};color:{_ink(c)}}}")
        ramps = {
            "s": [_hex(c) for c in scales["s"]],
            "d": [_hex(c) for c in (*reversed(scales["n"]), *scales["p"][1:])],
        }
        for name, stops_ in ramps.items():
            rules.append(f".ramp.{name}{{background:linear-gradient(to right,{','.join(stops_)})}}")
        css = "\n".join(rules)
        parts.append(css if theme == "light" else f"@media(prefers-color-scheme:dark){{\n{css}\n}}")
    return "\n".join(parts)


def _between(stops: Sequence[Colour], share: float) -> Colour:
    x = share * (len(stops) - 1)
    i = min(int(x), len(stops) - 2)
    r, g, b = (round(u + (x - i) * (v - u)) for u, v in zip(stops[i], stops[i + 1], strict=True))
    return r, g, b


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _ink(colour: Colour) -> str:
    """Black or white, whichever is read better on a colour (WCAG 2.1's relative luminance)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (x / 255 for x in colour)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fff"
