"""The command line is thin: commands parse, call the library once, and return a report."""

import ast
from pathlib import Path

import pytest

import mia.cli

FOLDER = Path(mia.cli.__file__).parent
GROUPS = sorted(p for p in FOLDER.glob("*.py") if not p.name.startswith("_"))


def test_the_command_line_is_small() -> None:
    assert (
        sum(len(p.read_text().splitlines()) for p in FOLDER.glob("*.py")) < 4400
    )  # 49 commands and their options


@pytest.mark.parametrize("path", GROUPS, ids=lambda p: p.stem)
def test_bodies_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < 40, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", GROUPS, ids=lambda p: p.stem)
def test_no_group_imports_another(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] + [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            part = name.removeprefix("mia.cli.")
            assert not name.startswith("mia.cli.") or part.startswith("_"), f"{path.name}: {name}"
