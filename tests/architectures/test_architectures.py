"""Every architecture beside transformers: what is read and what edits do, as the pages say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip(
    "torch", reason="torch is not installed (tests/architectures/requirements.txt)"
)
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (tests/architectures/requirements.txt)"
)
WANTED = "transformers==5."
if not f"transformers=={transformers.__version__}".startswith(WANTED):
    pytest.skip(f"the recipes are written for {WANTED}*", allow_module_level=True)

from architectures.compare import compare  # noqa: E402
from architectures.make import build  # noqa: E402
from architectures.recipes import RECIPES  # noqa: E402
from architectures.reference import Reference  # noqa: E402
from architectures.results import Row, load  # noqa: E402

KNOWN = {row.name: row for row in load()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models, made by a process of its own."""
    folder = tmp_path_factory.mktemp("architectures")
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    maker = [sys.executable, "-m", "architectures.make", str(folder)]
    subprocess.run(maker, check=True, env=environment, stdin=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def states(row: Row) -> dict[str, str]:
    return {name: cell.status for name, cell in row.cells().items()}


@pytest.mark.parametrize("name", RECIPES)
def test_an_architecture(name: str, files: Path) -> None:
    recipe = RECIPES[name]
    row = compare(recipe, Reference(recipe, build(recipe)), files / f"{name}.gguf")
    assert row.wrong == [] or "WRONG" in states(KNOWN[name]).values()
    assert states(row) == states(KNOWN[name]), "run scripts/make_architectures"
