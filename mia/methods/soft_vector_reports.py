"""What `mia.methods.soft_vectors` returns: vectors, accuracies, and reports of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, Floats
from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.measure.estimates import Accuracy
from mia.methods.icl_reports import accuracy_documents, flat
from mia.methods.optimisers import OPTIMISERS, OptimiserName
from mia.show.report import Report
from mia.show.text import columns, visible
from mia.sites import Site

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.methods.icl import Match


#: weights below this count as 0, so that a layer without others need not run again
_NONE = 1e-3


@dataclass(frozen=True, eq=False, slots=True)
class SoftVector:
    """A task as a blend of heads.

    Attributes:
        means: (n_layer, n_head, head_dim) head outputs with examples.
        weights: (n_layer, n_head) in [0, 1].
        metadata: what it was made with.
    """

    means: Array
    weights: Floats
    metadata: Mapping[str, str] = field(default_factory=dict)

    def edits(self) -> list[Edit]:
        return blend_edits(self.means, self.weights)

    @property
    def n_active(self) -> int:
        return int((self.weights >= _NONE).sum())

    def save(self, path: str | Path) -> None:
        """Writes safetensors. Raises `FileError`."""
        from mia.io.files import write_safetensors

        arrays: dict[str, np.ndarray[Any, Any]] = {"means": self.means, "weights": self.weights}
        write_safetensors(path, arrays, {**self.metadata, "kind": "soft vector"})


def blend_edits(means: Array, weights: Floats) -> list[Edit]:
    """Head outputs at the last token, blended with means by weights (n_layer, n_head). Layers
    whose weights are all 0 have no edit."""
    out = []
    for layer in np.flatnonzero((weights >= _NONE).any(1)).tolist():
        value, w = means[layer].reshape(-1), np.clip(weights[layer], 0, 1)
        out.append(Edit(Site("head_out", layer), "blend", value, tokens=-1, coeff=w))
    return out


@dataclass(frozen=True, slots=True)
class SoftVectorTraining:
    """How a soft vector is trained.

    Attributes:
        evaluations: maximum number of candidate evaluations; one is one candidate on one minibatch.
        population: candidates of a step.
        batch: training queries of a minibatch, the same for all candidates of a step.
        every: steps between two dev scores.
        patience: training stops after this many dev scores without improvement.
        prompts: prompts with examples that the means are over.
        start: w that every head begins with; None for the best of several starts on training
            queries.
    """

    optimiser: OptimiserName = "reinforce"
    evaluations: int = 2000
    population: int = 32
    batch: int = 16
    every: int = 5
    patience: int = 5
    prompts: int = 100
    start: float | None = None

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise UsageError(
                f"unknown optimiser {self.optimiser!r}; known: {', '.join(OPTIMISERS)}"
            )
        for name in ("evaluations", "population", "batch", "every", "patience", "prompts"):
            if getattr(self, name) < 1:
                raise RangeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.start is not None and not 0 <= self.start <= 1:
            raise RangeError(f"start {self.start} is not in [0, 1]")


@dataclass(frozen=True, slots=True)
class Step:
    """A point of the learning curve. `dev` and `dev_logprob` are None between two dev scores.

    Attributes:
        reward, best_reward: mean and best of the candidates.
    """

    evaluations: int
    reward: float
    best_reward: float
    dev: float | None = None
    dev_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class SoftVectorScores:
    """Accuracy on the test part: without examples, with them, and with the soft vector instead."""

    zero_shot: Accuracy
    icl: Accuracy
    soft: Accuracy

    def accuracies(self) -> dict[str, Accuracy]:
        return {"zero_shot": self.zero_shot, "icl": self.icl, "soft": self.soft}


@dataclass(frozen=True, eq=False)
class TrainedSoftVector(Report):
    """A soft vector and its learning curve.

    Attributes:
        task: `IclExperiment.facts`.
        evaluations: how many were spent.
        dev: accuracy of the soft vector on dev.
        file: where it was saved; None if it was not.
    """

    facts: ModelFacts
    task: Mapping[str, Any]
    training: SoftVectorTraining
    soft: SoftVector
    curve: Sequence[Step]
    evaluations: int
    dev: float
    file: str | None = None

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            **self.task,
            "training": asdict(self.training),
            "file": self.file,
            "evaluations": self.evaluations,
            "dev_accuracy": round(self.dev, 4),
            "n_active": self.soft.n_active,
            "weights": self.soft.weights.round(4).tolist(),
            "curve": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The learning curve."""
        return [asdict(s) for s in self.curve]

    def plain(self) -> str:
        lines = [
            f"{s.evaluations:5d} evaluations: reward {s.reward:7.3f}, dev {s.dev:.2f}"
            for s in self.curve
            if s.dev is not None
        ]
        last = (
            f"{visible(self.task['task'])}: {self.dev:.2f} on dev after {self.evaluations} evaluations, "
            f"{self.soft.n_active} heads"
        )
        return "\n".join([*lines, last if self.file is None else f"{last}; {visible(self.file)}"])

    def plot(self, path: str | Path) -> None:
        """Draws the learning curve."""
        from mia.show import plots

        # dev is tried only every few steps: its line has points of its own
        spent = [s.evaluations for s in self.curve if s.dev is not None]
        dev = [s.dev for s in self.curve if s.dev is not None]
        dev_logprob = [s.dev_logprob for s in self.curve if s.dev_logprob is not None]
        logprob = [
            plots.Line(
                name="training: mean of the candidates",
                x=[s.evaluations for s in self.curve],
                y=[s.reward for s in self.curve],
            ),
        ]
        panels = [plots.Panel(lines=logprob, y_label="log-probability of the answer")]
        if dev:  # a short training ends before the first try
            name = "dev: the current weights"
            logprob.append(plots.Line(name=name, x=spent, y=dev_logprob))
            accuracy = [plots.Line(name=name, x=spent, y=dev)]
            panels.append(plots.Panel(lines=accuracy, y_label="dev accuracy", share=True))
        title = f"soft vector, learning curve: {self.task['task']}"
        plots.save(plots.panels(panels, title=title, x_label="candidate evaluations"), path)


