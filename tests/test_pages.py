"""The Python of the README and of the documentation: it compiles and its imports exist; what the
README and the guide show runs from top to bottom on the real model."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mia.methods.demo import SOURCE

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
GUIDES = ["README.md", "docs/guide/python.md", "docs/guide/sites-and-edits.md"]
GUIDES += ["docs/guide/steering.md"]


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


WITH_PYTHON = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_imports_exist(page: str) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block, page)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


def test_every_guide_has_python() -> None:
    assert set(GUIDES) <= set(WITH_PYTHON)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")
@pytest.mark.parametrize("page", GUIDES)
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("pandas") is None:  # only README and guide need it, for one line
        monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    names: dict[str, Any] = {"__name__": page, "EXAMPLES": SOURCE}
    for number, block in enumerate(blocks(page), 1):
        source = block.replace('Model("model.gguf")', 'Model("smollm2")')
        exec(compile(source, f"{page}, block {number}", "exec"), names)
