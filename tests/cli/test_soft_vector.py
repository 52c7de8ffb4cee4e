"""soft-vector as a person types it."""

from pathlib import Path
from typing import get_type_hints

import pytest
from commands import refused
from letters import WORDS, run, twice, write_tasks

from mia.cli import soft_vector, task_vector
from mia.methods import soft_vectors
from mia.methods.icl import Match
from mia.methods.optimisers import OptimiserName

SMALL = ("--evaluations", "60", "--population", "6", "--batch", "3", "--prompts", "3")
TRAIN = ("soft-vector", "train", "next.json", "-o", "s.safetensors", *SMALL)
EVAL = ("soft-vector", "eval", "next.json", "s.safetensors")


@pytest.fixture(autouse=True)
def tasks(folder: Path) -> None:
    write_tasks(folder)


def test_trains() -> None:
    document = twice(*TRAIN)
    assert document["evaluations"] <= 60 and document["curve"]
    assert document["training"]["population"] == 6 and document["file"] == "s.safetensors"
    result = run(*TRAIN, "--start", "0.5", "--optimiser", "es")
    assert "heads; s.safetensors" in result.stdout
    assert result.stderr == "mia: wrote s.safetensors\n"
    assert "blended; es" in soft_vectors.load("s.safetensors").metadata["method"]


def test_evaluates() -> None:
    run(*TRAIN)
    document = twice(*EVAL, "--sparse", "--compare")
    assert [r["name"] for r in document["rows"]] == ["soft vector", "sparse"]
    assert "task_vector" in document
    assert "soft vector (" in run(*EVAL).stdout
    result = run(*EVAL, "--sparse-out", "few.safetensors", "--keep", "0.5")
    assert "sparse (" in result.stdout and result.stderr == "mia: wrote few.safetensors\n"
    assert "sparsified" in soft_vectors.load("few.safetensors").metadata
    assert "another seed" in run(*EVAL, "--seed", "1").stderr


def test_draws() -> None:
    pytest.importorskip("matplotlib")
    run(*TRAIN, "--plot", "p.svg")
    assert Path("p.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "next.json", "none.safetensors"), "there is no file none.safetensors"),
        (
            ("eval", "next.json", "none.safetensors", "--keep", "0.5"),
            "--keep is for --sparse or --sparse-out",
        ),
        (
            ("eval", "next.json", "none.safetensors", "--sparse-out", "a.gguf"),
            "must end in .safetensors",
        ),
        (("train", "next.json", "-o", "a.safetensors", "--start", "2"), "start 2.0 is not in"),
        (("train", "next.json", "-o", "a.gguf"), "must end in .safetensors"),
    ],
)
def test_refusals_are_one_line(words: tuple[str, ...], message: str) -> None:
    assert message in refused("soft-vector", *words, *WORDS)


def test_choices_are_those_of_the_library() -> None:
    assert get_type_hints(soft_vector.train)["optimiser"] == OptimiserName
    assert get_type_hints(soft_vector.evaluate)["match"] == Match
    assert get_type_hints(task_vector.evaluate)["match"] == Match
    assert "invalid value for '--optimiser'" in run(*TRAIN, "--optimiser", "x", code=2).stderr
