"""Records of a data file: lines of JSONL, items of a JSON array, rows of a CSV table."""

from __future__ import annotations

import csv
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from mia.errors import FileError
from mia.io.files import read_utf8

#: (where in the file, the record); error messages name the place
Record = tuple[str, Any]
#: half a character as JSON can spell it; whole ones are two halves
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_records(path: Path, label: str = "") -> list[Record]:
    """The records of a .csv, .json or .jsonl file; a JSON object is one record.

    Args:
        label: what an error calls the file; its path by default.

    Raises:
        FileError: the file cannot be read, a line is not JSON, or a text in it is not Unicode.
    """
    text = read_utf8(path, label)
    if path.suffix.lower() == ".csv":
        return _csv(text, path)
    records = _json(text, path)
    if _HALF.search(text):
        for where, record in records:
            _check_unicode(record, f"{path}, {where}")
    return records


def lines_of(text: str) -> dict[int, str]:
    """Lines that are not blank by their number, as an editor counts them: `str.splitlines` also
    ends one at a U+2028 or form feed."""
    return {n: x for n, x in enumerate(text.split("\n"), 1) if x.strip()}


def _json(text: str, path: Path) -> list[Record]:
    read = partial(json.loads, object_pairs_hook=partial(_object, path))
    lines = lines_of(text)
    try:
        whole = read(text)
    except RecursionError as err:
        raise FileError(f"{path} is nested too deep") from err
    except ValueError as err:
        # a broken array or object over several lines is no JSONL; the error names its line
        first = next(iter(lines.values()), "{}").strip()
        if not (first[0] == "{" and first[-1] == "}") and len(lines) > 1:
            raise FileError(f"{path} is not JSON: {err}") from err
        return [_line(n, line, path, read) for n, line in lines.items()]
    if isinstance(whole, list):
        return [(f"item {i}", record) for i, record in enumerate(whole)]
    return [(f"line {next(iter(lines))}", whole)]


def _line(n: int, line: str, path: Path, read: partial[Any]) -> Record:
    try:
        return f"line {n}", read(line)
    except RecursionError as err:
        raise FileError(f"{path}, line {n} is nested too deep") from err
    except ValueError as err:
        raise FileError(f"{path}, line {n} is not JSON: {err}") from err


def _check_unicode(record: Any, where: str) -> None:
    """Raises `FileError` where a text has half a character: "\\ud800"."""
    rest = [record]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as err:
                half = value[err.start]
                raise FileError(f"{where}: a text has {half!a}, which is no character") from err


def _object(path: Path, items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would keep the last of two values."""
    values: dict[str, Any] = {}
    for key, value in items:
        if key in values and values[key] != value:
            raise FileError(
                f"{path}: the key {key!r} has two values, {values[key]!r} and {value!r}"
            )
        values[key] = value
    return values


def _csv(text: str, path: Path) -> list[Record]:
    records = []
    try:
        for n, row in enumerate(csv.DictReader(io.StringIO(text)), 1):
            if None in row:  # the reader's key for fields without a header
                raise FileError(f"{path}, row {n} has more fields than the header; quote commas")
            records.append((f"row {n}", row))
    except csv.Error as err:
        raise FileError(f"{path} is not CSV that can be read: {err}") from err
    return records
