"""The arrays that mia computes with, by what they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

#: activations, logits, vectors, weights
Array = npt.NDArray[np.float32]
#: statistics
Floats = npt.NDArray[np.float64]
#: indices
IntArray = npt.NDArray[np.intp]
#: masks
BoolArray = npt.NDArray[np.bool_]


def norms(a: npt.NDArray[np.floating[Any]], *, keepdims: bool = False) -> Floats:
    """Lengths of vectors (…, width): (…). Squares of float32 above 1e19 or below 1e-22 are no
    float32 any more, so float64 counts."""
    out: Floats = np.linalg.norm(np.asarray(a, np.float64), axis=-1, keepdims=keepdims)
    return out


def dot(a: Array, b: Array) -> float:
    """The scalar product of two vectors."""
    return float(np.asarray(a, np.float64) @ np.asarray(b, np.float64))


def cosine(a: Array, b: Array) -> float:
    """The cosine of two vectors; 0 if one is zero."""
    lengths = float(norms(a) * norms(b))
    return dot(a, b) / lengths if lengths else 0.0
