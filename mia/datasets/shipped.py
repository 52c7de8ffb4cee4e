"""Texts and word lists that come with mia, by name, and how a text file is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mia.errors import FileError
from mia.io.files import file_sha256, read_utf8


def contrast_names() -> list[str]:
    """Contrast pairs, texts and word lists: sentiment, french_words, neutral, …"""
    folder = resources.files("mia") / "data" / "contrast"
    return sorted(f.name.rpartition(".")[0] for f in folder.iterdir())


def find_text(source: str | Path) -> Path:
    """A file, or a shipped one by its name without an ending.

    Raises:
        FileError: neither; the message names what is shipped.
    """
    path = Path(source)
    if path.exists():
        return path
    folder = Path(str(resources.files("mia"))) / "data" / "contrast"
    for ending in (".jsonl", ".txt"):
        if path.name == str(source) and (folder / (path.name + ending)).is_file():
            return folder / (path.name + ending)
    raise FileError(
        f"there is no file {source}, nor a shipped text; shipped: {', '.join(contrast_names())}"
    )


def read_text(source: str | Path) -> str:
    """The text of `find_text`. Raises `FileError` where it cannot be read."""
    return read_utf8(find_text(source), str(source))


def lines_of(text: str) -> dict[int, str]:
    """Lines that are not blank by their number, as an editor counts them: `str.splitlines` also
    ends one at a U+2028 or form feed."""
    return {n: x for n, x in enumerate(text.split("\n"), 1) if x.strip()}


def read_lines(source: str | Path) -> dict[int, str]:
    """`lines_of` a text. Raises `FileError` where it has none."""
    found = lines_of(read_text(source))
    if not found:
        raise FileError(f"{source} is empty; a text for each line is needed")
    return found


def json_lines(
    text: str, source: str | Path, read: Callable[[str], Any] = json.loads
) -> list[tuple[str, Any]]:
    """(where, value) for each line that is not blank. Raises `FileError` naming the line that
    is no JSON."""
    rows = []
    for n, line in lines_of(text).items():
        try:
            rows.append((f"line {n}", read(line)))
        except ValueError as err:
            raise FileError(f"{source}, line {n} is not JSON: {err}") from err
    return rows


def read_rows(source: str | Path) -> list[tuple[str, Any]]:
    """`json_lines`, or (where, value) for each item of a JSON array. Raises `FileError`."""
    text = read_text(source)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        return [(f"item {i}", row) for i, row in enumerate(whole)]
    return json_lines(text, source)


def file_facts(paths: Sequence[Path]) -> dict[str, str]:
    """What a result says of the data that it was made of: the files' names and SHA-256."""
    return {
        "data": ", ".join(p.name for p in paths),
        "data_sha256": " ".join(map(file_sha256, paths)),
    }
