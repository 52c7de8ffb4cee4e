"""Means and shares with their intervals."""

import numpy as np
import pytest

from mia.errors import RangeError
from mia.measure.estimates import (
    Accuracy,
    accuracy,
    bootstrap,
    format_estimate,
    pooled,
    wilson,
)


def test_the_interval_holds_the_mean_and_is_as_wide_as_theory_says() -> None:
    x = np.random.default_rng(0).standard_normal(400)
    got = bootstrap(x, np.random.default_rng(1))
    assert got.value == pytest.approx(x.mean())
    half = 1.96 * x.std() / 20
    assert got.low == pytest.approx(x.mean() - half, abs=0.008)
    assert got.high == pytest.approx(x.mean() + half, abs=0.008)
    assert bootstrap(x, np.random.default_rng(1)) == got
    assert bootstrap([2.0, 2.0], np.random.default_rng(0)).document() == {
        "value": 2,
        "low": 2,
        "high": 2,
        "n": 2,
    }
    assert str(bootstrap([2.0, 2.0], np.random.default_rng(0))) == "2.000 [2.000, 2.000]"


@pytest.mark.parametrize(("k", "n"), [(83, 100), (1, 7), (0, 10), (10, 10)])
def test_wilson_ends_are_where_the_share_is_just_not_rejected(k: int, n: int) -> None:
    """Both ends p solve |k/n - p| = z sqrt(p(1 - p) / n), which is the interval's definition."""
    for p in wilson(k, n):
        assert abs(k / n - p) == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / n), abs=1e-6)
    low, high = wilson(k, n)
    assert low <= k / n <= high and (low < k / n or k == 0) and (high > k / n or k == n)


def test_accuracies_add_up() -> None:
    a = pooled([accuracy([True, False, True]), Accuracy(1, 1)], 4)
    assert a.distinct is None
    again = pooled([a, a], 4)  # the same queries: no narrower
    assert (again.correct, again.n, again.interval) == (6, 8, a.interval)
    assert (a.correct, a.n, a.value) == (3, 4, 0.75)
    assert str(a) == "0.75 [0.30, 0.95]"
    assert a.document()["correct"] == 3
    with pytest.raises(RangeError, match="3 of 2"):
        Accuracy(3, 2)


def test_estimates_have_one_shape_in_documents() -> None:
    """A mean and a share: a table that reads one reads the other."""
    mean = bootstrap([1.0, 2.0], np.random.default_rng(0)).document()
    share = accuracy([True, False]).document()
    assert mean.keys() <= share.keys() == {"value", "low", "high", "n", "correct"}
    assert format_estimate(mean, 1, "+").startswith("+1.5 [+1.")
    assert format_estimate(share, 2) == "0.50 [0.09, 0.91]" and format_estimate(None) == "-"
