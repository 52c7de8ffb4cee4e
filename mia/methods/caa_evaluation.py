"""Evaluation of contrastive activation addition: Rimsky et al. 2023 (arXiv 2312.06681).

| paper                       | here                                                         |
|-----------------------------|--------------------------------------------------------------|
| multiplier                  | `multipliers`                                                |
| answer-matching probability | `Matching.p`: P(matching) / (P(A) + P(B)), next after "("    |

The vector is added at every token after the user's message (in the paper's Llama 2 template
that is after `[/INST]`). `by_text` scores the answers themselves instead of their letters.
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
from mia.edits import Edit
from mia.errors import UsageError
from mia.io.provenance import warn_of_same_items
from mia.measure.estimates import Estimate, bootstrap, format_estimate
from mia.measure.losses import MeanLoss
from mia.methods.ab_prompts import AbPrompt, prompt_and_answers
from mia.progress import Progress, step
from mia.ranges import Ranges, parse_layers
from mia.request import Request, TokenMetric
from mia.show.report import Report
from mia.show.text import rounded
from mia.steering import Steering
from mia.vectors import Vector
from mia.vectors.expression import named

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model


@dataclass(frozen=True, eq=False)
class Matching:
    """How probable the behaviour's answer is, of the two.

    Attributes:
        layers, multipliers: the axes.
        p: (n_layers, n_multipliers, n_items).
        plain: (n_items,) without steering.
    """

    layers: list[int]
    multipliers: list[float]
    p: Array
    plain: Array

    def change(self, layer: int, multiplier: float, rng: np.random.Generator) -> Estimate:
        """The mean change from the unsteered run, with its 95 % interval over items."""
        i, j = self.layers.index(layer), self.multipliers.index(multiplier)
        return bootstrap(self.p[i, j] - self.plain, rng)

    @property
    def means(self) -> Array:
        """(n_layers, n_multipliers)"""
        return self.p.mean(-1)


def _asked(begun: AbPrompt, answers: list[list[int]], edits: Sequence[Edit]) -> list[Request]:
    """One request that gives p by letter, or one for each answer's mean loss."""
    if begun.by_letter:
        return [Request(begun.tokens, edits, metric=_MatchingShare(answers[0][0], answers[1][0]))]
    n = len(begun.tokens)
    return [
        Request(
            [*begun.tokens, *a],
            edits,
            logits=slice(n - 1, n + len(a) - 1),
            metric=MeanLoss(a),
        )
        for a in answers
    ]


class _MatchingShare(TokenMetric):
    """A metric: the share of the matching letter in the probability of both."""

    def __init__(self, matching: int, other: int):
        self.tokens = matching, other

    def of(self, logits: Array) -> float:
        a, b = (float(x) for x in logits[-1])
        return float(1 / (1 + np.exp(b - a)))


def matching(
    model: Model,
    vector: Vector,
    items: Sequence[AbItem],
    *,
    layers: Sequence[int],
    multipliers: Sequence[float],
    bos: bool | None = None,
    together: bool = False,
    by_text: bool = False,
    progress: Progress | None = None,
) -> Matching:
    """Steers at each layer by each multiplier, and asks each item.

    Args:
        by_text: compares the answers' texts by their mean log-probability per token, p being
            the share of the matching one in the sum of both exponentials; no choices are listed.
        together: at all the layers at once instead of one after the other; the result
            has one row, of the first layer.

    Raises:
        UsageError: no items, or a vector that does not fit.
    """
    if not items:
        raise UsageError("there are no items to ask")
    model.check_vector(vector)
    groups = [list(layers)] if together else [[i] for i in layers]
    requests = []
    for item in items:
        begun, *answers = prompt_and_answers(model, item, bos=bos, by_text=by_text)
        after_message = slice(begun.steered, None)
        changes: list[Sequence[Edit]] = [()]
        for group in groups:
            for m in multipliers:
                changes.append(
                    Steering(vector, coeff=m, layers=group, tokens=after_message).edits()
                )
        for e in changes:
            requests += _asked(begun, answers, e)
    results = model.run(requests, progress=progress)
    values = np.array([r.value for r in results], np.float32)
    if by_text:  # of each pair of losses
        values = 1 / (1 + np.exp(values[0::2] - values[1::2]))
    values = values.reshape(len(items), -1).T  # (1 + n_layers * n_multipliers, n_items)
    p_all = values[1:].reshape(len(groups), len(multipliers), len(items))
    return Matching([g[0] for g in groups], list(multipliers), p_all, values[0])


