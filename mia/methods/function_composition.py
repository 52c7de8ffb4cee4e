"""Algebra of function vectors: v(AD) = v(AC) + v(BD) - v(BC) (Todd et al. 2023, section 3.3).

Tasks of two steps: A and B choose an element of a list, C copies it and D maps it. The
question is whether the composed vector does the task AD, and how it compares to the vector
that is trained on AD directly. All vectors are sums of the same heads, those with the
largest mean effect over the four tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import cosine
from mia.datasets.tasks import Composition
from mia.methods.function_vector_reports import Decoded
from mia.methods.function_vectors import (
    SHOTS,
    FunctionVector,
    FunctionVectorScores,
    HeadStatistics,
    decode,
    evaluate,
    head_statistics,
    head_vector,
)
from mia.methods.icl import IclExperiment, TaskSetup, best_of, experiment
from mia.methods.icl_reports import accuracy_documents, cell, flat
from mia.ranges import check_n_heads, top_heads
from mia.show.report import Report
from mia.show.text import columns

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.measure.estimates import Accuracy
    from mia.model import Model


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed vector beside the one trained directly, on the composed task."""

    direct: FunctionVector
    composed: FunctionVector
    cosine: float
    direct_scores: FunctionVectorScores
    composed_scores: FunctionVectorScores


def compose(
    ad: IclExperiment, statistics: Sequence[HeadStatistics], *, n_heads: int = 40
) -> Composed:
    """v(AD) = v(AC) + v(BD) - v(BC), all of the heads with the largest mean effect over the four
    tasks. The layers of the composed and of the direct vector are chosen on dev of AD.

    Args:
        statistics: of AC, BC, BD and AD.
    """
    m = ad.model
    effects = np.mean([s.effects for s in statistics], 0)  # (n_layer, n_head)
    heads = top_heads(effects, n_heads)
    v_ac, v_bc, v_bd, v_ad = (head_vector(m, s.means, heads) for s in statistics)
    v = v_ac + v_bd - v_bc
    vectors = []
    for x in (v_ad, v):
        variants = [FunctionVector(x, i).edits() for i in range(m.n_layer)]
        with ad.step("layer of"):
            scores = ad.scores(ad.zero_shot(ad.dev), variants)
        layer, dev = best_of(scores), scores.correct.mean(1)
        vectors.append(FunctionVector(x, layer, heads=heads, effects=effects, dev=dev))
    direct, composed = vectors
    return Composed(direct, composed, cosine(v, v_ad), evaluate(ad, direct), evaluate(ad, composed))


@dataclass(frozen=True, eq=False)
class CompositionRow:
    """One composition: its name, the composed task's facts, the vectors, what they point to."""

    name: str
    task: Mapping[str, Any]
    result: Composed
    decoded: Mapping[str, Decoded]

    def accuracies(self) -> dict[str, Accuracy]:
        r = self.result
        return {
            "zero_shot": r.composed_scores.zero_shot,
            "icl": r.composed_scores.icl,
            "direct": r.direct_scores.zero_shot_vector,
            "composed": r.composed_scores.zero_shot_vector,
        }

    def document(self) -> dict[str, Any]:
        r = self.result
        return {
            "composition": self.name,
            **self.task,
            **accuracy_documents(self.accuracies()),
            "layers": {"direct": r.direct.layer, "composed": r.composed.layer},
            "cosine": round(r.cosine, 4),
            "decoded": self.decoded,
        }


@dataclass(frozen=True, eq=False)
class CompositionTable(Report):
    """Composed vectors beside direct ones, a row for each composition."""

    facts: ModelFacts
    compositions: Sequence[CompositionRow]

    def document(self) -> dict[str, Any]:
        rows = [c.document() for c in self.compositions]
        return {"model": self.facts.document(), "rows": rows}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "composition": c.name,
                "task": c.task["task"],
                "cosine": c.result.cosine,
                **flat(c.accuracies()),
            }
            for c in self.compositions
        ]

    def plain(self) -> str:
        titles = {
            "icl": "in-context",
            "zero_shot": "zero-shot",
            "direct": "+ direct",
            "composed": "+ composed",
        }
        rows = []
        for c in self.compositions:
            cells = [cell(c.accuracies()[t]) for t in titles]
            rows.append([c.name, c.task["task"], *cells, f"{c.result.cosine:.2f}"])
        return columns(("composition", "task", *titles.values(), "cosine"), rows)


def compose_tasks(
    model: Model,
    compositions: Sequence[Composition],
    setup: TaskSetup | None = None,
    *,
    n_heads: int | None = None,
    prompts: int = 100,
    effect_prompts: int = 25,
    top_k: int = 5,
) -> CompositionTable:
    """Does the composed vector do the composed task? Heads of a task are measured once.

    Args:
        n_heads: how many heads to sum; None for 40, or all if the model has fewer.
        prompts, effect_prompts: as in `FunctionVectorTraining`.
        top_k: how many tokens to decode of each vector.

    Raises `RangeError` if the model has fewer heads."""
    n = min(40, model.n_layer * model.n_head) if n_heads is None else n_heads
    check_n_heads(n, model.n_layer, model.n_head)
    measured: dict[str, tuple[IclExperiment, HeadStatistics]] = {}
    rows = []
    for c in compositions:
        for task in (c.ac, c.bc, c.bd, c.ad):
            if task not in measured:
                ex = experiment(model, task, setup, shots=SHOTS)
                statistics = head_statistics(ex, prompts=prompts, effect_prompts=effect_prompts)
                measured[task] = ex, statistics
        ad = measured[c.ad][0]
        result = compose(ad, [measured[t][1] for t in (c.ac, c.bc, c.bd, c.ad)], n_heads=n)
        rows.append(
            CompositionRow(
                c.name,
                ad.facts,
                result,
                {
                    "direct": decode(model, result.direct.vector, top_k),
                    "composed": decode(model, result.composed.vector, top_k),
                },
            )
        )
    return CompositionTable(model.facts, rows)
