"""What `mia.methods.function_vectors` returns: vectors, accuracies, and reports of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, Floats, norms
from mia.edits import Edit
from mia.measure.estimates import Accuracy
from mia.methods.icl_reports import (
    Curve,
    accuracy_documents,
    cell,
    flat,
    plot_curves,
    rows_mean,
    task_table,
)
from mia.ranges import Head
from mia.show.report import Report
from mia.show.text import visible
from mia.sites import Site
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts


#: the tokens that a vector points to: "raw" and "norm" -> {id, text, logit, prob} each
Decoded = Mapping[str, Sequence[Mapping[str, Any]]]

#: heads of a vector that a line has
_HEADS = 10


def _empty() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True, eq=False, slots=True)
class FunctionVector:
    """A task as a sum of heads.

    Attributes:
        vector: v, (n_embd,).
        layer, coeff: where it is added, and how many times.
        heads: those summed, largest effect first; none if a file does not say.
        effects: (n_layer, n_head) AIE that chose them; empty for a saved vector.
        dev: accuracy on dev by layer, (n_layer,), with v added there, NaN for layers that were
            not tried; empty for a saved vector.
        metadata: what it was made with.
    """

    vector: Array
    layer: int
    coeff: float = 1.0
    heads: Sequence[Head] = ()
    effects: Floats = field(default_factory=_empty)
    dev: Floats = field(default_factory=_empty)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def edits(self, layer: int | None = None) -> list[Edit]:
        """v added at the end of a block, at the last token of the prompt."""
        i = self.layer if layer is None else layer
        return [Edit(Site("resid_post", i), "add", self.vector, tokens=-1, coeff=self.coeff)]

    def as_vector(self) -> Vector:
        """v at its layer, which `save` writes to a file."""
        return Vector({self.layer: self.vector}, "resid_post", self.metadata)

    def document(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "coeff": self.coeff,
            "norm": round(float(norms(self.vector)), 4),
            "dev_accuracy": round(float(self.dev[self.layer]), 4),
            "heads": [h.document(effect=round(float(self.effects[h]), 6)) for h in self.heads],
        }


@dataclass(frozen=True, slots=True)
class FunctionVectorScores:
    """Accuracy on the test part: `wrong` are prompts whose examples have shuffled outputs.

    Attributes:
        vector_given_icl: without examples, with the vector, over the queries that are answered
            right with examples, the only ones that Todd et al. count; None if there are none.
        by_layer: layer -> (without examples, after shuffled ones), with the vector added there.
    """

    zero_shot: Accuracy
    icl: Accuracy
    wrong: Accuracy
    zero_shot_vector: Accuracy
    wrong_vector: Accuracy
    vector_given_icl: Accuracy | None
    by_layer: dict[int, tuple[Accuracy, Accuracy]]

    def accuracies(self) -> dict[str, Accuracy | None]:
        names = ("zero_shot", "icl", "wrong", "zero_shot_vector", "wrong_vector")
        return {**{n: getattr(self, n) for n in names}, "vector_given_icl": self.vector_given_icl}


@dataclass(frozen=True, eq=False)
class TrainedFunctionVectors(Report):
    """Function vectors of several tasks.

    Attributes:
        tasks: `IclExperiment.facts` of each.
        effects: mean effects over the tasks, (n_layer, n_head), which chose the heads.
        decoded: the tokens that each vector points to.
        files: where they were saved; empty if they were not.
    """

    facts: ModelFacts
    tasks: Sequence[dict[str, Any]]
    vectors: Sequence[FunctionVector]
    effects: Floats
    decoded: Sequence[Decoded]
    files: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "effects": self.effects.round(6).tolist(),
            "vectors": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        files: Sequence[str | None] = self.files or [None] * len(self.tasks)
        return [
            {**task, "file": file, **v.document(), "decoded": decoded}
            for task, file, v, decoded in zip(
                self.tasks, files, self.vectors, self.decoded, strict=True
            )
        ]

    def plain(self) -> str:
        lines = []
        for r in self.rows():
            line = f"{visible(r['task'])}: layer {r['layer']}, {r['dev_accuracy']:.2f} on dev"
            lines.append(line if r["file"] is None else f"{line}; {visible(r['file'])}")
            heads = [f"{h['layer']}.{h['head']} {h['effect']:+.3f}" for h in r["heads"]]
            more = " …" if len(heads) > _HEADS else ""
            lines.append(f"  heads: {', '.join(heads[:_HEADS])}{more}")
            for name, title in (("raw", "unembedding"), ("norm", "with final norm")):
                texts = [visible(t["text"]) for t in r["decoded"][name]]
                lines.append(f"  decoded, {title}: {' | '.join(texts)}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws the effects of all heads."""
        from mia.show import plots

        names = [t["task"] for t in self.tasks]
        of = ", ".join(names) if len(names) <= 3 else f"mean of {len(names)} tasks"
        figure = plots.heatmap(
            self.effects,
            title=f"average indirect effect: {of}",
            x="head",
            y="layer",
            bar="change of p(answer)",
            diverging=True,
            clipped=True,
        )
        plots.save(figure, path)


