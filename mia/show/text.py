"""Text for a person: made safe for a terminal, tokens on one line, columns, numbers of a document.

A terminal obeys control characters: a file's metadata could move the cursor, set the window's title
or write the clipboard. A person reads text in the order in which it stands: marks of direction and
characters without a width could hide what it says. `safe` spells all of these out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

#: controls of a terminal (C0, DEL, C1), lone surrogates, and what is not seen: marks of direction,
#: characters without a width, blank letters, variation selectors, tags
_UNSAFE = (
    "\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
#: a zero-width joiner stays where it joins two emoji into one
_EMOJI = "\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
_JOINER = f"(?<=[{_EMOJI}])\u200d(?=[{_EMOJI}])"
_SPELLED = re.compile(f"{_JOINER}|([{_UNSAFE}])")
_NAMES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def safe(text: str, keep: str = "") -> str:
    """A text that a terminal can show: control characters, lone surrogates and what is not seen
    are spelled out (`\\x1b`, `\\u202e`). Letters, combining marks and emoji stay.

    Args:
        keep: characters that stay besides; "\\n\\t" of a text of several lines.
    """

    def spelled(match: re.Match[str]) -> str:
        c = match[1]
        return match[0] if c is None or c in keep else _spelled(c)

    return _SPELLED.sub(spelled, text)


def visible(piece: str) -> str:
    """A token's text on one line, `safe`; spaces other than the plain one are spelled out too."""
    # a joiner that `safe` has left joins two emoji
    return "".join(c if c.isprintable() or c == "\u200d" else _spelled(c) for c in safe(piece))


def _spelled(c: str) -> str:
    n = ord(c)
    return _NAMES.get(c) or (
        f"\\x{n:02x}" if n < 0x100 else f"\\u{n:04x}" if n < 0x10000 else f"\\U{n:08x}"
    )


def as_json(document: Any, indent: int | None = None) -> str:
    """A JSON document. What `safe` spells out is written as `\\u001b`: the same value when it is
    read, and safe to look at."""

    def escaped(match: re.Match[str]) -> str:
        c = match[1]
        if c is None or c == "\n":  # a line end of the layout: in a string it is escaped already
            return match[0]
        units = c.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))

    return _SPELLED.sub(escaped, json.dumps(document, ensure_ascii=False, indent=indent))


def columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns as wide as they need to be, the first to the left, the others to the
    right."""
    lines = [[safe(cell) for cell in line] for line in (titles, *rows)]
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
