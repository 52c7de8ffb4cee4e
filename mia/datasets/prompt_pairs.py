"""Pairs of prompts for patching: a clean one and a corrupted one, with their answers.

A file is JSONL, JSON or CSV. Each record has `clean` and `corrupted`, and perhaps `answer` and `against`,
what should follow the clean prompt and what should not. Other names are read too:

| field       | also                                                     |
|-------------|----------------------------------------------------------|
| `clean`     | `clean_prompt`, `prompt`                                 |
| `corrupted` | `corrupt`, `corrupted_prompt`, `corrupt_prompt`          |
| `answer`    | `clean_answer`, `correct`; the first of `answers`        |
| `against`   | `corrupted_answer`, `wrong`; the second of `answers`     |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mia.datasets.reader import read_records
from mia.errors import FileError

_NAMES = {
    "clean": ("clean", "clean_prompt", "prompt"),
    "corrupted": ("corrupted", "corrupt", "corrupted_prompt", "corrupt_prompt"),
    "answer": ("answer", "clean_answer", "correct"),
    "against": ("against", "corrupted_answer", "wrong"),
}
_NEEDED = ("clean", "corrupted")


@dataclass(frozen=True, slots=True)
class PromptPair:
    """`answer` and `against` are empty where the file has none."""

    clean: str
    corrupted: str
    answer: str = ""
    against: str = ""


def load_prompt_pairs(path: str | Path) -> list[PromptPair]:
    """Raises `FileError`: the file cannot be read, is empty, or a record lacks a field."""
    path = Path(path)
    pairs = [_pair(record, f"{path}, {where}") for where, record in read_records(path)]
    if not pairs:
        raise FileError(f"{path} is empty; pairs have a clean and a corrupted prompt")
    return pairs


def _pair(record: Any, where: str) -> PromptPair:
    if not isinstance(record, dict):
        raise FileError(f"{where} is no object with the fields clean and corrupted")
    record = {**record, **_two_answers(record, where)}
    texts: dict[str, str] = {}
    for field, names in _NAMES.items():
        text = next((record[n] for n in names if record.get(n) not in (None, "")), "")
        if not isinstance(text, str) or (field in _NEEDED and not text):
            raise FileError(f"{where}: there is no text {field!r} ({', '.join(names)})")
        texts[field] = text
    return PromptPair(**texts)


def _two_answers(record: dict[str, Any], where: str) -> dict[str, Any]:
    answers = record.get("answers")
    if answers is None:
        return {}
    if not isinstance(answers, list) or not 1 <= len(answers) <= 2:
        raise FileError(f"{where}: answers is not a list of the right one and a wrong one")
    return dict(zip(("answer", "against"), answers, strict=False))
