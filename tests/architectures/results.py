"""What the comparison of one architecture gave: the cells of the tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
OPERATORS = ("zero", "add", "patch", "scale")
CHECKS = ("lens", "generation", "steered generation", "attribution", "together")


@dataclass
class Cell:
    """One cell of a table.

    Attributes:
        status: "ok"; "differs" (by definition: `note` says how); "missing" (`note` says why);
            "unseen" (the reference does not give it, so nothing is known); "none" (the architecture has no such thing); "WRONG".
        error: the largest, None where nothing was compared.
        note: in words.
        layers: where the site is, if not in every block.
    """

    status: str
    error: float | None = None
    note: str = ""
    layers: list[int] | None = None


@dataclass
class Row:
    """All of one model.

    Attributes:
        name: the recipe's.
        architecture: llama.cpp's name.
        gelu: held to the looser tolerance.
        sites: what is read, by the site's name.
        operators: the logits after an edit, by operator and site.
        checks: the rest, by the names in `CHECKS`.
    """

    name: str
    architecture: str
    gelu: bool
    sites: dict[str, Cell] = field(default_factory=dict)
    operators: dict[str, dict[str, Cell]] = field(default_factory=dict)
    checks: dict[str, Cell] = field(default_factory=dict)

    def cells(self) -> dict[str, Cell]:
        """Every cell by a name for people."""
        out = dict(self.sites)
        for operator, cells in self.operators.items():
            out |= {f"{operator} at {site}": cell for site, cell in cells.items()}
        return out | self.checks

    @property
    def wrong(self) -> list[str]:
        """What is wrong, in words."""
        bad = {name: c for name, c in self.cells().items() if c.status == "WRONG"}
        return [f"{name}: {c.note or c.error}" for name, c in bad.items()]


def save(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """One line for each model."""
    lines = ",\n".join(json.dumps(_short(asdict(row))) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load(path: Path = RESULTS) -> list[Row]:
    """What `save` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        Row(
            r["name"],
            r["architecture"],
            r["gelu"],
            _cells(r["sites"]),
            {op: _cells(cells) for op, cells in r["operators"].items()},
            _cells(r["checks"]),
        )
        for r in rows
    ]


def _cells(cells: dict[str, Any]) -> dict[str, Cell]:
    return {n: Cell("ok", c) if isinstance(c, float) else Cell(**c) for n, c in cells.items()}


def _short(x: Any) -> Any:
    """Errors to one digit: the others are noise. What says nothing is left out."""
    if isinstance(x, dict):
        said = {k: _short(v) for k, v in x.items() if v not in (None, "")}
        # an ok cell of which nothing else is said is its error
        return said["error"] if {**said, "error": 0} == {"status": "ok", "error": 0} else said
    return float(f"{x:.0e}") if isinstance(x, float) else x
