"""Tables for people: colour says how probable."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from rich.table import Table
from rich.text import Text

from mia.cli._output import visible

#: from improbable to certain: dark violet, red, yellow (readable on dark and light)
_SCALE = (
    (0.0, (110, 110, 130)),
    (0.1, (120, 80, 200)),
    (0.4, (210, 70, 120)),
    (0.8, (235, 140, 40)),
    (1.0, (60, 180, 75)),
)


def colour(p: float) -> str:
    """A rich style for a probability."""
    for (a, low), (b, high) in pairwise(_SCALE):
        if p <= b:
            t = max(0.0, (p - a) / (b - a))
            r, g, blue = (round(x + t * (y - x)) for x, y in zip(low, high, strict=True))
            return f"rgb({r},{g},{blue})"
    return "rgb(60,180,75)"


#: letters of a token that a table shows
_TEXT = 11


def lens_table(lens: list[dict[str, Any]], pieces: list[str], n_tokens: int, width: int) -> Table:
    """One row per site and token: the best tokens, coloured by probability; as many of them as
    `width` columns hold."""
    fixed = (
        max((len(r["site"]) for r in lens), default=0) + 4 + min(_TEXT, max(map(len, pieces))) + 6
    )
    longest = max((len(visible(t["text"])) for r in lens for t in r["top"]), default=0)
    asked = max((len(r["top"]) for r in lens), default=0)
    shown = max(1, min(asked, (width - fixed) // (min(_TEXT, longest) + 7)))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("site", no_wrap=True, style="cyan")
    table.add_column("at", justify="right", no_wrap=True, style="dim")
    table.add_column("token", no_wrap=True, style="dim")
    for i in range(shown):
        table.add_column(f"{i + 1}", no_wrap=True)
    if shown < asked:
        table.caption = f"{shown} of {asked} fit here; --json or a pipe has all"
    for n, row in enumerate(lens):
        cells = [
            Text.assemble(
                (visible(t["text"])[:_TEXT], colour(t["prob"]) + " bold"),
                (f" {t['prob']:.2f}", "dim"),
            )
            for t in row["top"][:shown]
        ]
        first = n % n_tokens == 0
        last = n % n_tokens == n_tokens - 1 and n_tokens > 1
        i = row["token_index"]
        table.add_row(
            Text(row["site"] if first else ""),
            str(i),
            Text(pieces[i][:_TEXT]),
            *cells,
            end_section=last,
        )
    return table
