"""Means with their uncertainty, and shares of words."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_list(self) -> list[float]:
        return [round(x, 6) for x in (self.mean, self.low, self.high)]


def bootstrap(values: npt.ArrayLike, rng: np.random.Generator, *, n: int = 2000) -> Interval:
    """The mean of values (n_items,) with its 95 % interval by bootstrap over items. For a
    difference of two conditions on the same items give the differences."""
    x = np.asarray(values, np.float64)
    means = x[rng.integers(0, len(x), (n, len(x)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(x.mean()), float(low), float(high))


def word_share(text: str, words: Collection[str]) -> float:
    """The share of a text's words that are in a list, case aside; 0 for a text without words."""
    found = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())
    return sum(w in words for w in found) / len(found) if found else 0.0
