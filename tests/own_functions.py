"""What a user may write: an operator and aggregators, named as module:function in tests."""

import numpy as np

PAIRS = [("a", "b")]


def halfway(h: np.ndarray, v: np.ndarray, c: float) -> np.ndarray:
    """An operator."""
    return (h + c * v) / 2


def own(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """An aggregator."""
    return positive.max(0) - negative.min(0)


def wrong(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """One that keeps the pairs apart."""
    return positive - negative


def top_logit(logits: np.ndarray) -> float:
    """A metric."""
    return float(logits[-1].max())
