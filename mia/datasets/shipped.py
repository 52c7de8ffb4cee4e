"""Data that comes with mia, by name: texts and contrast pairs, A/B questions, tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mia.datasets.reader import lines_of
from mia.errors import FileError, did_you_mean
from mia.io.files import read_utf8

#: the folders of `mia/data`: contrast pairs, texts and word lists; A/B questions; tasks
Kind = Literal["contrast", "ab", "tasks"]
_DATA = Path(__file__).parents[1] / "data"
_WORDS: dict[Kind, str] = {"contrast": "text", "ab": "set", "tasks": "task"}


def folder(kind: Kind) -> Path:
    return _DATA / kind


def names(kind: Kind) -> list[str]:
    """What is shipped of a kind: sentiment, french_words, neutral, …"""
    files = [f for f in folder(kind).iterdir() if f.name != "index.json"]
    return sorted(f.stem for f in files)


def find(source: str | Path, kind: Kind = "contrast") -> Path:
    """The file of shipped data by its name, or any other file by its path.

    Raises:
        FileError: neither; the message names what is shipped.
    """
    if str(source) in names(kind):
        files = folder(kind).glob(f"{source}.*")
        return next(f for f in files if f.name != "index.json")
    path = Path(source)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name that is too long, or of no characters
        there = False
    if not there:
        known = names(kind)
        near = did_you_mean(str(source), known) or ";"
        raise FileError(
            f"there is no file {source}, nor a shipped {_WORDS[kind]}{near} shipped: "
            f"{', '.join(known)}"
        )
    return path


def read_text(source: str | Path) -> str:
    """A shipped text, or that of a file. Raises `FileError`."""
    return read_utf8(find(source), str(source))


def read_lines(source: str | Path) -> dict[int, str]:
    """The lines of a text that are not blank, by their number. Raises `FileError` if it has
    none."""
    lines = lines_of(read_text(source))
    if not lines:
        raise FileError(f"{source} is empty; a text for each line is needed")
    return lines
