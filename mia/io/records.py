"""Records: the results of long work as lines of JSON, kept while it is done, so that work that was
stopped goes on where it was.

The first line, the manifest, says what the work is. Each line after it is one result, and says to
which round it belongs and how many that has. Only whole rounds count: what a killed process has left
of another is cut off, and done again as it would have been.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mia.errors import FileError
from mia.io.files import check_writable, write_bytes
from mia.io.runs import writes_nothing
from mia.show.text import as_json

Line = dict[str, Any]


class Records:
    """The rounds of a file, and those to come.

    Attributes:
        rounds: the lines of each round that is done.
    """

    def __init__(self, path: str | Path | None, manifest: Mapping[str, Any]):
        """Opens the file, or begins it. Without a path, and in a replay, nothing is kept.

        Raises `FileError`: the file cannot be read or written, or is of other work.
        """
        self.path = None if path is None or writes_nothing() else check_writable(path)
        self.rounds: list[list[Line]] = []
        head = _line(manifest)
        #: where each round ends in the file, after the manifest
        self._ends = [len(head)]
        if self.path is None:
            return
        if not self.path.exists():
            write_bytes(self.path, head)
            return
        data = _read(self.path)
        first, *lines = data.split(b"\n")
        _compare(self.path, first, json.loads(head))
        self._ends = [len(first) + 1]
        for lines_of in _rounds(self.path, lines):
            self.rounds.append([json.loads(line) for line in lines_of])
            self._ends.append(self._ends[-1] + sum(len(line) + 1 for line in lines_of))
        if self._ends[-1] < len(data):
            os.truncate(self.path, self._ends[-1])
        elif self._ends[-1] > len(data):  # the manifest without its line end
            write_bytes(self.path, first + b"\n")

    def keep(self, n: int) -> None:
        """Leaves out all rounds behind the first n."""
        if n < len(self.rounds):
            del self.rounds[n:], self._ends[n + 1 :]
            if self.path is not None:
                os.truncate(self.path, self._ends[-1])

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes a round. Raises `FileError`."""
        number, of = len(self.rounds), len(lines)
        rows: list[Line] = [{"round": number, "of": of, **line} for line in lines]
        written = b"".join(map(_line, rows))
        self.rounds.append(rows)
        self._ends.append(self._ends[-1] + len(written))
        if self.path is None:
            return
        try:
            with self.path.open("ab") as file:
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            raise FileError(f"cannot write {self.path}: {err.strerror or err}") from err


def _line(value: Mapping[str, Any]) -> bytes:
    return (as_json(value) + "\n").encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise FileError(f"cannot read {path}: {err.strerror or err}") from err


def _compare(path: Path, line: bytes, manifest: Mapping[str, Any]) -> None:
    """Raises `FileError` if the file's first line is another manifest."""
    try:
        other = json.loads(line)
    except (ValueError, RecursionError):
        other = None
    if not isinstance(other, dict) or other.get("record") != manifest.get("record"):
        raise FileError(f"{path} is no record of this kind of work; give another file")
    for key in (*manifest, *other):
        if manifest.get(key) != other.get(key):
            raise FileError(
                f"{path} was made with another {key} ({_short(other.get(key))}, here it is "
                f"{_short(manifest.get(key))}); give another file, or remove it"
            )


def _short(value: Any) -> str:
    text = as_json(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _rounds(path: Path, lines: Sequence[bytes]) -> list[list[bytes]]:
    """The lines of each whole round, in order."""
    rounds: list[list[bytes]] = []
    current: list[bytes] = []
    for line in lines[:-1]:  # behind the last line end is nothing, or half a line
        try:
            value = json.loads(line)
            number, of = value["round"], value["of"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FileError(f"{path} has a line that is no result: {line[:60]!r}") from None
        if number != len(rounds):
            break
        current.append(line)
        if len(current) == of:
            rounds.append(current)
            current = []
    return rounds
