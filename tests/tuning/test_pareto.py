"""The front, and the area below it."""

import numpy as np

from mia.tuning.pareto import front, gains, hypervolume
from mia.tuning.settings import Setting, Trial


def trial(score: float, kl: float) -> Trial:
    return Trial(Setting("add", (1,), 1.0), score, kl)


TRIALS = [
    trial(2.0, 0.1),
    trial(1.0, 0.05),
    trial(1.5, 0.2),  # dominated
    trial(4.0, 0.2),
    trial(9.0, 0.5),  # beyond the budget
    trial(float("nan"), float("inf")),
    trial(4.0, 0.25),  # no better, and dearer
]


def test_the_front_is_what_nothing_beats() -> None:
    assert front(TRIALS) == [TRIALS[i] for i in (1, 0, 3, 4)]
    same = [trial(1.0, 0.1), trial(1.0, 0.1)]
    assert [t is same[0] for t in front(same)] == [True]
    assert front([]) == []


def test_the_hypervolume_is_the_area() -> None:
    # from 0.05 to 0.1 one above the plain score of 0, to 0.2 two, to 0.3 four
    got = hypervolume(TRIALS, budget=0.3, plain=0.0)
    np.testing.assert_allclose(got, 0.05 * 1 + 0.1 * 2 + 0.1 * 4)
    np.testing.assert_allclose(hypervolume(TRIALS, budget=0.3, plain=1.5), 0.1 * 0.5 + 0.1 * 2.5)
    assert hypervolume(TRIALS, budget=0.01, plain=0.0) == 0
    assert hypervolume([], budget=1, plain=0.0) == 0


def test_a_gain_is_the_difference_of_two_areas() -> None:
    rng = np.random.default_rng(0)
    score, kl = rng.uniform(-1, 6, 60), rng.uniform(0, 0.5, 60)
    how = {"budget": 0.3, "plain": 0.5}
    got = gains(score, kl, TRIALS, **how)
    before = hypervolume(TRIALS, **how)
    want = [
        hypervolume([*TRIALS, trial(s, k)], **how) - before for s, k in zip(score, kl, strict=True)
    ]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert (got > 0).sum() > 10 and (got == 0).sum() > 10
