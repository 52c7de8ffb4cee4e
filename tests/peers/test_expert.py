"""The expert of `scripts/bench peers` against mia: one tiny llama in float32 in both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="torch is not installed (tests/peers/requirements.txt)")

from benchmarks.peers.jobs import JOBS, check, write_inputs  # noqa: E402
from benchmarks.peers.run_expert import Expert, Trie  # noqa: E402
from benchmarks.peers.run_mia import Mia  # noqa: E402
from benchmarks.peers.weights import export  # noqa: E402
from benchmarks.peers.worker import read_inputs  # noqa: E402


@pytest.fixture(scope="module")
def expert(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hf")
    export(tiny("llama").model, folder)
    with torch.inference_mode():
        return Expert(str(folder), "float32")


@pytest.mark.parametrize("name", JOBS)
def test_they_agree(name: str, llama: Tiny, expert: Any, tmp_path: Path) -> None:
    size = 48 if name == "capture" else None
    inputs = read_inputs(str(write_inputs(llama.model, name, tmp_path, size=size, whole=True)))
    with torch.inference_mode():
        want = getattr(expert, name)(inputs).arrays()
    got = getattr(Mia(llama.model), name)(inputs).arrays()
    outcome = check(JOBS[name], got, want, exact=True)
    assert outcome.right, outcome
    if name in ("patches", "heads"):
        assert np.ptp(want["values"]) > 0.1  # the interventions change something


def test_texts_share_what_they_begin_with() -> None:
    trie = Trie(np.array([[5, 6, 7], [5, 6, -1], [5, 8, 7]]))
    assert trie.tokens.tolist() == [5, 6, 7, 8, 7]
    assert trie.ends.tolist() == [2, 1, 4]
    assert trie.path.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 2], [0, 3, 0], [0, 3, 4]]
    assert trie.known.sum(1).tolist() == [1, 2, 3, 2, 3]
