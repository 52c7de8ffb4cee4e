"""Texts and word lists that come with mia, by name, and how a text file is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mia.errors import FileError


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
    path = find_text(source)
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors write a BOM
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise FileError(f"cannot read {source}: {reason}") from err


def read_lines(source: str | Path) -> list[str]:
    """Its lines that are not blank. Raises `FileError` where there is none."""
    found = [x for x in split_lines(read_text(source)) if x.strip()]
    if not found:
        raise FileError(f"{source} is empty; a text for each line is needed")
    return found


def split_lines(text: str) -> list[str]:
    """Lines as an editor counts them: `str.splitlines` also ends one at a U+2028 or form feed."""
    return text.removesuffix("\n").split("\n")


def read_rows(source: str | Path) -> list[tuple[str, Any]]:
    """(where, value) for each line of a JSONL file that is not blank, or for each item of a
    JSON array. Raises `FileError` naming the line that is no JSON."""
    text = read_text(source)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        return [(f"item {i}", row) for i, row in enumerate(whole)]
    rows = []
    for n, line in enumerate(split_lines(text), 1):
        if line.strip():
            try:
                rows.append((f"line {n}", json.loads(line)))
            except ValueError as err:
                raise FileError(f"{source}, line {n} is not JSON: {err}") from err
    return rows


def file_facts(paths: Sequence[Path]) -> dict[str, str]:
    """What a result says of the data that it was made of: the files' names and SHA-256."""
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
    return {"data": ", ".join(p.name for p in paths), "data_sha256": " ".join(hashes)}
