"""The noise of a model's arithmetic: what a change moves that is too small to matter.

Quantized weights multiply activations that are rounded to 8 bits, F16 and BF16 ones to 11 and 8. A
change of a residual by a hundred-thousandth flips some of these roundings, the blocks above carry the
flips on, and the logits move by the same amount whether the change was 1e-6 or 1e-3: by noise. In
exact arithmetic they would move by about as much as the change. A change of exactly nothing would not
do: it flips nothing, and the same rows in the same places give the same bits. Nor would a few numbers,
of one head: they may flip nothing either.
"""

from __future__ import annotations

import numpy as np

from mia.arrays import Array
from mia.edits import Function

#: how large the changes are, beside each number that they change
NUDGE = 1e-5


class _Nudge:
    """Each number times 1 + `NUDGE` · N(0, 1), the same for the same seed."""

    #: what it makes of finite numbers is finite (`mia.engine.stream`)
    is_tame = True

    def __init__(self, seed: int):
        self._seed = seed

    def __call__(self, rows: Array) -> Array:
        factors = 1 + NUDGE * np.random.default_rng(self._seed).standard_normal(rows.shape)
        return (rows * factors).astype(np.float32)


def nudge(seed: int) -> Function:
    """An edit's function: each number times 1 + `NUDGE` · N(0, 1), the same for the same seed."""
    return _Nudge(seed)
