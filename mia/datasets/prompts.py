"""Prompts of a file, each perhaps with an answer of its own.

A .jsonl, .json or .csv has records with `prompt`, and perhaps `answer` and `against`: what should follow
and what should not. Any other file is a text with one prompt per line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mia.datasets.reader import read_records
from mia.datasets.shipped import read_lines
from mia.errors import FileError

_RECORDS = (".jsonl", ".json", ".csv")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, a text or token ids; `answer` and `against` are empty where none are given."""

    prompt: str | Sequence[int]
    answer: str = ""
    against: str = ""


def load_prompts(path: str | Path) -> list[Prompt]:
    """Raises `FileError`: the file cannot be read, is empty, or a record has no prompt."""
    if Path(path).suffix.lower() not in _RECORDS:
        return [Prompt(line) for line in read_lines(path).values()]
    path = Path(path)
    prompts = [_prompt(record, f"{path}, {where}") for where, record in read_records(path)]
    if not prompts:
        raise FileError(f"{path} is empty; a prompt is needed")
    return prompts


def _prompt(record: Any, where: str) -> Prompt:
    if not isinstance(record, dict):
        raise FileError(f"{where} is no object with the field prompt")
    texts = {name: record.get(name) or "" for name in ("prompt", "answer", "against")}
    for name, text in texts.items():
        if not isinstance(text, str) or (name == "prompt" and not text):
            raise FileError(f"{where}: there is no text {name!r}")
    return Prompt(**texts)
