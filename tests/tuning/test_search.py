"""What the search tries, on a function that costs nothing."""

import math

import numpy as np
import pytest

from mia.tuning.gaussian import Features, Process
from mia.tuning.pareto import hypervolume
from mia.tuning.search import Search
from mia.tuning.settings import Setting, Trial, all_settings

BUDGET = 0.3
SETTINGS = all_settings(range(1, 30), ["add", "clamp"], [1, 4], [0.25, 0.5, 1, 2, 4])


def truth(s: Setting) -> Trial:
    """KL grows with the square of the strength, the score with the strength, most at layer 20; a
    setting that breaks the model has a score of nothing."""
    at, n = (s.layers[0] + s.layers[-1]) / 2, len(s.layers)
    kl = 0.05 * s.coeff**2 * n**1.5 * math.exp(-(((at - 8) / 12) ** 2))
    reach = math.exp(-(((at - 20) / 6) ** 2)) * n * (1 if s.operator == "add" else 0.7)
    score = s.coeff * reach * math.exp(-kl)
    return Trial(s, math.nan, math.inf) if kl > 3 else Trial(s, score, kl)


def searched(runs: int, seed: int, budget: float = BUDGET) -> dict[int, Trial]:
    rng = np.random.default_rng(seed)
    search = Search(SETTINGS, budget=budget, plain=0.0, runs=runs, rng=rng)
    tried: dict[int, Trial] = {}
    while chosen := search.next(tried):
        assert not set(chosen) & set(tried) and len(set(chosen)) == len(chosen)
        tried |= {i: truth(SETTINGS[i]) for i in chosen}
    return tried


@pytest.mark.slow
def test_a_fifth_of_the_runs_finds_most_of_the_front() -> None:
    whole = hypervolume([truth(s) for s in SETTINGS], budget=BUDGET, plain=0.0)
    n = len(SETTINGS) // 5
    for seed in range(2):
        tried = searched(n, seed)
        assert len(tried) == n
        assert hypervolume(list(tried.values()), budget=BUDGET, plain=0.0) > 0.95 * whole
        drawn = np.random.default_rng(seed).choice(len(SETTINGS), n, replace=False)
        random = hypervolume([truth(SETTINGS[i]) for i in drawn], budget=BUDGET, plain=0.0)
        assert random < 0.9 * whole


def test_a_seed_gives_the_same_settings() -> None:
    assert list(searched(40, 1)) == list(searched(40, 1)) != list(searched(40, 2))


def test_a_budget_that_nothing_meets_is_sought_all_the_same() -> None:
    tried = searched(60, 0, budget=1e-9)
    least = min(truth(s).kl for s in SETTINGS)
    assert min(t.kl for t in tried.values()) < 2 * least


def test_all_settings_are_tried_in_their_order() -> None:
    assert list(searched(10**6, 0)) == list(range(len(SETTINGS)))


def test_a_process_goes_through_what_is_known() -> None:
    x = Features.of(SETTINGS)
    y = np.array([math.log(max(truth(s).kl, 1e-9)) if truth(s).finite else 2 for s in SETTINGS])
    rng = np.random.default_rng(0)
    known = rng.choice(len(SETTINGS), 80, replace=False)
    process = Process(x.at(known), y[known], 2)
    draws = process.draws(x, 200, rng)  # (200, n)
    at_known = np.abs(draws[:, known].mean(0) - y[known])
    elsewhere = np.setdiff1d(np.arange(len(y)), known)
    assert at_known.max() < 0.3 * y.std()
    assert draws[:, known].std(0).mean() < 0.5 * draws[:, elsewhere].std(0).mean()
    # the mean follows the truth elsewhere
    assert np.corrcoef(draws[:, elsewhere].mean(0), y[elsewhere])[0, 1] > 0.97


@pytest.mark.parametrize("coeffs", [[0.0, 1.0], [-2.0, 2.0], [0.0]])
def test_coefficients_of_any_sign(coeffs: list[float]) -> None:
    settings = all_settings(range(9), ["add", "project_out"], [2], coeffs)
    assert sum(s.operator == "project_out" for s in settings) == 8
    rng = np.random.default_rng(0)
    search = Search(settings, budget=1, plain=0.0, runs=len(settings) - 1, rng=rng)
    tried: dict[int, Trial] = {}
    while chosen := search.next(tried):
        tried |= {i: Trial(settings[i], settings[i].coeff, abs(settings[i].coeff)) for i in chosen}
    assert len(tried) == len(settings) - 1