# -- the experiment -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CaaCell:
    """One layer (or several at once) and multiplier: the mean probability of the behaviour's
    answer, and its change from the unsteered run."""

    layers: list[int]
    multiplier: float
    p_matching: float
    change: Estimate

    def document(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "multiplier": self.multiplier,
            "p_matching": rounded(self.p_matching),
            "change": self.change.document(),
        }


@dataclass(frozen=True, eq=False)
class CaaEvaluation(Report):
    """The probability of the behaviour's answer over layers and multipliers.

    Attributes:
        vector, data: what they were asked for as.
        matching: the values by item.
        cells: their means and changes.
        about: how the questions were asked (items, bos, by_text, seed).
    """

    facts: ModelFacts
    vector: str
    data: str
    matching: Matching
    cells: list[CaaCell]
    about: dict[str, Any]

    @property
    def plain_mean(self) -> float:
        """The mean without steering."""
        return float(self.matching.plain.mean())

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "vector": self.vector,
            "data": self.data,
            "n_items": len(self.matching.plain),
            **self.about,
            "p_matching_plain": rounded(self.plain_mean),
            "table": [c.document() for c in self.cells],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": c.layers[0],
                "multiplier": c.multiplier,
                "p_matching": c.p_matching,
                "change": c.change.value,
                "low": c.change.low,
                "high": c.change.high,
            }
            for c in self.cells
        ]

    def plain(self) -> str:
        lines = [
            f"P(matching answer), {len(self.matching.plain)} items; without steering "
            f"{self.plain_mean:.3f}",
            "layer  multiplier  P      change [95 %]",
        ]
        for c in self.cells:
            name = str(c.layers[0]) if len(c.layers) == 1 else f"{c.layers[0]}-{c.layers[-1]}"
            change = format_estimate(c.change.document(), sign="+")
            lines.append(f"{name:>5s}  {c.multiplier:>10g}  {c.p_matching:.3f}  {change}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        from mia.show import plots

        m = self.matching
        lines = {f"× {c:g}": m.means[:, j] for j, c in enumerate(m.multipliers)}
        lines["unsteered"] = np.full(len(m.layers), self.plain_mean, np.float32)
        figure = plots.curves(
            m.layers, lines, x_label="layer", y_label="P(matching answer)", title=self.data
        )
        plots.save(figure, path)


def evaluate(
    model: Model,
    vector: Vector | str,
    data: Selection[AbItem] | str | Path,
    *,
    layers: Ranges | None = None,
    multipliers: Sequence[float] = (-1.0, 1.0),
    together: bool = False,
    by_text: bool = False,
    bos: bool | None = None,
    seed: int = 0,
) -> CaaEvaluation:
    """Steers with a vector at each layer by each multiplier, and asks A/B questions.

    Args:
        vector: a vector, a file, or arithmetic. Notices say if it was made with another model,
            or from the same items.
        data: a shipped set by name, a file, or some of its items:
            `mia.datasets.choices.select_items("agree_vs_accurate", "40..")`.
        layers: which (`mia.ranges`); by default every third of the vector's.
        together: all the layers at once instead of one after the other.
        seed: of the intervals, by bootstrap over items.

    Raises:
        UsageError: fewer than two items, or a vector that does not fit.
    """
    data = data if isinstance(data, Selection) else select_items(data)
    if len(data.items) < 2:
        raise UsageError("one question has no interval; give at least two items")
    v, name = named(vector, model.facts)
    warn_of_same_items(v.sources, name, data.paths[0], data.indices)
    chosen = v.layers[::3] if layers is None else parse_layers(layers, model.n_layer)
    with step("asking") as bar:
        m = matching(
            model,
            v,
            data.items,
            layers=chosen,
            multipliers=multipliers,
            bos=bos,
            together=together,
            by_text=by_text,
            progress=bar,
        )
    rng = np.random.default_rng(seed)
    cells = [
        CaaCell(chosen if together else [layer], c, float(m.means[i, j]), m.change(layer, c, rng))
        for i, layer in enumerate(m.layers)
        for j, c in enumerate(m.multipliers)
    ]
    about = {
        "items": data.range,
        "bos": model.wants_bos(bos),
        "by_text": by_text,
        "seed": seed,
    }
    return CaaEvaluation(model.facts, name, data.name, m, cells, about)
