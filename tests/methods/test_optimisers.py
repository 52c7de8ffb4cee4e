"""Optimisers without gradients."""

import sys
from typing import get_args

import numpy as np
import pytest

from mia.errors import UsageError
from mia.methods import optimisers
from mia.methods.optimisers import OPTIMISERS


@pytest.mark.parametrize("name", get_args(optimisers.OptimiserName))
def test_optimisers_climb(name: optimisers.OptimiserName) -> None:
    """Weights near a target of ones and zeros pay most."""
    if name == "cma":
        pytest.importorskip("cma")
    rng = np.random.default_rng(7)
    target = (rng.random(20) < 0.5).astype(float)
    optimiser = OPTIMISERS[name](np.full(20, 0.5), np.random.default_rng(0), population=24)
    for _ in range(60):
        asked = optimiser.ask()
        assert asked.shape == (24, 20) and (asked >= 0).all() and (asked <= 1).all()
        optimiser.tell(-((asked - target) ** 2).sum(1))
    assert ((optimiser.current()[0] > 0.5) == (target > 0.5)).all()


def test_equal_rewards_have_equal_ranks() -> None:
    ranks = optimisers._ranked(np.array([2.0, 1.0, 2.0, 5.0]))
    assert ranks[0] == ranks[2] and ranks[1] < ranks[0] < ranks[3]
    assert abs(ranks.mean()) < 1e-12 and not optimisers._ranked(np.ones(4)).any()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(UsageError, match="the optimiser cma needs the package cma: pip install"):
        optimisers.Cma(np.full(3, 0.5), np.random.default_rng(0), population=4)
