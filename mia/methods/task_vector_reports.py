"""What `mia.methods.task_vectors` returns: vectors, accuracies, conflicts, and reports of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.arrays import Array, Floats
from mia.edits import Edit
from mia.measure.estimates import Accuracy, pooled
from mia.methods.icl_reports import (
    accuracy_documents,
    cell,
    flat,
    plot_curves,
    rows_mean,
    task_table,
)
from mia.show.report import Report
from mia.show.text import columns, visible
from mia.sites import Site
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.methods.icl import Match


@dataclass(frozen=True, eq=False, slots=True)
class TaskVector:
    """A task as a residual.

    Attributes:
        vector: θ at every layer tried, site `resid_post`.
        layer: the one chosen on dev.
        dev: accuracy on dev by layer, (n_layers,), in the order of `vector.layers`.
        dev_by_set: the best over layers for each set of examples, (n_sets,).
        sets: those that `vector` is the mean over.
    """

    vector: Vector
    layer: int
    dev: Floats
    dev_by_set: Floats
    sets: tuple[int, ...]

    def edits(self, layer: int | None = None) -> list[Edit]:
        """θ in place of the last token's residual."""
        i = self.layer if layer is None else layer
        return [replacement(self.vector[i], i)]

    def document(self) -> dict[str, Any]:
        dev = zip(self.vector.layers, self.dev.tolist(), strict=True)
        return {
            "layer": self.layer,
            "dev": {str(i): round(a, 4) for i, a in dev},
            "sets": list(self.sets),
            "dev_by_set": self.dev_by_set.round(4).tolist(),
        }


def replacement(theta: Array, layer: int) -> Edit:
    """θ (n_embd,) in place of the last token's residual."""
    return Edit(Site("resid_post", layer), "replace", theta, tokens=-1)


@dataclass(frozen=True, slots=True)
class TaskVectorScores:
    """Accuracy on the test part: without examples, with them, and with the vector instead.

    Attributes:
        vector_given_icl: with the vector, over the queries that are answered right with
            examples (Todd et al. 2023 count so); None if there are none.
        by_layer: with the vector of each layer, if asked for.
        asked, known: inputs of the test part, and those answered right with examples.
    """

    zero_shot: Accuracy
    icl: Accuracy
    vector: Accuracy
    vector_given_icl: Accuracy | None
    layer: int
    by_layer: dict[int, Accuracy]
    asked: frozenset[str]
    known: frozenset[str]

    def accuracies(self) -> dict[str, Accuracy | None]:
        names = ("zero_shot", "icl", "vector", "vector_given_icl")
        return {n: getattr(self, n) for n in names}


def pool(parts: Sequence[TaskVectorScores]) -> TaskVectorScores:
    """Several test parts as one, which may share queries; `layer` is the first one's."""
    asked = frozenset().union(*(e.asked for e in parts))
    known = frozenset().union(*(e.known for e in parts))
    given = [e.vector_given_icl for e in parts if e.vector_given_icl is not None]
    return TaskVectorScores(
        pooled([e.zero_shot for e in parts], len(asked)),
        pooled([e.icl for e in parts], len(asked)),
        pooled([e.vector for e in parts], len(asked)),
        pooled(given, len(known)) if given else None,
        parts[0].layer,
        {
            i: pooled([e.by_layer[i] for e in parts], len(asked))
            for i in parts[0].by_layer
            if all(i in e.by_layer for e in parts)
        },
        asked,
        known,
    )


