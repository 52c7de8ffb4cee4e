"""Values of a document, as a page reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mia.arrays import Floats

Document = Mapping[str, Any]


def array(values: Any) -> Floats:
    """Numbers of a document, in which None stands for what is not finite."""
    return np.array(values, dtype=np.float64)  # numpy reads None as NaN


def texts(tokens: Sequence[Mapping[str, Any]]) -> str:
    return "".join(str(t["text"]) for t in tokens)


def number_or_none(x: float | None) -> str:
    return "none" if x is None or not math.isfinite(x) else f"{x:.5g}"


def random_line(moved: Sequence[float], unit: str) -> str:
    """What random directions did, in words.

    Args:
        moved: how far each moved the metric.
        unit: of the metric, with a space in front, or nothing.
    """
    directions = "a random direction" if len(moved) == 1 else f"{len(moved)} random directions"
    return (
        f"{directions} of the same norm moved it by {float(np.mean(moved)):.2g}{unit} on average, "
        f"{max(moved):.2g} at most"
    )
