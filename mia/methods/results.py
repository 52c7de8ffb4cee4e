"""Saved results on one page: maps, curves and tables, what made them, and how to make them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mia.errors import FileError, UsageError
from mia.io.files import read_utf8
from mia.io.runs import parse_run
from mia.methods.rerun import again
from mia.show.again import Again
from mia.show.report import Report
from mia.show.text import visible
from mia.show.views import is_known, result_parts, results_page


@dataclass(frozen=True, eq=False)
class Results(Report):
    """Saved results.

    Attributes:
        title: of the page.
        results: of each file its name, its document and the command line that made it, if that
            can be run again.
    """

    title: str
    results: Sequence[tuple[str, Mapping[str, Any], Again | None]]

    def document(self) -> dict[str, Any]:
        return {"title": self.title, "results": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for file, document, line in self.results:
            model = document.get("model")
            rows.append(
                {
                    "file": file,
                    "command": None if line is None else line.line(),
                    "model": model.get("name") if isinstance(model, Mapping) else None,
                }
            )
        return rows

    def plain(self) -> str:
        lines = [[r["file"], r["model"] or "no model", r["command"] or ""] for r in self.rows()]
        return "\n".join(visible("  ".join(filter(None, line))) for line in lines)

    def page(self, run: Mapping[str, Any] | None = None, again: Again | None = None) -> str:
        """All results below each other, each with its command."""
        return results_page(self.results, title=self.title)


def results(files: str | Path | Sequence[str | Path], *, title: str = "") -> Results:
    """Reads saved results: documents of a command or a report (`report.save("x.json")`).

    Args:
        files: their names; .jsonl are the rows of a sweep, finished or not.
        title: of the page.

    Raises:
        UsageError: no file.
        FileError: one that is no result.
    """
    names = [files] if isinstance(files, (str, Path)) else list(files)
    if not names:
        raise UsageError("give a result: the .json of a command")
    return Results(title or "Results", [_read(str(name)) for name in names])


def _read(file: str) -> tuple[str, Mapping[str, Any], Again | None]:
    document = _rows(file) if file.lower().endswith(".jsonl") else _document(file)
    try:
        result_parts(document)  # an error names the file
        line = again(parse_run(document["run"])) if "run" in document else None
    except (UsageError, FileError) as err:
        raise FileError(f"{file} is no result of a command: {err}") from err
    return file, document, line


def _document(file: str) -> dict[str, Any]:
    text = read_utf8(file)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise FileError(f"{file} is not JSON: {err}") from err
    if file.endswith(".jsonl.manifest.json"):
        raise FileError(f"{file} is of the rows beside it: give {file[: -len('.manifest.json')]}")
    if not isinstance(document, dict) or not is_known(document):
        raise FileError(f"{file} is no result of a command")
    return document


def _rows(file: str) -> dict[str, Any]:
    """The document of a sweep's rows, which may not be all there yet."""
    from mia.methods.sweep import load
    from mia.sweeps.manifest import read_manifest

    document, run = load(file).document(), read_manifest(file).get("run")
    return document if run is None else {**document, "run": run}
