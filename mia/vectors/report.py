"""Vectors as reports: norms, the tokens that each direction points to, and the files written.

print(inspect("love.gguf", Model("smollm2")))      # what `mia vector show` prints
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mia.notices import notice
from mia.show.report import Report
from mia.show.text import visible
from mia.sites import RESIDUAL
from mia.vectors.expression import read
from mia.vectors.files import check_file
from mia.vectors.vector import Vector

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model

#: metadata that `VectorDetails` prints
_PRINTED = ("name", "model", "aggregator", "read", "method", "n_pairs", "n_items", "data", "items")


@dataclass(frozen=True, eq=False)
class VectorReport(Report):
    """A vector with its norms.

    Attributes:
        facts: the model it was made with, if that was now.
        file: where it was written.
    """

    own_endings: ClassVar[tuple[str, ...]] = (".gguf", ".safetensors")

    vector: Vector
    facts: ModelFacts | None = None
    file: str | None = None

    def write(self, file: str | Path, *, layer_zero: bool = False) -> VectorReport:
        """Writes the vector, and reports what is in the file: a GGUF has no layer 0 by default.

        Raises:
            UsageError: not a vector file's name, or one that cannot hold the vector's site.
            FileError: the file cannot be written.
        """
        check_file(file, self.vector.site)
        left_out = self.vector.save(file, layer_zero=layer_zero)
        if left_out:
            notice(
                "layer 0 is left out: llama.cpp's control vectors have none (mia and repeng can "
                "read a file that keeps it)"
            )
        notice(f"wrote {file}")
        kept = self.vector.at([i for i in self.vector.layers if i not in left_out])
        return replace(self, vector=kept, file=str(file))

    def document(self) -> dict[str, Any]:
        return {
            **({} if self.facts is None else {"model": self.facts.document()}),
            **({} if self.file is None else {"file": self.file}),
            "name": self.vector.name,
            "site": self.vector.site,
            "width": self.vector.width,
            "layers": self.rows(),
            "metadata": dict(self.vector.metadata),
        }

    def rows(self) -> list[dict[str, Any]]:
        return [{"layer": i, "norm": round(n, 6)} for i, n in self.vector.norms.items()]

    def plain(self) -> str:
        return "\n".join(f"{i:3d}  |v| {n:9.3f}" for i, n in self.vector.norms.items())

    def save(self, path: str | Path) -> None:
        """Writes the vector to a .gguf or .safetensors, else as every report."""
        if Path(path).suffix.lower() in self.own_endings:
            self.write(path)
        else:
            super().save(path)


@dataclass(frozen=True, eq=False)
class VectorDetails(VectorReport):
    """A vector with its provenance, its norms, and the tokens nearest to each direction.

    Attributes:
        toward, away: for each layer the tokens whose lens scores the direction raises and lowers
            most; empty at a site that the lens does not read.
    """

    toward: Sequence[Sequence[str]] = ()
    away: Sequence[Sequence[str]] = ()

    def rows(self) -> list[dict[str, Any]]:
        rows = super().rows()
        if not self.toward:
            return rows
        return [
            {**row, "toward": list(up), "away": list(down)}
            for row, up, down in zip(rows, self.toward, self.away, strict=True)
        ]

    def plain(self) -> str:
        metadata = self.vector.metadata
        lines = [f"{key}: {visible(value)}" for key, value in metadata.items() if key in _PRINTED]
        lines.append(f"site: {self.vector.site}")
        norms = super().plain().split("\n")
        if not self.toward:
            return "\n".join([*lines, *norms])
        for norm, up, down in zip(norms, self.toward, self.away, strict=True):
            lines.append(f"{norm}  + {_tokens(up)}   - {_tokens(down)}")
        return "\n".join(lines)


def inspect(vector: Vector | str, model: Model | None = None, *, k: int = 6) -> VectorDetails:
    """Norms per layer, and the k tokens that each direction points to and away from.

    Args:
        vector: a vector, a file, or arithmetic with several.
        model: whose lens reads the directions; without one there are no tokens.

    Raises:
        UsageError: the vector does not fit the model.
    """
    v = read(vector) if isinstance(vector, str) else vector
    if model is None or not k or v.site not in RESIDUAL:
        return VectorDetails(v)
    model.check_vector(v, vector if isinstance(vector, str) else None)
    directions = np.stack([v[i] for i in v.layers])  # (n_layers, n_embd)
    toward, away = (
        [[model.piece(int(t)) for t in row] for row in model.lens.read(x, k).ids]
        for x in (directions, -directions)
    )
    return VectorDetails(v, model.facts, toward=toward, away=away)


def _tokens(pieces: Sequence[str]) -> str:
    return " ".join(visible(p) or "''" for p in pieces)
