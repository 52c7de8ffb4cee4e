"""Multiple-choice data: A/B questions, and questions with right and wrong answers."""

import json
from pathlib import Path

import numpy as np
import pytest

from mia.datasets.choices import (
    AbItem,
    Question,
    load_items,
    load_questions,
    select_items,
    select_questions,
)
from mia.datasets.shipped import names
from mia.errors import MiaError, RangeError

# -- A/B questions -------------------------------------------------------------------


def test_shipped_sets_are_large_enough_and_balanced() -> None:
    assert names("ab") == ["agree_vs_accurate", "refuse_vs_comply"]
    for name in names("ab"):
        items = load_items(name)
        assert len(items) >= 60
        assert {i.matching for i in items} == {"A", "B"}
        assert 0.4 < np.mean([i.matching == "A" for i in items]) < 0.6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is empty"),
        ("{}", "line 1: there is no text 'question'"),
        ("[1", "is not JSON"),
        ('[{"question": "q"}]', "item 0: there is no text 'answer_matching_behavior'"),
        (
            json.dumps(
                [
                    {
                        "question": "q",
                        "answer_matching_behavior": "(A)",
                        "answer_not_matching_behavior": "A",
                    }
                ]
            ),
            "not two letters",
        ),
    ],
)
def test_broken_items_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(MiaError, match=message):
        load_items(tmp_path / "d.json")
    with pytest.raises(MiaError, match="nor a shipped set; shipped: agree_vs_accurate"):
        load_items(tmp_path / "gone.json")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    row = {
        "question": "q",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": " (B)",
    }
    (tmp_path / "d.json").write_text("\ufeff" + json.dumps([row]), encoding="utf-8")
    assert load_items(tmp_path / "d.json") == [AbItem("q", "A", "B")]


def test_some_items_of_a_set() -> None:
    some = select_items("agree_vs_accurate", "3,5..6")
    assert some.range == "3,5..6" and some.name == "agree_vs_accurate"
    assert some.items == tuple(load_items("agree_vs_accurate")[i] for i in (3, 5, 6))
    assert some.metadata()["data"] == "agree_vs_accurate.json"
    assert select_questions("agree_vs_accurate", "3").items[0].question in some.items[0].question
    with pytest.raises(RangeError, match="item 999 is out of range; there are 0 to"):
        select_items("agree_vs_accurate", "999")


# -- questions with answers ----------------------------------------------------------


def test_questions_from_files(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"question": "a?", "correct_answers": ["b"], "incorrect_answers": ["c", "d"]}\n\n'
    )
    assert load_questions(tmp_path / "q.jsonl") == [Question("a?", ("b",), ("c", "d"))]
    shipped = load_questions("agree_vs_accurate")
    assert len(shipped) >= 60
    assert shipped[0].correct[0].startswith("No, it is the earth that turns")
    assert shipped[0].incorrect[0].startswith("Yes, you're right")
    assert "Choices" not in shipped[0].question


def _row(**changes: object) -> str:
    """A line of JSONL, as it should be but for the changes."""
    row = {"question": "a?", "correct_answers": ["b"], "incorrect_answers": ["c"], **changes}
    return json.dumps(row, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ("1", "line 1: there is no text 'question'"),
        (_row(question=3), "line 1: there is no text 'question'"),
        (_row(question=" "), "line 1: there is no text 'question'"),
        (_row(correct_answers="yes"), "line 1: 'correct_answers' is 'yes'; a list of texts"),
        (_row(correct_answers=[]), r"line 1: 'correct_answers' is \[\]; a list of texts"),
        (_row(incorrect_answers=None), "line 1: 'incorrect_answers' is None; a list of texts"),
        (_row() + "\n" + _row(incorrect_answers=["b", " "]), r"line 2: 'incorrect_answers' is"),
        (_row(correct_answers=[1]), r"line 1: 'correct_answers' is \[1\]"),
        (_row(best_answer=["b"]), r"line 1: 'best_answer' is \['b'\]; a text is needed"),
    ],
)
def test_broken_questions_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(MiaError, match=message) as err:
        load_questions(tmp_path / "q.jsonl")
    assert "\n" not in str(err.value)
    with pytest.raises(MiaError, match=r"no file .*gone.jsonl"):
        load_questions(tmp_path / "gone.jsonl")


def test_the_best_answer_comes_first(tmp_path: Path) -> None:
    rows = [
        _row(correct_answers=["b", "c", "d"], best_answer="c"),
        _row(correct_answers=["b"], best_answer="the best"),
        _row(correct_answers=["b"], best_answer=None),
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    found = [q.correct for q in load_questions(tmp_path / "q.jsonl")]
    assert found == [("c", "b", "d"), ("the best", "b"), ("b",)]


def test_a_byte_order_mark_is_no_part_of_a_question(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\ufeff" + _row(question="a\u2028b?"), encoding="utf-8")
    assert load_questions(tmp_path / "q.jsonl") == [Question("a\u2028b?", ("b",), ("c",))]
