"""Chains of affine steps and norms, and what they make of each part of a sum.

A logit is not a sum over the parts of a residual because the final norm divides by the size
of the whole. With that size held fixed ("frozen"), everything from the residual to the logit
is affine, and each part has its share (Elhage et al. 2021; Nanda's direct logit attribution).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, or LayerNorm if `centred`, without weight and bias, which are steps of their own."""

    eps: float
    centred: bool

    def __call__(self, x: Array) -> Array:
        x = self.centre(x)
        return x * self.factor(x)

    def centre(self, x: Array) -> Array:
        return x - x.mean(-1, keepdims=True) if self.centred else x

    def factor(self, centred: Array) -> Array:
        """1 / sqrt(mean square + eps) of rows that are centred already: (…, 1)."""
        return 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(self.eps))

    def frozen(self, x: Array, whole: Array) -> Array:
        """x through the norm with the size of `whole`: linear in x."""
        return self.centre(x) * self.factor(self.centre(whole))


def split(
    steps: Sequence[Callable[[Array], Array]], parts: Array, constant: Array
) -> tuple[Array, Array]:
    """Parts (n, width) and a constant (width,), whose sum is x, through steps that make y of x.

    Each step is a `Norm`, frozen at the size of x, or affine. Returns parts and a constant whose
    sum is y; biases go to the constant.
    """
    rows: Array = np.concatenate([constant[None], parts]).astype(np.float64)  # (1 + n, width)
    for step in steps:
        if isinstance(step, Norm):
            rows = step.frozen(rows, rows.sum(0))
        else:
            zero = step(np.zeros_like(rows[:1]))  # (1, width out)
            rows = step(rows)
            rows[1:] -= zero
    return rows[1:], rows[0]
