"""What child processes found out about a build of the library, remembered in mia's cache folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress

from mia.errors import FileError
from mia.io import files


def read_verdicts(name: str) -> dict[str, bool]:
    """The verdicts of a file of the cache folder, by what they are about; none if it cannot be read."""
    try:
        verdicts = json.loads((files.cache_folder() / name).read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home
        return {}
    if not isinstance(verdicts, dict):
        return {}
    return {str(k): v for k, v in verdicts.items() if isinstance(v, bool)}


def write_verdicts(name: str, verdicts: Mapping[str, bool]) -> None:
    """If nothing can be written, nothing is remembered."""
    with suppress(OSError, RuntimeError, FileError):
        file = files.cache_folder() / name
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, verdicts, own=True)
