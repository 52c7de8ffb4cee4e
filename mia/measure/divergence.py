"""How far one model's predictions are from another's, with llama.cpp's arithmetic.

`llama-perplexity` (llama.cpp, tools/perplexity) measures the KL divergence of a model from a base whose
log-probabilities were kept in a file with 16 bits each. `pack` rounds as that file does, `compare`
gives one number per position, `Divergence` the statistics over them.

| llama.cpp prints          | here                               |
|---------------------------|------------------------------------|
| Mean KLD ± …              | `Divergence.kl`                    |
| Maximum, 99.9% … KLD      | `Divergence.percentiles`           |
| Mean PPL(Q), PPL(base)    | `perplexity`, `base_perplexity`    |
| Mean ln(PPL(Q)/PPL(base)) | `log_ratio`                        |
| Mean Δp, RMS Δp           | `p_change`, `p_change_rms`         |
| Same top p                | `same_top`                         |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.arrays import Array, BoolArray, Floats, IntArray
from mia.errors import UsageError
from mia.show.text import rounded

#: of the 16 bits: a logit this far below the best one, and all below it, has the smallest number
_DEPTH = 16.0
_STEPS = 65535.0
#: with fewer positions llama.cpp states no error
_FEW = 10
#: a KL below this is rounding of float32 logits
RESOLUTION = 1e-7
_PERCENTS = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """Log-probabilities in 16 bits each: `low + scale * codes`.

    Attributes:
        scale, low: (n,) float32.
        codes: (n, n_vocab) uint16.
    """

    scale: Array
    low: Array
    codes: npt.NDArray[np.uint16]


def pack(logits: Array) -> Packed:
    """Log-probabilities of logits (n, n_vocab) as llama.cpp's base file has them: each row in 65,535
    steps from its largest down to 16 nats below it, or to its smallest."""
    n = len(logits)
    scale, low = np.empty(n, np.float32), np.empty(n, np.float32)
    codes = np.zeros(logits.shape, np.uint16)
    for i, row in enumerate(logits):
        top = row.max()
        bottom = max(row.min(), top - np.float32(_DEPTH))
        low[i] = bottom - top - _log_sum(row, top)
        scale[i] = (top - bottom) / np.float32(_STEPS)
        if scale[i]:
            steps = (row - bottom) * (np.float32(1) / scale[i])
            np.rint(steps, out=steps)
            codes[i] = np.maximum(steps, 0)
    return Packed(scale, low, codes)


@dataclass(frozen=True, eq=False, slots=True)
class Positions:
    """One number for each position; those of the next token only where it is known, (n_targets,).

    Attributes:
        kl: (n,) KL(base ‖ model) of the next token's distribution, in nats.
        same_top: (n,) whether both would say the same token.
        nll, base_nll: (n_targets,) negative log-probability of the token that follows, in nats.
    """

    kl: Floats
    same_top: BoolArray
    nll: Floats
    base_nll: Floats

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        names = ("kl", "same_top", "nll", "base_nll")
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def compare(base: Packed, logits: Array, targets: Sequence[int] | IntArray) -> Positions:
    """A model's logits (n, n_vocab) beside the base's log-probabilities at the same positions.

    Args:
        targets: the tokens that follow; where there are fewer than positions, of the first ones.

    Raises `UsageError` for another vocabulary or number of positions.
    """
    if base.codes.shape != logits.shape or len(targets) > len(logits):
        raise UsageError(
            f"logits of shape {logits.shape} and {len(targets)} tokens do not go with a base of "
            f"shape {base.codes.shape}"
        )
    kl, same = np.empty(len(logits)), np.empty(len(logits), bool)
    nll, base_nll = np.empty(len(targets)), np.empty(len(targets))
    for i, row in enumerate(logits):
        expected = base.scale[i] * base.codes[i] + base.low[i]  # log-probabilities, float32
        top = row.max()
        log_all = top + _log_sum(row, top)
        seen = np.flatnonzero(expected > -_DEPTH)
        kl[i] = _weighted(expected[seen], row[seen], log_all)
        same[i] = row.argmax() == expected.argmax()
        if i < len(targets):
            nll[i], base_nll[i] = log_all - row[targets[i]], -expected[targets[i]]
    return Positions(kl, same, nll, base_nll)


def _log_sum(row: Array, top: np.float32) -> np.float32:
    """log Σ exp(row - top)."""
    return np.float32(math.log(np.exp(row - top).sum(dtype=np.float64)))


def _weighted(expected: Array, row: Array, log_all: np.float32) -> float:
    return float((np.exp(expected) * (expected - row + log_all)).sum(dtype=np.float64))


class KlTo:
    """KL(base ‖ model) in nats at each position, (n,), without the rounding to 16 bits: a function of
    the model's logits (n, n_vocab)."""

    def __init__(self, base: Array):
        """`base`: the base's logits (n, n_vocab)."""
        self._logp = np.stack([_log_softmax(row) for row in base])
        self._p = np.exp(self._logp)

    def __call__(self, logits: Array) -> Floats:
        out = np.empty(len(logits))
        for i, row in enumerate(logits):
            out[i] = (self._p[i] * (self._logp[i] - _log_softmax(row))).sum(dtype=np.float64)
        return out


