"""Multiple-choice data: A/B questions of a behaviour, and questions with right and wrong answers.

`load_items("agree_vs_accurate")` reads a shipped set of A/B questions, or a JSON file as the
CAA repository has them. `load_questions` reads JSONL as TruthfulQA has it, or A/B questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mia.datasets.reader import read_records
from mia.datasets.selection import Selection, select
from mia.datasets.shipped import find
from mia.errors import FileError, UsageError
from mia.ranges import Ranges


@dataclass(frozen=True, slots=True)
class AbItem:
    """A question with two choices; the letters of the answer that shows the behaviour, and of
    the other."""

    question: str
    matching: str
    other: str

    def choices(self) -> tuple[str, str, str]:
        """The question without its choices, and the texts of the matching and the other one.

        Raises `UsageError` if the question does not list them.
        """
        head, _, listed = self.question.partition("\n\nChoices:")
        texts = {}
        for line in listed.splitlines():
            letter, _, text = line.strip().partition(")")
            texts[letter.strip("( ")] = text.strip()
        if not texts.get(self.matching) or not texts.get(self.other):
            raise UsageError(
                f"an item lists no choices ({self.matching}) and ({self.other}): {head[:60]!r}"
            )
        return head, texts[self.matching], texts[self.other]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with answers that are right, the best one first, and answers that are not."""

    question: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]


# -- A/B questions -------------------------------------------------------------------


def load_items(source: str | Path) -> list[AbItem]:
    """A/B questions of a shipped set by name, or of a file.

    Raises:
        FileError: no such file, no such JSON, or no items in it.
    """
    items = [_item(row, f"{source}, {where}") for where, row in read_records(find(source, "ab"))]
    if not items:
        raise FileError(f"{source} is empty; a list of questions is needed")
    return items


def select_items(source: str | Path, items: Ranges | None = None) -> Selection[AbItem]:
    """Some A/B questions (`mia.ranges`), with the file they come from."""
    return select(str(source), load_items(source), [find(source, "ab")], items)


def _item(row: object, where: str) -> AbItem:
    values = []
    for key in ("question", "answer_matching_behavior", "answer_not_matching_behavior"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise FileError(f"{where}: there is no text {key!r}")
        values.append(value)
    letters = [v.strip().strip("()").strip() for v in values[1:]]
    if any(len(x) != 1 for x in letters) or letters[0] == letters[1]:
        raise FileError(
            f"{where}: the answers are {values[1]!r} and {values[2]!r}, not two letters like (A)"
        )
    return AbItem(values[0], *letters)


# -- questions with answers ----------------------------------------------------------


def load_questions(source: str | Path) -> list[Question]:
    """Questions of a JSONL file with `question`, `correct_answers`, `incorrect_answers` (lists)
    and perhaps `best_answer`, or of A/B questions, whose matching answer is the incorrect one.

    Raises:
        FileError: no such file, a missing field, or nothing in it.
    """
    path = find(source, "ab")
    if path.suffix.lower() != ".jsonl":
        return [_from_ab(item) for item in load_items(source)]
    questions = [_question(row, f"{path}, {where}") for where, row in read_records(path)]
    if not questions:
        raise FileError(f"{path} is empty; a question for each line is needed")
    return questions


def select_questions(source: str | Path, items: Ranges | None = None) -> Selection[Question]:
    """Some questions (`mia.ranges`), with the file they come from."""
    return select(str(source), load_questions(source), [find(source, "ab")], items)


def _question(row: Any, where: str) -> Question:
    row = row if isinstance(row, dict) else {}
    question = row.get("question")
    if not _is_text(question):
        raise FileError(f"{where}: there is no text 'question'")
    answers = []
    for key in ("correct_answers", "incorrect_answers"):
        value = row.get(key)
        if not isinstance(value, list) or not value or not all(map(_is_text, value)):
            raise FileError(f"{where}: {key!r} is {value!r:.60}; a list of texts is needed")
        answers.append(value)
    best = row.get("best_answer")
    if best is not None:
        if not _is_text(best):
            raise FileError(f"{where}: 'best_answer' is {best!r:.60}; a text is needed")
        # MC1 asks for the first one
        answers[0] = [best, *(a for a in answers[0] if a.strip() != best.strip())]
    return Question(question, tuple(answers[0]), tuple(answers[1]))


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _from_ab(item: AbItem) -> Question:
    question, matching, other = item.choices()
    return Question(question, (other,), (matching,))