@dataclass(frozen=True, eq=False)
class TrainedTaskVectors(Report):
    """Task vectors of several tasks.

    Attributes:
        tasks: `IclExperiment.facts` of each.
        files: where they were saved; empty if they were not.
    """

    facts: ModelFacts
    tasks: Sequence[dict[str, Any]]
    vectors: Sequence[TaskVector]
    files: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        return {"model": self.facts.document(), "vectors": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        files: Sequence[str | None] = self.files or [None] * len(self.tasks)
        return [
            {**task, "file": file, **theta.document()}
            for task, theta, file in zip(self.tasks, self.vectors, files, strict=True)
        ]

    def plain(self) -> str:
        lines = []
        for r in self.rows():
            line = (
                f"{visible(r['task'])}: layer {r['layer']}, {r['dev'][str(r['layer'])]:.2f} on dev"
            )
            lines.append(line if r["file"] is None else f"{line}; {visible(r['file'])}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TaskVectorRow:
    """One task of a table.

    Attributes:
        task: `IclExperiment.facts`, with the first seed.
        scores: pooled over the repeats.
        layers: where each repeat's vector was put.
    """

    task: Mapping[str, Any]
    family: str
    scores: TaskVectorScores
    layers: Sequence[int]

    def document(self) -> dict[str, Any]:
        s = self.scores
        row: dict[str, Any] = {
            "task": self.task["task"],
            "family": self.family,
            "layer": s.layer,
            **accuracy_documents(s.accuracies()),
        }
        if s.by_layer:
            row["by_layer"] = {str(i): a.document() for i, a in s.by_layer.items()}
        return {**row, **self.task, "repeats": len(self.layers), "layers": list(self.layers)}


@dataclass(frozen=True, eq=False)
class TaskVectorTable(Report):
    """Accuracies of task vectors, a row for each task."""

    facts: ModelFacts
    match: Match
    tasks: Sequence[TaskVectorRow]

    @property
    def mean(self) -> dict[str, float]:
        """Over tasks."""
        accuracies = [r.scores.accuracies() for r in self.tasks]
        return rows_mean(accuracies, ("zero_shot", "icl", "vector"))

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "match": self.match,
            "rows": [r.document() for r in self.tasks],
            "mean": self.mean,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "task": r.task["task"],
                "family": r.family,
                "layer": r.scores.layer,
                "n": r.scores.vector.n,
                **flat(r.scores.accuracies()),
            }
            for r in self.tasks
        ]

    def plain(self) -> str:
        rows = [
            [
                r.task["task"],
                ",".join(map(str, dict.fromkeys(r.layers))),
                str(r.scores.vector.n),
                *map(cell, r.scores.accuracies().values()),
            ]
            for r in self.tasks
        ]
        titles = ("zero-shot", "in-context", "vector", "vector where ICL is right")
        return task_table(
            ("task", "layer", "n", *titles),
            rows,
            ["mean", "", "", *(f"{x:.2f}" for x in self.mean.values()), ""],
            {r.task["task"]: r.scores.by_layer for r in self.tasks},
        )

    def plot(self, path: str | Path) -> None:
        """Draws accuracy by layer. Raises `UsageError` if it was not asked for."""
        scores = {r.task["task"]: r.scores for r in self.tasks}
        plot_curves(
            path,
            {"with the task vector": {t: s.by_layer for t, s in scores.items()}},
            "task vector in place of the examples, by layer",
            {
                "with examples": {t: s.icl.value for t, s in scores.items()},
                "without examples": {t: s.zero_shot.value for t, s in scores.items()},
            },
        )


@dataclass(frozen=True, slots=True)
class ConflictScores:
    """Accuracy at the task of the examples and at the task of the vector."""

    examples: Accuracy
    vector: Accuracy

    def document(self) -> dict[str, Any]:
        return accuracy_documents({"examples": self.examples, "vector": self.vector})


@dataclass(frozen=True, eq=False)
class Conflict(Report):
    """Examples of one task and the vector of another (Hendel et al., section 5.2).

    Attributes:
        task: `IclExperiment.facts` of the examples' task.
        other: the task of the vector.
        layer: where the vector was put.
        with_vector, without: accuracies with the vector and without it.
    """

    facts: ModelFacts
    task: Mapping[str, Any]
    other: str
    layer: int
    with_vector: ConflictScores
    without: ConflictScores

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            **self.task,
            "examples": self.task["task"],
            "vector": self.other,
            "layer": self.layer,
            "with_vector": self.with_vector.document(),
            "without": self.without.document(),
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "task": task,
                "of": of,
                **flat(
                    {
                        "with_vector": getattr(self.with_vector, of),
                        "without": getattr(self.without, of),
                    }
                ),
            }
            for task, of in ((self.task["task"], "examples"), (self.other, "vector"))
        ]

    def plain(self) -> str:
        a, b = self.without, self.with_vector
        return columns(
            (
                f"answers of (n = {b.examples.n})",
                "examples alone",
                f"with the vector of {self.other}",
            ),
            [
                [f"{self.task['task']} (examples)", str(a.examples), str(b.examples)],
                [f"{self.other} (vector)", str(a.vector), str(b.vector)],
            ],
        )
