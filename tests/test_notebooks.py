"""The notebooks in examples/ run from top to bottom, and what they show can be shown."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
#: what takes long, and the same with fewer samples: cells are tried here, their numbers are not
SHORTER = {
    "steering.ipynb": {"samples=20": "samples=3", '("neutral"))[:512]': '("neutral"))[:64]'},
    "task_vectors.ipynb": {
        "n_test=40, n_dev=20": "n_test=8, n_dev=4",
        "sets=4, dummies=4": "sets=2, dummies=2",
    },
}


def run_notebook(file: Path, shorter: Mapping[str, str] | None = None) -> int:
    """Runs every code cell in one namespace; the number of cells. A cell that ends in an
    expression shows its value, as a notebook does."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for long, short in (shorter or {}).items():
        assert sum(long in source for source in sources) == 1, f"{file.name} has no {long}"
        sources = [source.replace(long, short) for source in sources]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources, 1):
        where = f"{file.name}, code cell {number}"
        body = ast.parse(source, where).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
            assert isinstance(getattr(value, "_repr_html_", value.__repr__)(), str | None), where
    return len(sources)


def test_a_notebook_that_fails_says_which_cell(tmp_path: Path) -> None:
    def write(*sources: str) -> Path:
        cells: list[dict[str, Any]] = [{"cell_type": "markdown", "source": ["# not code"]}]
        cells += [{"cell_type": "code", "source": s.splitlines(True)} for s in sources]
        file = tmp_path / "small.ipynb"
        file.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "cells": cells}))
        return file

    assert run_notebook(write("x = 1\nx", "assert x == 1", "")) == 3
    with pytest.raises(ZeroDivisionError) as error:
        run_notebook(write("x = 1", "y = 2\nx / 0"))
    assert str(error.traceback[-1].path).endswith("small.ipynb, code cell 2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")  # a notebook shows them
@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.name)
def test_a_notebook_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert run_notebook(file, SHORTER.get(file.name)) > 0
