"""The bench still runs: what it measures is not asked here."""

import pytest
from tiny import Tiny

from benchmarks.__main__ import GROUPS
from benchmarks.harness import Bench

#: the other groups start processes and read prompts of the real model
ON_A_TINY_MODEL = ("heads", "sweep", "steer", "steering", "tasks")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")
@pytest.mark.parametrize("name", ON_A_TINY_MODEL)
def test_a_group_runs(name: str, llama: Tiny) -> None:
    bench = Bench(str(llama.path), rounds=1, quick=True, quiet=True)
    GROUPS[name](bench)
    assert bench.rows and all(row.values for row in bench.rows)
