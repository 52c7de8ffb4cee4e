"""The arrays that mia computes with, by what they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: activations, logits, vectors, weights
Array = npt.NDArray[np.float32]
#: statistics
Floats = npt.NDArray[np.float64]
#: indices
IntArray = npt.NDArray[np.intp]