@dataclass(frozen=True, eq=False)
class SoftVectorRow:
    """A soft vector and its accuracies."""

    name: str
    soft: SoftVector
    scores: SoftVectorScores

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "n_active": self.soft.n_active,
            **accuracy_documents(self.scores.accuracies()),
        }


@dataclass(frozen=True, eq=False)
class SoftVectorTable(Report):
    """Accuracies of a soft vector, of its sparse version and of a task vector, as asked for.

    Attributes:
        task: `IclExperiment.facts`.
        vectors: the soft vector, and the sparse one if asked for.
        task_vector: accuracy with a task vector, if asked for.
    """

    facts: ModelFacts
    task: Mapping[str, Any]
    match: Match
    file: str
    vectors: Sequence[SoftVectorRow]
    task_vector: Accuracy | None = None

    def document(self) -> dict[str, Any]:
        plain = self.task_vector
        return {
            "model": self.facts.document(),
            **self.task,
            "match": self.match,
            "file": self.file,
            "rows": [v.document() for v in self.vectors],
            **({} if plain is None else {"task_vector": plain.document()}),
        }

    def _accuracies(self) -> dict[str, Accuracy]:
        scores = self.vectors[0].scores
        task_vector = {} if self.task_vector is None else {"task vector": self.task_vector}
        return {
            **{f"{v.name} ({v.soft.n_active} heads)": v.scores.soft for v in self.vectors},
            **task_vector,
            "in-context": scores.icl,
            "zero-shot": scores.zero_shot,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"prompts": name, "n": a.n, **flat({"accuracy": a})}
            for name, a in self._accuracies().items()
        ]

    def plain(self) -> str:
        n = self.vectors[0].scores.soft.n
        rows = [[name, str(a)] for name, a in self._accuracies().items()]
        return columns((f"{self.task['task']}, n = {n}", "accuracy"), rows)
