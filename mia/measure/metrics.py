"""Metrics: whether an answer is right, how probable it was, and how sure a share is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.errors import RangeError

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Score:
    """One answer: right or not, and the natural log-probability of the right ones."""

    correct: bool
    logprob: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A `Request.metric`: does the model's best next token begin a right answer?

    Attributes:
        answers: ids of the first tokens of the right answers, at least one.
    """

    answers: tuple[int, ...]

    def __call__(self, logits: Array) -> Score:
        row = logits[-1]  # (n_vocab,)
        best = int(row.argmax())
        top = float(row[best])
        log_all = top + math.log(float(np.exp(row - row[best]).sum()))
        right = row[list(self.answers)].astype(np.float64)
        log_right = top + math.log(np.exp(right - top).sum() + 1e-300)
        return Score(best in self.answers, min(log_right - log_all, 0.0))


def exact_match(text: str, outputs: Iterable[str], end: str = "") -> bool:
    """Whether a continuation, up to what ends an answer in the prompt's format, is one of the
    right answers. `end`: "\\n\\n" ends at the first line end, ", " at the first comma that the
    answer does not have itself (Washington, D.C.)."""
    stop = end.strip(" ")[:1] or end[:1]
    parts = text.split(stop) if stop else [text]

    def said(answer: str) -> str:
        own = answer.count(stop) if stop else 0
        return stop.join(parts[: own + 1]).strip()

    return any(said(o) == o for o in (o.strip() for o in outputs))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """k right of n, with Wilson's interval.

    Attributes:
        distinct: how many different queries the n are, where some were asked several times. The
            interval is that of so many: to ask again says little new.
    """

    k: int
    n: int
    distinct: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n or self.n < 1:
            raise RangeError(f"{self.k} of {self.n} is no share")

    @property
    def value(self) -> float:
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        n = self.distinct or self.n
        return wilson(self.k * n / self.n, n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "accuracy": round(self.value, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "correct": self.k,
            "n": self.n,
            **({} if self.distinct is None else {"distinct": self.distinct}),
        }


def accuracy(correct: Sequence[bool] | npt.NDArray[np.bool_]) -> Accuracy:
    return Accuracy(int(np.sum(correct)), len(correct))


def pooled(parts: Sequence[Accuracy], distinct: int) -> Accuracy:
    """Several as one, over so many different queries."""
    k, n = sum(a.k for a in parts), sum(a.n for a in parts)
    return Accuracy(k, n, None if distinct == n else distinct)


def wilson(k: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's interval for k of n (Wilson 1927); z = 1.96 for 95 %."""
    p, zz = k / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return (centre - half if k else 0.0), (centre + half if k < n else 1.0)
