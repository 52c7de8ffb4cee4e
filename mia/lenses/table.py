"""What a lens reads at sites and tokens, as a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mia.arrays import Floats
from mia.errors import UsageError
from mia.show.report import Report
from mia.show.text import rounded, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.lenses.readout import Readout
    from mia.sites import Site

#: what the colours of a picture say
ColourBy = Literal["probability", "entropy"]
#: letters of a token that a table shows
_LETTERS = 11
#: from improbable to certain: grey, violet, red, orange, green (readable on dark and light)
_SCALE = (
    (0.0, (110, 110, 130)),
    (0.1, (120, 80, 200)),
    (0.4, (210, 70, 120)),
    (0.8, (235, 140, 40)),
    (1.0, (60, 180, 75)),
)


@dataclass(frozen=True, slots=True)
class LensRow:
    """The best tokens at one site and token, best first: {id, text, logit, prob} each.

    Attributes:
        entropy: of the whole distribution, in nats.
    """

    site: str
    layer: int | None
    token_index: int
    top: list[dict[str, Any]]
    entropy: float = float("nan")

    def document(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "layer": self.layer,
            "token_index": self.token_index,
            "entropy": rounded(self.entropy),
            "top": self.top,
        }


@dataclass(frozen=True, eq=False)
class LensTable(Report):
    """What a lens reads: one `LensRow` for each site and token, sites in order.

    Attributes:
        facts: the model; None where the activations do not say.
        tokens: of the prompt.
        n_tokens: rows of each site.
        colour_by: what the colours of a picture say.
    """

    facts: ModelFacts | None
    tokens: Sequence[Token]
    lens: list[LensRow]
    n_tokens: int
    colour_by: ColourBy = "probability"

    def document(self) -> dict[str, Any]:
        return {
            "model": None if self.facts is None else self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "lens": [row.document() for row in self.lens],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "site": r.site,
                "layer": r.layer,
                "token_index": r.token_index,
                "entropy": rounded(r.entropy),
                "rank": rank,
                **top,
            }
            for r in self.lens
            for rank, top in enumerate(r.top, 1)
        ]

    def plain(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """A line for each token under a line for each site."""
        out = []
        for n, row in enumerate(self.lens):
            if n % self.n_tokens == 0:
                head = "" if row.layer is None else f"Layer #{row.layer} "
                out.append(f"{head}{row.site}:")
            out.append(f"{row.token_index}: {self.cells(row)}")
        return out

    @staticmethod
    def cells(row: LensRow) -> str:
        return "|".join(f"{visible(t['text'])} {t['prob']:.2f}" for t in row.top)

    def plot(self, path: str | Path) -> None:
        """Draws layers by tokens: in each cell the best token, its colour the token's probability,
        or the entropy of all."""
        from mia.show import plots
        from mia.show.token_grid import token_grid

        shades, top = self._shades()
        name = "" if self.facts is None else f"{self.facts.name} · "
        figure = token_grid(
            self._best(),
            shades,
            title=f"{name}logit lens: the token that each layer would say next",
            x_labels=[self.tokens[row.token_index].label for row in self.lens[: self.n_tokens]],
            y_labels=self._sites(),
            bar="entropy (nats)" if self.colour_by == "entropy" else "probability",
            top=top,
        )
        plots.save(figure, path)

    def _sites(self) -> list[str]:
        return [row.site for row in self.lens[:: self.n_tokens]]

    def _best(self) -> list[list[str]]:
        """The best token of each cell, (n_sites, n_tokens)."""
        best = [row.top[0]["text"] for row in self.lens]
        return [best[i : i + self.n_tokens] for i in range(0, len(best), self.n_tokens)]

    def _shades(self) -> tuple[Floats, float]:
        """The numbers that colours say, (n_sites, n_tokens), and where they end."""
        if self.colour_by == "entropy":
            x = np.array([row.entropy for row in self.lens])
            top = float(np.nanmax(x, initial=0.0)) or 1.0
        else:
            x, top = np.array([row.top[0]["prob"] for row in self.lens]), 1.0
        return x.reshape(-1, self.n_tokens), top

    def table(self, width: int) -> RenderableType:
        """Sites down and tokens across, the best token in each cell, then the last token's list;
        of one token or one site the list alone."""
        from rich.console import Group
        from rich.text import Text

        from mia.show.grid import token_cells

        if self.n_tokens < 2 or len(self.lens) == self.n_tokens:
            return self._list(width)
        shades, top = self._shades()
        cells = token_cells(
            [[visible(text) for text in row] for row in self._best()],
            shades / top,
            width,
            title=f"the best token of each layer; colour: {self.colour_by}, up to {top:.3g}",
            rows=self._sites(),
            columns=[visible(self.tokens[r.token_index].label) for r in self.lens[: self.n_tokens]],
        )
        last = replace(self, lens=self.lens[self.n_tokens - 1 :: self.n_tokens], n_tokens=1)
        return Group(cells, Text("\nthe last token:", style="bold"), last._list(width))

    def _list(self, width: int) -> RenderableType:
        """A row for each site and token, coloured by probability; as many tokens as fit."""
        from rich.table import Table
        from rich.text import Text

        pieces = [visible(t.label) for t in self.tokens]
        texts = [visible(t["text"]) for r in self.lens for t in r.top]
        fixed = (
            max((len(r.site) for r in self.lens), default=0)
            + 4
            + min(_LETTERS, max(map(len, pieces), default=0))
            + 6
        )
        n_asked = max((len(r.top) for r in self.lens), default=0)
        longest = max(map(len, texts), default=0)
        n = max(1, min(n_asked, (width - fixed) // (min(_LETTERS, longest) + 7)))
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
        table.add_column("site", no_wrap=True, style="cyan")
        table.add_column("at", justify="right", no_wrap=True, style="dim")
        table.add_column("token", no_wrap=True, style="dim")
        for i in range(n):
            table.add_column(f"{i + 1}", no_wrap=True)
        if n < n_asked:
            table.caption = f"{n} of {n_asked} fit here; the document has all"
        for i, row in enumerate(self.lens):
            cells = [
                Text.assemble(
                    (visible(t["text"])[:_LETTERS], f"{_colour(t['prob'])} bold"),
                    (f" {t['prob']:.2f}", "dim"),
                )
                for t in row.top[:n]
            ]
            piece = pieces[row.token_index] if row.token_index < len(pieces) else ""
            table.add_row(
                Text(row.site if i % self.n_tokens == 0 else ""),
                str(row.token_index),
                Text(piece[:_LETTERS]),
                *cells,
                end_section=self.n_tokens > 1 and i % self.n_tokens == self.n_tokens - 1,
            )
        return table


def check_colour_by(name: str) -> None:
    """Raises `UsageError` for a name that is none of `ColourBy`."""
    if name not in get_args(ColourBy):
        raise UsageError(f"colours by {name!r}; known: {', '.join(get_args(ColourBy))}")


def lens_rows(
    read: Readout,
    places: Sequence[tuple[str, Site, int]],
    described: Callable[[int], dict[str, Any]],
) -> list[LensRow]:
    """Rows of a readout.

    Args:
        places: (label, site, token index) of each row read.
        described: {"id": …, "text": …} of a token id.
    """
    tokens = {int(t): described(int(t)) for t in set(read.ids.ravel().tolist())}
    rows = []
    for n, (label, site, i) in enumerate(places):
        top = [
            {**tokens[t], "logit": round(z, 4), "prob": round(p, 6)}
            for t, z, p in zip(
                read.ids[n].tolist(), read.logits[n].tolist(), read.probs[n].tolist(), strict=True
            )
        ]
        rows.append(LensRow(label, site.layer, i, top, float(read.entropy[n])))
    return rows


def _colour(p: float) -> str:
    """A rich style for a probability."""
    for (a, low), (b, high) in pairwise(_SCALE):
        if p <= b:
            t = max(0.0, (p - a) / (b - a))
            red, green, blue = (round(x + t * (y - x)) for x, y in zip(low, high, strict=True))
            return f"rgb({red},{green},{blue})"
    return "rgb(60,180,75)"
