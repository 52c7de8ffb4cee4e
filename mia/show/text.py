"""Text for a person: tokens on one line, columns, numbers of a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def visible(piece: str) -> str:
    """A token's text on one line: line ends and tabs spelled out."""
    table = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(table.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in piece)


def columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns as wide as they need to be, the first to the left, the others to the
    right."""
    lines = [titles, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def rounded(x: Any, digits: int = 6) -> Any:
    """Numbers of a document, shortened, lists and arrays alike; what is not finite is None, for
    JSON has no NaN."""
    import numpy as np

    a = np.asarray(x, np.float64)
    if a.ndim == 0:
        return round(float(a), digits) if np.isfinite(a) else None
    if np.isfinite(a).all():
        return np.round(a, digits).tolist()
    return [rounded(part, digits) for part in a]