def _log_softmax(row: Array) -> Array:
    """Equal logits give equal bits, so that a model's KL to itself is 0."""
    top = row.max()
    out: Array = row - top
    out -= _log_sum(row, top)
    return out


# -- statistics ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its standard error, None for ten positions or fewer."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.6f}" + ("" if self.error is None else f" ± {self.error:.6f}")

    def document(self) -> dict[str, Any]:
        return {
            "value": rounded(self.value, 8),
            "error": None if self.error is None else rounded(self.error, 8),
        }


@dataclass(frozen=True, eq=False)
class Divergence:
    """What llama.cpp's tool prints of two models on one text, base first."""

    positions: Positions

    @property
    def kl(self) -> Mean:
        """KL(base ‖ model), in nats per position."""
        return _mean(self.positions.kl)

    @property
    def same_top(self) -> Mean:
        """The share of positions at which both would say the same token."""
        same = self.positions.same_top
        share, n = float(same.mean()), len(same)
        return Mean(share, math.sqrt(share * (1 - share) / (n - 1)) if n > _FEW else None)

    @property
    def perplexity(self) -> Mean | None:
        """The model's; None where no next token is known."""
        return _exp(self.positions.nll)

    @property
    def base_perplexity(self) -> Mean | None:
        return _exp(self.positions.base_nll)

    @property
    def log_ratio(self) -> Mean | None:
        """ln(perplexity / base perplexity)."""
        p = self.positions
        # the error of a mean of differences: llama.cpp's, by its covariance
        return _mean(p.nll - p.base_nll) if len(p.nll) else None

    @property
    def p_change(self) -> Mean | None:
        """The change of the next token's probability."""
        return _mean(self._p_changes) if len(self._p_changes) else None

    @property
    def p_change_rms(self) -> float | None:
        changes = self._p_changes
        return float(np.sqrt((changes**2).mean())) if len(changes) else None

    @property
    def _p_changes(self) -> Floats:
        p = self.positions
        change: Floats = np.exp(-p.nll) - np.exp(-p.base_nll)
        return change

    @property
    def largest(self) -> float:
        return float(self.positions.kl.max())

    @property
    def percentiles(self) -> dict[str, float]:
        """Of KL over positions."""
        values = np.percentile(self.positions.kl, _PERCENTS)
        return {f"{p:g}": float(v) for p, v in zip(_PERCENTS, values, strict=True)}

    def document(self) -> dict[str, Any]:
        def of(mean: Mean | None) -> dict[str, Any] | None:
            return None if mean is None else mean.document()

        rms = self.p_change_rms
        return {
            "n_positions": len(self.positions.kl),
            "n_scored": len(self.positions.nll),
            "kl": of(self.kl),
            "kl_max": rounded(self.largest, 8),
            "kl_percentiles": {k: rounded(v, 8) for k, v in self.percentiles.items()},
            "same_top": of(self.same_top),
            "perplexity_a": of(self.base_perplexity),
            "perplexity_b": of(self.perplexity),
            "log_perplexity_ratio": of(self.log_ratio),
            "p_change": of(self.p_change),
            "p_change_rms": None if rms is None else rounded(rms, 8),
        }


def _mean(values: Floats) -> Mean:
    n = len(values)
    return Mean(float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > _FEW else None)


def _exp(nll: Floats) -> Mean | None:
    """exp of a mean, its error carried over."""
    if not len(nll):
        return None
    mean = _mean(nll)
    value = math.exp(mean.value)
    return Mean(value, None if mean.error is None else value * mean.error)
