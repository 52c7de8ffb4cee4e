"""The engine's page names only what there is."""

import re
from importlib import import_module
from pathlib import Path

import mia.engine

FOLDER = Path(mia.engine.__file__).parent
PAGE = (FOLDER / "README.md").read_text()


def test_the_files_that_the_page_names_are_there() -> None:
    tests = Path(__file__).parents[1]
    names = set(re.findall(r"`(\w+\.py)`", PAGE))
    files = {p.name for p in FOLDER.glob("*.py")} | {p.name for p in tests.rglob("test_*.py")}
    assert names <= files
    modules = {p.name for p in FOLDER.glob("*.py")} - {"__init__.py", "batch.py", "checks.py"}
    assert modules <= names  # and it leaves out none that has a story


def test_the_tests_that_hold_the_invariants_are_there() -> None:
    names = set(re.findall(r"`(test_\w+)`", PAGE))
    source = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert len(names) > 5
    assert {n for n in names if f"def {n}(" not in source} == set()


def test_the_names_that_the_page_uses_are_there() -> None:
    code = {p.stem: import_module(f"mia.engine.{p.stem}") for p in FOLDER.glob("[a-z]*.py")}
    owners = {name: getattr(m, name) for m in code.values() for name in vars(m)} | code
    for owner, name in re.findall(r"(?<![\w.])(\w+)\.(_?[a-z]\w+)\b(?!\.)", PAGE):
        if name in ("py", "md", "cpp"):
            continue
        holder = owners.get(owner)
        assert holder is not None or owner == "Model", f"{owner}.{name}"
        assert owner == "Model" or hasattr(holder, name), f"{owner}.{name}"