# -- evaluation --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FunctionVectorRow:
    """One task of a table.

    Attributes:
        task: `IclExperiment.facts`.
        layer, coeff: where the vector was added, and how many times.
    """

    task: Mapping[str, Any]
    family: str
    layer: int
    coeff: float
    scores: FunctionVectorScores

    def document(self) -> dict[str, Any]:
        row = {
            "family": self.family,
            "layer": self.layer,
            "coeff": self.coeff,
            **self.task,
            **accuracy_documents(self.scores.accuracies()),
        }
        if self.scores.by_layer:
            row["by_layer"] = {
                str(i): accuracy_documents({"zero_shot_vector": a, "wrong_vector": b})
                for i, (a, b) in self.scores.by_layer.items()
            }
        return row


@dataclass(frozen=True, eq=False)
class FunctionVectorTable(Report):
    """Accuracies of function vectors, a row for each task."""

    facts: ModelFacts
    tasks: Sequence[FunctionVectorRow]

    @property
    def mean(self) -> dict[str, float]:
        """Over tasks."""
        names = ("zero_shot", "icl", "wrong", "zero_shot_vector", "wrong_vector")
        return rows_mean([r.scores.accuracies() for r in self.tasks], names)

    def document(self) -> dict[str, Any]:
        rows = [r.document() for r in self.tasks]
        return {"model": self.facts.document(), "rows": rows, "mean": self.mean}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "task": r.task["task"],
                "family": r.family,
                "layer": r.layer,
                "coeff": r.coeff,
                "n": r.scores.icl.n,
                **flat(r.scores.accuracies()),
            }
            for r in self.tasks
        ]

    def plain(self) -> str:
        titles = {
            "icl": "in-context",
            "zero_shot": "zero-shot",
            "zero_shot_vector": "+ vector",
            "vector_given_icl": "where ICL is right",
            "wrong": "shuffled",
            "wrong_vector": "+ vector",
        }
        rows = []
        for r in self.tasks:
            accuracies = r.scores.accuracies()
            head = [r.task["task"], str(r.layer), str(r.scores.icl.n)]
            rows.append([*head, *(cell(accuracies[t]) for t in titles)])
        mean = self.mean
        means = [f"{mean[t]:.2f}" if t in mean else "" for t in titles]
        curves: dict[str, Curve] = {}
        for r in self.tasks:
            curves[r.task["task"]] = self._curve(r, 0)
            curves[f"{r.task['task']}, shuffled"] = self._curve(r, 1)
        return task_table(
            ("task", "layer", "n", *titles.values()), rows, ["mean", "", "", *means], curves
        )

    def plot(self, path: str | Path) -> None:
        """Draws accuracy by layer. Raises `UsageError` if it was not asked for."""
        kinds = ("without examples", "after shuffled examples")
        curves = {
            kind: {r.task["task"]: self._curve(r, which) for r in self.tasks}
            for which, kind in enumerate(kinds)
        }
        plot_curves(path, curves, "function vector added, by layer")

    @staticmethod
    def _curve(row: FunctionVectorRow, which: int) -> dict[int, Accuracy]:
        return {i: pair[which] for i, pair in row.scores.by_layer.items()}
