"""Estimates: a number with its 95 % interval, and how many items it is over. One JSON shape:
`{"value", "low", "high", "n"}`; a share of right answers also has `correct`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.errors import RangeError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the ends of its 95 % interval, over n items."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return format_estimate(self.document())

    def document(self) -> dict[str, Any]:
        ends = {k: round(getattr(self, k), 6) for k in ("value", "low", "high")}
        return {**ends, "n": self.n}


def format_estimate(document: dict[str, Any] | None, digits: int = 3, sign: str = "") -> str:
    """An estimate of a document as a cell: "0.831 [0.742, 0.893]"; "-" for None.

    Args:
        sign: "+" writes the sign of positive numbers too.
    """
    if document is None:
        return "-"
    value, low, high = (format(document[k], f"{sign}.{digits}f") for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def bootstrap(values: npt.ArrayLike, rng: np.random.Generator, *, n: int = 2000) -> Estimate:
    """The mean of values (n_items,) with its 95 % interval by bootstrap over items. For a
    difference of two conditions on the same items give the differences."""
    x = np.asarray(values, np.float64)
    low, high = bootstrap_interval(x, rng, n=n)
    return Estimate(float(x.mean()), float(low), float(high), len(x))


def bootstrap_interval(
    values: npt.NDArray[np.floating[Any]], rng: np.random.Generator, *, n: int
) -> npt.NDArray[np.floating[Any]]:
    """The ends (2, ...) of the 95 % interval of the mean of values (..., n_items) over items, the
    same n draws of items for each row."""
    n_items = values.shape[-1]
    means = values[..., rng.integers(0, n_items, (n, n_items))].mean(-1)
    ends: npt.NDArray[np.floating[Any]] = np.percentile(means, [2.5, 97.5], axis=-1)
    return ends


# -- shares ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`correct` right answers of n, with Wilson's interval.

    Attributes:
        distinct: number of different queries, if some were asked several times. The interval uses
            this count, because repeated queries are not independent.
    """

    correct: int
    n: int
    distinct: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n or self.n < 1:
            raise RangeError(f"correct must be between 0 and n, got {self.correct} of {self.n}")

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        n = self.distinct or self.n
        return wilson(self.correct * n / self.n, n)

    def __str__(self) -> str:
        return format_estimate(self.document(), 2)

    def document(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "value": round(self.value, 6),
            "low": round(low, 6),
            "high": round(high, 6),
            "n": self.n,
            "correct": self.correct,
            **({} if self.distinct is None else {"distinct": self.distinct}),
        }


def accuracy(correct: Sequence[bool] | npt.NDArray[np.bool_]) -> Accuracy:
    return Accuracy(int(np.sum(correct)), len(correct))


def pooled(parts: Sequence[Accuracy], distinct: int) -> Accuracy:
    """Several as one, over this many different queries."""
    correct, n = sum(a.correct for a in parts), sum(a.n for a in parts)
    return Accuracy(correct, n, None if distinct == n else distinct)


def wilson(k: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's interval for k of n (Wilson 1927); z = 1.96 for 95 %."""
    p, zz = k / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return (centre - half if k else 0.0), (centre + half if k < n else 1.0)
