"""Means with intervals, and shares of words."""

import numpy as np
import pytest

from mia.measure.estimates import bootstrap, word_share


def test_word_share_counts_words_and_not_their_case() -> None:
    words = {"le", "chat", "l'eau", "été"}
    assert word_share("Le CHAT, et 3 l'eau! Été.", words) == pytest.approx(4 / 5)
    assert word_share("chats lechat", words) == 0
    assert word_share("123 !?", words) == 0 and word_share("", words) == 0


def test_the_interval_holds_the_mean_and_is_as_wide_as_theory_says() -> None:
    x = np.random.default_rng(0).standard_normal(400)
    got = bootstrap(x, np.random.default_rng(1))
    assert got.mean == pytest.approx(x.mean())
    half = 1.96 * x.std() / 20
    assert got.low == pytest.approx(x.mean() - half, abs=0.008)
    assert got.high == pytest.approx(x.mean() + half, abs=0.008)
    assert bootstrap(x, np.random.default_rng(1)) == got
    assert bootstrap([2.0, 2.0], np.random.default_rng(0)).as_list() == [2, 2, 2]
    assert str(bootstrap([2.0, 2.0], np.random.default_rng(0))) == "2.000 [2.000, 2.000]"
