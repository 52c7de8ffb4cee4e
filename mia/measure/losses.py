"""Losses: log-probabilities of logits, and metrics made of them (`Request.metric`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mia.arrays import Array, IntArray
from mia.errors import UsageError


def log_probs(logits: Array, targets: Sequence[int] | IntArray) -> npt.NDArray[np.float64]:
    """Natural log-probability of one target for each row of logits (n, n_vocab): (n,) float64.

    Logits are taken as float32, and so are the exponentials, of numbers from which the row's largest
    is taken; their sum and what follows are float64. That is right to 1e-6.

    Raises `UsageError` unless there is one target for each row.
    """
    rows = np.asarray(logits, np.float32)
    if len(targets) != len(rows):
        raise UsageError(f"{len(targets)} targets for {len(rows)} rows of logits; each has one")
    out = np.empty(len(rows))
    # one row at a time stays in the processor's cache
    scratch = np.empty(rows.shape[1], np.float32)
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        top = row.max()
        np.exp(np.subtract(row, top, out=scratch), out=scratch)
        out[i] = float(row[target]) - float(top) - math.log(scratch.sum(dtype=np.float64))
    return out


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
        return -log_probs(logits, self.targets).astype(np.float32)


class MeanLoss:
    """A metric: the mean negative log-probability of the targets, in nats per token."""

    def __init__(self, targets: Sequence[int] | IntArray):
        self.targets = targets

    def __call__(self, logits: Array) -> float:
        return -float(log_probs(logits, self.targets).mean())


class DivergenceFrom:
    """A metric: KL(base ‖ this run) of the next token, the mean over positions, in nats."""

    def __init__(self, base: Array):
        """`base`: log-probabilities of the other run, (n_positions, n_vocab)."""
        self._base = base

    def __call__(self, logits: Array) -> float:
        total = 0.0
        # one row at a time stays in the processor's cache
        for base, row in zip(self._base, logits, strict=True):
            shifted = row - row.max()
            log_all = math.log(np.exp(shifted).sum(dtype=np.float64))
            total += float(np.exp(base) @ (base - shifted + np.float32(log_all)))
        return max(total / len(logits), 0.0)
