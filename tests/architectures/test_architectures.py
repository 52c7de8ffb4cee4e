"""Every architecture beside transformers: what is read and what edits do, as the pages say."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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
from architectures.early import ends_early  # noqa: E402
from architectures.make import build  # noqa: E402
from architectures.recipes import RECIPES  # noqa: E402
from architectures.reference import Reference  # noqa: E402
from architectures.results import Row, load  # noqa: E402
from mia.edits import Edit  # noqa: E402
from mia.engine import limits  # noqa: E402
from mia.llama import layer_inputs  # noqa: E402
from mia.model import Model  # noqa: E402
from mia.request import Capture, Request  # noqa: E402

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
def test_what_ends_early_is_the_same_to_the_last_bit(name: str, files: Path) -> None:
    """A capture that is all that is read, beside the same with logits, which runs every block."""
    ends_early(files / f"{name}.gguf")


@pytest.mark.parametrize("name", RECIPES)
def test_an_architecture(name: str, files: Path) -> None:
    recipe = RECIPES[name]
    row = compare(recipe, Reference(recipe, build(recipe)), files / f"{name}.gguf")
    assert row.wrong == [] or "WRONG" in states(KNOWN[name]).values()
    assert states(row) == states(KNOWN[name]), "run scripts/make_architectures"


@pytest.mark.parametrize("name", RECIPES)
def test_ends_of_blocks_are_read_behind_the_decode(
    name: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as at a stop of the graph, in every architecture that has a way; the others do
    not die of it."""
    rows = []
    for stops in (1 << 60, 1):
        monkeypatch.setattr(limits, "KEPT_STOPS", stops)
        with Model(files / f"{name}.gguf", threads=1) as model:
            names = {site.name for site in model.topology.sites}
            read = {"resid_pre", "resid_post", "attn_out", "final_norm"}
            reads = [str(site) for site in model.topology.sites if site.name in read]
            edits = [Edit("resid_post.1", "scale", coeff=0.5)] if "resid_post" in names else []
            captures = [Capture(reads, generated=True)]
            requests = [
                Request(tokens, e, captures, n_predict=4, stop_at_eog=False)
                for tokens in ([5, 9, 7, 3], [5, 9, 4])
                for e in ([], edits)
            ]
            results = [*model.run(requests), *(model.run([r])[0] for r in requests)]
            rows.append([(r.tokens, r.captures) for r in results])
            kept = any(s.kept.blocks for s in model._engine.sessions.open.values())
            can = model._llama.architecture in layer_inputs.ARCHITECTURES
            whole = {"resid_pre", "resid_post"} & names and stops == 1
            assert kept == bool(can and whole)
    for (tokens, stopped), (same, kept_rows) in zip(*rows, strict=True):
        assert tokens == same
        for site, a in stopped.items():
            np.testing.assert_array_equal(kept_rows[site], a, err_msg=f"{name} {site}")
