"""Regression by a Gaussian process (Rasmussen & Williams 2006, chapters 2 and 5) over settings.

The kernel is a product: settings are alike if their layers, widths and strengths are near, and their
operators (with the sign of the coefficient) the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mia.arrays import Floats, IntArray
from mia.tuning.settings import Setting

#: correlation of two operators at the same place and strength
_ACROSS = 0.3
#: length scales that are tried: in shares of the depth, in e-folds of the coefficient, and in
#: doublings of the width
_DEPTHS, _STRENGTHS, _WIDTH = (0.07, 0.15, 0.3), (0.7, 1.5), 1.5
#: variances of the noise that are tried, beside that of the function
_NOISES = (1e-4, 1e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Features:
    """What the kernel sees of n settings.

    Attributes:
        kind: (n,) which operator and sign.
        depth: (n,) the middle of the layers, in shares of the deepest.
        width: (n,) log2 of the number of layers.
        strength: (n,) log of the coefficient's size.
    """

    kind: IntArray
    depth: Floats
    width: Floats
    strength: Floats

    @staticmethod
    def of(settings: Sequence[Setting]) -> Features:
        kinds = [(s.operator, s.coeff < 0) for s in settings]
        number = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        deepest = max(s.layers[-1] for s in settings) + 1
        sizes = np.abs([s.coeff for s in settings])
        return Features(
            np.array([number[kind] for kind in kinds]),
            np.array([(s.layers[0] + s.layers[-1]) / 2 / deepest for s in settings]),
            np.log2([len(s.layers) for s in settings]),
            # a coefficient of 0 is as far below the others as they go
            np.log(np.maximum(sizes, sizes[sizes > 0].min(initial=1.0) / 4)),
        )

    def at(self, rows: Sequence[int] | IntArray) -> Features:
        i = np.asarray(rows, np.intp)
        return Features(self.kind[i], self.depth[i], self.width[i], self.strength[i])

    def trend(self, n_kinds: int) -> Floats:
        """The features of the mean: for each kind a constant and a slope over the strength, and one
        slope over the width. (n, 2·n_kinds + 1)"""
        one = (self.kind[:, None] == np.arange(n_kinds)).astype(np.float64)
        return np.hstack([one, one * self.strength[:, None], self.width[:, None]])


def _kernel(a: Features, b: Features, depth: float, strength: float) -> Floats:
    """(n_a, n_b), 1 where they are the same."""

    def near(x: Floats, y: Floats, scale: float) -> Floats:
        return ((x[:, None] - y) / scale) ** 2

    distance = near(a.depth, b.depth, depth) + near(a.strength, b.strength, strength)
    distance = distance + near(a.width, b.width, _WIDTH)
    same: Floats = np.where(a.kind[:, None] == b.kind, 1.0, _ACROSS)
    return same * np.exp(-distance / 2)


class Process:
    """A function of settings, known at some of them."""

    def __init__(self, x: Features, y: Floats, n_kinds: int):
        """Of length scales and noise, those of the largest marginal likelihood are taken.

        Args:
            x, y: settings and values (n,).
            n_kinds: how many kinds there are in all.
        """
        self._x, self._n_kinds = x, n_kinds
        trend = x.trend(n_kinds)
        self._scale = float(y.std()) or 1.0
        z = (y - y.mean()) / self._scale
        # a weak prior on the trend's weights: what the data says little of stays near 0
        gram = trend.T @ trend + 0.1 * np.eye(trend.shape[1])
        self._weights = np.linalg.solve(gram, trend.T @ z)
        self._mean = float(y.mean())
        rest = z - trend @ self._weights
        fits = [self._fit(rest, *p) for p in itertools.product(_DEPTHS, _STRENGTHS, _NOISES)]
        _, self._depth, self._strength, self._variance, self._factor, self._alpha = max(
            fits, key=lambda fit: fit[0]
        )

    def _fit(
        self, rest: Floats, depth: float, strength: float, noise: float
    ) -> tuple[float, float, float, float, Floats, Floats]:
        n = len(rest)
        k = _kernel(self._x, self._x, depth, strength) + (noise + 1e-8) * np.eye(n)
        factor = np.asarray(np.linalg.cholesky(k), np.float64)
        alpha: Floats = np.linalg.solve(factor.T, np.linalg.solve(factor, rest))
        variance = max(float(rest @ alpha) / n, 1e-12)  # its most likely value, in closed form
        likelihood = -0.5 * n * math.log(variance) - float(np.log(np.diag(factor)).sum())
        return likelihood, depth, strength, variance, factor, alpha

    def draws(self, x: Features, n: int, rng: np.random.Generator) -> Floats:
        """n functions of the posterior, at settings. (n, n_settings)"""
        across = _kernel(x, self._x, self._depth, self._strength)
        mean = x.trend(self._n_kinds) @ self._weights + across @ self._alpha
        known = np.linalg.solve(self._factor, across.T)
        covariance = _kernel(x, x, self._depth, self._strength) - known.T @ known
        covariance = self._variance * covariance + 1e-6 * np.eye(len(mean))
        noise = rng.standard_normal((len(mean), n))
        drawn: Floats = mean + (np.linalg.cholesky(covariance) @ noise).T
        return self._mean + self._scale * drawn
