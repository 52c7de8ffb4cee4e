"""Contrast pairs: two texts that differ in one thing.

`load_pairs("sentiment")` reads a shipped set (`sentiment`, `french`, `weddings`) or a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mia.datasets.reader import read_records
from mia.datasets.selection import Selection, select
from mia.datasets.shipped import find, read_lines
from mia.errors import FileError, UsageError


@dataclass(frozen=True, slots=True)
class ContrastPair:
    """Two texts that differ in what a direction shall mean.

    `read_positive`, `read_negative`: token indices to read instead of the usual ones.
    """

    positive: str
    negative: str
    read_positive: int | None = None
    read_negative: int | None = None


def load_pairs(*sources: str | Path) -> list[ContrastPair]:
    """Pairs of a shipped set by name, of a JSONL, JSON or CSV file with `positive` and
    `negative`, or of two text files with one text per line.

    Raises:
        FileError: a file that cannot be read, is empty, or lacks a field.
        UsageError: two files with unequal numbers of lines, or a line blank in one only.
    """
    if len(sources) == 2:
        return _line_pairs(*sources)
    if len(sources) != 1:
        raise UsageError(f"pairs come from one file or two, got {len(sources)} files")
    path = find(sources[0])
    pairs = [_pair(row, f"{path}, {where}") for where, row in read_records(path)]
    if not pairs:
        raise FileError(f"{path} is empty; pairs have a positive and a negative text")
    return pairs


def select_pairs(*sources: str | Path) -> Selection[ContrastPair]:
    """`load_pairs`, with the files they come from."""
    pairs = load_pairs(*sources)
    return select(", ".join(map(str, sources)), pairs, [find(s) for s in sources])


def _line_pairs(positive: str | Path, negative: str | Path) -> list[ContrastPair]:
    """Line n of one file with line n of the other; two blank lines are no pair."""
    positives, negatives = read_lines(positive), read_lines(negative)
    # a blank line that is dropped from one file alone would pair all later texts wrongly
    for n in sorted(positives.keys() ^ negatives.keys()):
        if n <= min(max(positives), max(negatives)):
            blank, other = (negative, positive) if n in positives else (positive, negative)
            raise UsageError(f"{blank}, line {n} is blank, but that of {other} is not")
    if positives.keys() != negatives.keys():
        raise UsageError(
            f"{positive} has {len(positives)} texts and {negative} has {len(negatives)}; "
            "pairs need the same number of each"
        )
    return [ContrastPair(text, negatives[n]) for n, text in positives.items()]


def _pair(row: Any, where: str) -> ContrastPair:
    texts = []
    for key in ("positive", "negative"):
        text = row.get(key) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text:
            raise FileError(f"{where}: there is no text {key!r}")
        texts.append(text)
    reads: list[int | None] = []
    for key in ("read_positive", "read_negative"):
        value = row.get(key)
        if value in (None, ""):
            reads.append(None)
        elif isinstance(value, bool) or not re.fullmatch(r" *-?[0-9]{1,9} *", str(value)):
            raise FileError(f"{where}: {key} is {value!r:.60}, not a token index")
        else:
            reads.append(int(value))
    return ContrastPair(texts[0], texts[1], *reads)
