"""Optimisers without gradients of weights in [0, 1]: ask for candidates, tell their rewards.

Hard gates by REINFORCE (Williams 1992, as in Hojel et al. 2024), antithetic evolution
strategies (Salimans et al. 2017, arXiv 1703.03864) and separable CMA-ES (Ros & Hansen 2008;
the package `cma`). All work on θ with w = σ(θ), and on ranks of the rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from mia.arrays import Floats
from mia.errors import UsageError


class Optimiser(Protocol):
    """Ask for candidate weights (n, n_head_total) in [0, 1], tell their rewards (n,)."""

    def ask(self) -> Floats: ...
    def tell(self, rewards: Floats) -> None: ...
    def current(self) -> list[Floats]:
        """The weights to try on dev now, one or several w."""
        ...


class _Adam:
    def __init__(self, n: int, rate: float):
        self.rate, self.t = rate, 0
        self.m, self.v = np.zeros(n), np.zeros(n)

    def step(self, gradient: Floats) -> Floats:
        """The step to add, uphill."""
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.99 * self.v + 0.01 * gradient**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.99**self.t)
        return self.rate * m / (np.sqrt(v) + 1e-8)


class Reinforce:
    """Hard gates z ~ Bernoulli(σ(θ)); gradient of the mean reward by the score function."""

    def __init__(
        self, start: Floats, rng: np.random.Generator, *, population: int, rate: float = 0.2
    ):
        self.theta = _logit(start)
        self.rng, self.n, self.adam = rng, population, _Adam(len(start), rate)
        self.z: Floats = np.empty(0)

    def ask(self) -> Floats:
        p = _sigmoid(self.theta)
        self.z = (self.rng.random((self.n, len(p))) < p).astype(np.float64)
        return self.z

    def tell(self, rewards: Floats) -> None:
        advantage = _ranked(rewards)
        gradient = advantage @ (self.z - _sigmoid(self.theta)) / len(rewards)
        self.theta = np.clip(self.theta + self.adam.step(gradient), -6, 6)

    def current(self) -> list[Floats]:
        p = _sigmoid(self.theta)
        return [(p > 0.5).astype(np.float64), p]


class Evolution:
    """Antithetic evolution strategies on θ, w = σ(θ) (Salimans et al. 2017)."""

    def __init__(
        self,
        start: Floats,
        rng: np.random.Generator,
        *,
        population: int,
        rate: float = 0.2,
        sigma: float = 0.7,
    ):
        self.theta = _logit(start)
        self.rng, self.half, self.sigma = rng, max(population // 2, 1), sigma
        self.adam = _Adam(len(start), rate)
        self.noise: Floats = np.empty(0)

    def ask(self) -> Floats:
        half = self.rng.standard_normal((self.half, len(self.theta)))
        self.noise = np.concatenate([half, -half])
        return _sigmoid(self.theta + self.sigma * self.noise)

    def tell(self, rewards: Floats) -> None:
        gradient = _ranked(rewards) @ self.noise / (len(rewards) * self.sigma)
        self.theta = np.clip(self.theta + self.adam.step(gradient), -6, 6)

    def current(self) -> list[Floats]:
        return [_sigmoid(self.theta)]


class Cma:
    """Separable CMA-ES on θ, w = σ(θ), by the package `cma` (Hansen)."""

    def __init__(
        self, start: Floats, rng: np.random.Generator, *, population: int, sigma: float = 0.7
    ):
        try:
            import cma
        except ImportError as err:
            raise UsageError(
                "the optimiser cma needs the package cma: pip install 'mia[soft]'"
            ) from err
        options = {
            "popsize": population,
            "CMA_diagonal": True,
            "verbose": -9,
            "seed": int(rng.integers(1, 2**31)),
        }
        self.es = cma.CMAEvolutionStrategy(_logit(start), sigma, options)
        self.asked: list[Any] = []

    def ask(self) -> Floats:
        self.asked = self.es.ask()
        return _sigmoid(np.asarray(self.asked))

    def tell(self, rewards: Floats) -> None:
        self.es.tell(self.asked, (-rewards).tolist())

    def current(self) -> list[Floats]:
        return [_sigmoid(np.asarray(self.es.mean))]


OptimiserName = Literal["reinforce", "es", "cma"]
OPTIMISERS: dict[OptimiserName, Callable[..., Optimiser]] = {
    "reinforce": Reinforce,
    "es": Evolution,
    "cma": Cma,
}


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def _logit(p: Floats) -> Floats:
    p = np.clip(p, 0.01, 0.99)
    return np.log(p / (1 - p))


def _ranked(rewards: Floats) -> Floats:
    """Rewards as centred ranks of unit variance, so that one lucky minibatch does not matter."""
    _, which, counts = np.unique(rewards, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[which]  # equal rewards share a rank
    ranks -= ranks.mean()
    return ranks / (ranks.std() or 1.0)
