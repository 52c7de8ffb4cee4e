"""Scores of answers, and shares of words."""

import numpy as np
import pytest

from mia.measure.metrics import FirstToken, exact_match, word_share


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


def test_word_share_counts_words_and_not_their_case() -> None:
    words = {"le", "chat", "l'eau", "été"}
    assert word_share("Le CHAT, et 3 l'eau! Été.", words) == pytest.approx(4 / 5)
    assert word_share("chats lechat", words) == 0
    assert word_share("123 !?", words) == 0 and word_share("", words) == 0
