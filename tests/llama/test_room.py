"""ctypes in one package, and that package's light modules light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mia
import mia.llama

ROOT = Path(mia.__file__).parent
#: what the other packages may import besides `mia.llama` itself
LIGHT = {
    "mia.llama.gguf_check",
    "mia.llama.gguf_file",
    "mia.llama.gguf_write",
    "mia.llama.weights",
    "mia.llama.c_numbers",
    "mia.llama.open_file",
    "mia.llama.probe",
    "mia.llama.trial",
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _outside() -> Iterator[tuple[str, str]]:
    """(file, imported module) of everything but mia/llama."""
    for path in ROOT.rglob("*.py"):
        if (ROOT / "llama") not in path.parents:
            for name in _imports(path):
                yield str(path.relative_to(ROOT)), name


def test_only_mia_llama_imports_ctypes_or_llama_cpp() -> None:
    foreign = ("ctypes", "llama_cpp", "_ctypes")
    assert [x for x in _outside() if x[1].split(".")[0] in foreign] == []


def test_the_others_come_in_by_the_door() -> None:
    inner = [x for x in _outside() if x[1].startswith("mia.llama.") and x[1] not in LIGHT]
    assert inner == []


@pytest.mark.parametrize("package", ["llama", "engine"])
def test_nothing_below_the_model_imports_it(package: str) -> None:
    above = ("mia.model", "mia.methods", "mia.lenses", "mia.cli", "mia.show", "mia.vectors")
    names = {n for path in (ROOT / package).glob("*.py") for n in _imports(path)}
    assert names and not [n for n in names if n.startswith(above)]


def test_a_look_at_a_header_loads_neither_ctypes_nor_numpy() -> None:
    code = "import sys, mia.llama.gguf_file; print([m for m in ('ctypes', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_name_of_the_door_is_there() -> None:
    assert set(mia.llama._MODULES) == set(mia.llama.__all__)
    for name in mia.llama.__all__:
        assert getattr(mia.llama, name).__class__.__name__ != "module"
