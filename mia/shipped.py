"""Texts and word lists that come with mia, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

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
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise FileError(f"cannot read {source}: {reason}") from err


def read_lines(source: str | Path) -> list[str]:
    """Its lines that are not blank. Raises `FileError` where there is none."""
    found = [x for x in read_text(source).splitlines() if x.strip()]
    if not found:
        raise FileError(f"{source} is empty; a text for each line is needed")
    return found
