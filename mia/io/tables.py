"""Records as a table of comma-separated values (RFC 4180, with line feeds)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mia.io.files import as_utf8, write_bytes


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes records, a line each under their names, whole or not at all. Raises `FileError`."""
    write_bytes(path, csv_text(rows).encode())


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV: the columns are all names, in the order in which they come up.

    A record within one becomes columns (`share.low`), a list JSON; None and NaN are empty. Text stays
    as it is, but for halves of characters, which UTF-8 has not.
    """
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(as_utf8, columns))
    writer.writerows([_cell(row.get(name)) for name in columns] for row in flat)
    return out.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (list, tuple, Mapping)):
        value = json.dumps(value)
    return as_utf8(str(value))
