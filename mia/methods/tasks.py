"""What tasks there are: their list, the pairs of one, and a prompt made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mia.datasets import tasks as data
from mia.datasets.tasks import Composition, Format, Task
from mia.errors import UsageError
from mia.show.report import Report
from mia.show.text import visible


@dataclass(frozen=True, eq=False)
class TaskList(Report):
    """The tasks and compositions that come with mia.

    Attributes:
        tasks: name, family, description and count of each task.
    """

    tasks: Sequence[dict[str, Any]]
    compositions: Sequence[Composition]

    def document(self) -> dict[str, Any]:
        return {
            "tasks": self.rows(),
            "compositions": [
                {"name": c.name, "AC": c.ac, "BC": c.bc, "BD": c.bd, "AD": c.ad}
                for c in self.compositions
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        return list(self.tasks)

    def plain(self) -> str:
        width = max(len(t["name"]) for t in self.tasks)
        lines = [
            f"{t['name']:<{width}}  {t['family']:<11}  {t['count']:>4}  {t['description']}"
            for t in self.tasks
        ]
        lines.append("\nCompositions (mia function-vector compose): AC is to BC as AD is to BD.")
        lines += [
            f"{c.name:<{width}}  AC {c.ac}, BC {c.bc}, BD {c.bd}, AD {c.ad}"
            for c in self.compositions
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TaskPairs(Report):
    """The pairs of a task."""

    task: Task

    def document(self) -> dict[str, Any]:
        t = self.task
        return {
            "task": t.name,
            "family": t.family,
            "description": t.description,
            "pairs": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        return [{"input": p.input, "output": list(p.outputs)} for p in self.task.pairs]

    def plain(self) -> str:
        return "\n".join(
            f"{visible(p.input)}\t{' | '.join(map(visible, p.outputs))}" for p in self.task.pairs
        )


@dataclass(frozen=True, eq=False)
class TaskPrompt(Report):
    """A prompt with examples of a task, and the right answers to its query."""

    task: Task
    text: str
    answers: Sequence[str]
    seed: int

    def document(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "prompt": self.text,
            "answers": list(self.answers),
            "seed": self.seed,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [self.document()]

    def plain(self) -> str:
        return self.text


def overview() -> TaskList:
    """The tasks and compositions that come with mia."""
    return TaskList(data.index(), data.compositions())


def pairs(task: str | Path) -> TaskPairs:
    """The pairs of a task, by its name or from a file. Raises as `mia.datasets.tasks.load`."""
    return TaskPairs(data.load(task))


def prompt(
    task: str | Path, *, format: str | Format = "qa", shots: int = 5, seed: int = 0
) -> TaskPrompt:
    """A prompt as the in-context methods make them, without a BOS.

    Raises as `mia.datasets.tasks.load`, and `UsageError` for a format that cannot be read or
    more examples than the task has."""
    if shots < 0:
        raise UsageError(f"shots must be at least 0, got {shots}")
    source = data.load(task)
    rng = np.random.default_rng(seed)
    query = source.pairs[rng.integers(len(source.pairs))]
    examples = data.draw(source.pairs, shots, rng, without=query.input)
    text = data.read_format(format).prompt(examples, query.input)
    return TaskPrompt(source, text, query.outputs, seed)
