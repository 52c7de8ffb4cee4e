"""Contrastive activation addition: Rimsky et al. 2023 (arXiv 2312.06681).

| paper                     | here                                                        |
|---------------------------|-------------------------------------------------------------|
| D, (p, c_p, c_n)          | `AbItem`: question, matching letter, other letter           |
| a_L(p, c)                 | `resid_post.L` at the answer's letter                       |
| v_MD (eq. 1)              | `train`: the mean of a_L(p, c_p) - a_L(p, c_n)              |
| normalized across behaviours (app. C) | `equal_norms`                                   |
| multiplier, answer-matching probability | `mia.methods.caa_evaluation`                  |

Where we deviate: prompts are those of `mia.methods.ab_prompts`; `by_text` reads the answers
themselves instead of their letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.datasets.choices import AbItem, select_items
from mia.datasets.selection import Selection
from mia.errors import UsageError
from mia.methods.ab_prompts import prompt_and_answers
from mia.methods.contrast import PairActivations, aggregate
from mia.progress import Progress, step
from mia.request import Capture, Request
from mia.show.report import Report
from mia.show.text import visible
from mia.sites import Site
from mia.vectors import Vector
from mia.vectors.report import VectorReport

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model

#: A/B questions: a shipped set by name, a file, or some items
Behaviour = Selection[AbItem] | str | Path


# -- the vector ----------------------------------------------------------------------


def train(
    model: Model,
    items: Sequence[AbItem],
    *,
    layers: Sequence[int] | None = None,
    bos: bool | None = None,
    name: str = "caa",
    by_text: bool = False,
    progress: Progress | None = None,
) -> Vector:
    """The mean difference at the answer's letter, for every layer (eq. 1).

    Args:
        by_text: at the answer itself, the mean over its tokens, with no choices listed: for
            models that do not know what a letter stands for.

    Raises `UsageError` if there are no items.
    """
    if not items:
        raise UsageError("there are no items to learn from")
    sites = [Site("resid_post", i) for i in (range(model.n_layer) if layers is None else layers)]
    requests = []
    for item in items:
        begun, *answers = prompt_and_answers(model, item, bos=bos, by_text=by_text)
        for answer in answers:
            capture = Capture(sites, tokens=slice(len(begun.tokens), None))
            requests.append(Request([*begun.tokens, *answer], captures=[capture], logits=None))
    results = model.run(requests, progress=progress)

    def rows(first: int) -> dict[int, Array]:
        return {
            s.layer: np.stack(
                [r.captures[s].mean(0) for r in results[first::2]]
            )  # (n_items, n_embd)
            for s in sites
            if s.layer is not None
        }

    facts = model.file_metadata(
        method="caa",
        name=name,
        n_items=str(len(items)),
        read="the answer's tokens" if by_text else "the answer's letter",
        bos=model.wants_bos(bos),
    )
    return aggregate(PairActivations(rows(0), rows(1), "resid_post", facts), "mean")


def equal_norms(vectors: Sequence[Vector]) -> list[Vector]:
    """Vectors of several behaviours, each scaled at each layer to the mean of their norms there,
    so that one multiplier means the same for all. Raises `UsageError` if their layers differ."""
    layers = vectors[0].layers
    if any(v.layers != layers for v in vectors):
        raise UsageError("vectors of unequal layers cannot be brought to equal norms")
    mean = {i: float(np.mean([v.norms[i] for v in vectors])) for i in layers}
    out = []
    for v in vectors:
        scaled = {i: v[i] * np.float32(mean[i] / (v.norms[i] or 1)) for i in layers}
        out.append(Vector(scaled, v.site, {**v.metadata, "norms": "equal across behaviours"}))
    return out


# -- experiments ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CaaVectors(Report):
    """Vectors of one or several behaviours."""

    facts: ModelFacts
    vectors: Sequence[VectorReport]

    def write(self, files: Sequence[str], *, layer_zero: bool = False) -> CaaVectors:
        """Writes each to its file. Raises `UsageError` or `FileError`."""
        written = [
            v.write(file, layer_zero=layer_zero)
            for v, file in zip(self.vectors, files, strict=True)
        ]
        return CaaVectors(self.facts, written)

    def document(self) -> dict[str, Any]:
        return {"model": self.facts.document(), "vectors": [v.document() for v in self.vectors]}

    def rows(self) -> list[dict[str, Any]]:
        return [{"name": v.vector.name, **row} for v in self.vectors for row in v.rows()]

    def plain(self) -> str:
        lines = []
        for v in self.vectors:
            n, layers = v.vector.metadata["n_items"], v.vector.layers
            name = visible(v.file or v.vector.name)
            lines.append(f"{name}: {n} items, layers {layers[0]}-{layers[-1]}")
        return "\n".join(lines)


def vector_files(template: str, behaviours: Sequence[str]) -> list[str]:
    """A file for each behaviour: `{name}` in the template is its name. Raises `UsageError` if
    several would be written to one file."""
    files = [template.replace("{name}", Path(b).stem) for b in behaviours]
    if len(set(files)) < len(files):
        raise UsageError(
            f"{len(files)} behaviours need {len(files)} files: write {{name}} into the file's name"
        )
    return files


def learn(
    model: Model,
    behaviours: Behaviour | Sequence[Behaviour],
    *,
    equal_norm: bool = False,
    by_text: bool = False,
    bos: bool | None = None,
) -> CaaVectors:
    """`train` on each of several behaviours, with provenance; `CaaVectors.write` saves them.

    Args:
        behaviours: of each a shipped set by name, a file, or some of its items:
            `mia.datasets.choices.select_items("agree_vs_accurate", "0..39")`.
        equal_norm: scale the vectors to one norm per layer (`equal_norms`).
    """
    vectors = []
    for given in [behaviours] if isinstance(behaviours, (str, Path, Selection)) else behaviours:
        data = given if isinstance(given, Selection) else select_items(given)
        name = Path(data.name).stem
        with step(f"reading {name}") as bar:
            vector = train(model, data.items, bos=bos, name=name, by_text=by_text, progress=bar)
        vectors.append(vector.with_metadata(**data.metadata()))
    if equal_norm:
        vectors = equal_norms(vectors)
    return CaaVectors(model.facts, [VectorReport(v) for v in vectors])
