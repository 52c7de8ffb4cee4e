"""Losses: log-probabilities of logits, and metrics made of them (`Request.metric`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.arrays import Array, IntArray

Floats = npt.NDArray[np.floating[Any]]


def log_probs(logits: Array, targets: Sequence[int] | IntArray, dtype: type = np.float64) -> Floats:
    """Natural log-probability of one target for each row of logits (n, n_vocab): (n,).

    Args:
        dtype: what is computed in; float32 halves the time and is right to six digits.
    """
    rows: Floats = np.asarray(logits, dtype)
    top = rows.max(1)
    logsumexp = top + np.log(np.exp(rows - top[:, None]).sum(1))
    return rows[np.arange(len(rows)), list(targets)] - logsumexp


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Log-probabilities of the whole vocabulary, (n, n_vocab) float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class AnswerLogProb:
    """A metric: the log-probability of an answer, its tokens summed, in nats."""

    def __init__(self, answer: Sequence[int]):
        self.answer = list(answer)

    def __call__(self, logits: Array) -> float:
        return float(log_probs(logits, self.answer).sum())


class TokenLoss:
    """A metric: the negative log-probability of each target, (n,) float32, in nats."""

    def __init__(self, targets: Sequence[int] | IntArray):
        self.targets = targets

    def __call__(self, logits: Array) -> Array:
        return -log_probs(logits, self.targets, np.float32).astype(np.float32)


class MeanLoss:
    """A metric: the mean negative log-probability of the targets, in nats per token."""

    def __init__(self, targets: Sequence[int] | IntArray, dtype: type = np.float64):
        self.targets, self.dtype = targets, dtype

    def __call__(self, logits: Array) -> float:
        return -float(log_probs(logits, self.targets, self.dtype).mean())
