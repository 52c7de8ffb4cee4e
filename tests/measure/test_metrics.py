"""Scores of answers, and intervals of shares."""

import numpy as np
import pytest

from mia.errors import RangeError
from mia.measure.metrics import Accuracy, FirstToken, accuracy, exact_match, pooled, wilson


def test_first_token_reads_the_last_row() -> None:
    logits = np.log(np.array([[0.9, 0.05, 0.05], [0.2, 0.5, 0.3]], np.float32)) + 7
    hit, miss = FirstToken((1, 2))(logits), FirstToken((0,))(logits)
    assert hit.correct and not miss.correct
    assert hit.logprob == pytest.approx(np.log(0.8), abs=1e-6)
    assert miss.logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert FirstToken((0,))(np.array([[-900.0, 0.0]], np.float32)).logprob < -600


@pytest.mark.parametrize(
    ("text", "end", "right"),
    [
        (" Paris\n\nQ:", "\n\n", True),
        (" Paris, London", ", ", True),
        (" Paris is", "\n\n", False),
        ("Paris", "", True),
        (" paris\n", "\n\n", False),
    ],
)
def test_exact_match_ends_where_the_format_ends(text: str, end: str, right: bool) -> None:
    assert exact_match(text, ["Rome", "Paris"], end) is right


@pytest.mark.parametrize(
    ("text", "end", "right"),
    [
        (" Washington, D.C., Peru ->", ", ", True),
        (" Washington, D.C.", ", ", True),
        (" Washington, Peru", ", ", False),
        (" Washington, D.C. is, Peru", ", ", False),
        (" Washington, D.C.\n\nQ:", "\n\n", True),
        (" C#### next", " ### ", True),
        (" C ### next", " ### ", False),
    ],
)
def test_an_answer_may_contain_what_ends_answers(text: str, end: str, right: bool) -> None:
    assert exact_match(text, ["Washington, D.C.", " C#"], end) is right


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
    assert (again.k, again.n, again.interval) == (6, 8, a.interval)
    assert (a.k, a.n, a.value) == (3, 4, 0.75)
    assert str(a) == "0.75 [0.30, 0.95]"
    assert a.as_dict()["correct"] == 3
    with pytest.raises(RangeError, match="3 of 2"):
        Accuracy(3, 2)
