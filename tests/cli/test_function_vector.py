"""function-vector as a person types it."""

from pathlib import Path

import numpy as np
import pytest
from commands import refused
from letters import WORDS, run, twice, write_tasks

from mia import vectors
from mia.datasets import tasks as data

SMALL = ("--prompts", "3", "--effect-prompts", "2")
EVAL = ("function-vector", "eval", "next.json")
TRAIN = ("function-vector", "train", "next.json", "-o", "v.safetensors", *SMALL)
COMPOSE = ("function-vector", "compose", *SMALL, "--n-heads", "3")


@pytest.fixture(autouse=True)
def tasks(folder: Path) -> None:
    write_tasks(folder)


def test_trains() -> None:
    document = twice(*TRAIN, "--n-heads", "2,3", "-k", "4")
    row = document["vectors"][0]
    assert len(row["heads"]) in (2, 3) and np.shape(document["effects"])[0] == 3
    assert set(row["decoded"]) == {"raw", "norm"} and len(row["decoded"]["raw"]) == 4
    heads = [f"{h['layer']}.{h['head']}" for h in row["heads"]]
    assert vectors.load("v.safetensors").metadata["heads"] == ", ".join(heads)
    result = run(*TRAIN, "--n-heads", "2,3")
    assert "heads: " in result.stdout and "decoded, with final norm: " in result.stdout
    assert result.stderr == "mia: wrote v.safetensors\n"


def test_evaluates() -> None:
    run(*TRAIN, "--n-heads", "2,3")
    saved = twice(*EVAL, "--vector", "v.safetensors")
    new = twice(*EVAL, "--by-layer", *SMALL, "--n-heads", "2,3")
    assert saved["rows"][0]["zero_shot_vector"] == new["rows"][0]["zero_shot_vector"]
    assert len(new["rows"][0]["by_layer"]) == 3
    printed = run(*EVAL, "--by-layer", *SMALL).stdout
    assert "+ vector" in printed and "where ICL is right" in printed
    assert "next, shuffled" in printed


def test_layers_and_coefficients() -> None:
    run(*TRAIN, "--n-heads", "3")
    loud = twice(*EVAL, "--vector", "v.safetensors", "--coeff", "4", "--layers", "0")["rows"][0]
    assert (loud["coeff"], loud["layer"]) == (4, 0)
    small = (*EVAL, *SMALL, "--n-heads", "3")
    assert twice(*small, "--layers", "2")["rows"][0]["layer"] == 2
    assert twice(*small, "--layers", "1..2", "--coeff", "2,3")["rows"][0]["coeff"] in (2, 3)


def test_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    own = "next.json,before.json,before.json,next.json"
    row = twice(*COMPOSE, own)["rows"][0]
    assert row["composition"] == "next.json" and row["direct"] == row["composed"]
    composition = data.Composition("c", *own.split(","))
    monkeypatch.setattr(data, "compositions", lambda: [composition])
    assert twice(*COMPOSE, "c")["rows"][0]["composed"] == row["composed"]
    lines = run(*COMPOSE).stdout.splitlines()
    assert lines[0].startswith("composition") and lines[1].split()[:2] == ["c", "next"]


@pytest.mark.parametrize("words", [(*TRAIN, "--n-heads", "2"), (*EVAL, *SMALL, "--n-heads", "2")])
def test_draws(words: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    run(*words, "--plot", "p.svg")
    assert Path("p.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("train", "next.json", "-o", "a.safetensors", "--n-heads", "0"),
            "--n-heads '0': '0' is not a whole number from 1 to 18",
        ),
        (("eval", "next.json", "--layers", "3"), "--layers '3': layer 3 is out of range"),
        (("eval", "next.json", "--coeff", "x"), "--coeff 'x' is not a number"),
        (("compose", "x"), "unknown composition 'x'"),
        (("compose", "a,b"), "'a,b' is not a composition; expected four"),
        (("compose", "a,b,c,d"), "unknown task 'a'"),
        (("compose", "--n-heads", "99"), "n_heads must be 1 to 18, got 99"),
        (
            ("eval", "next.json", "--vector", "v.safetensors", "--n-heads", "2"),
            "it does not go with --vector",
        ),
        (
            ("eval", "next.json", "--vector", "v.safetensors", "--prompts", "3"),
            "--prompts is for a new vector; it does not go with --vector",
        ),
        (
            ("eval", "next.json", "--vector", "v.safetensors", "--effect-prompts", "3"),
            "--effect-prompts is for a new vector; it does not go with --vector",
        ),
        (
            ("eval", "next.json", "--vector", "v.safetensors", "--coeff", "1,2"),
            "a saved vector takes one --coeff",
        ),
        (
            ("eval", "next.json", "--vector", "v.safetensors", "--layers", "0..1"),
            "--layers '0..1': a saved vector is used at one layer",
        ),
    ],
)
def test_refusals_are_one_line(words: tuple[str, ...], message: str) -> None:
    assert message in refused("function-vector", *words, *WORDS)
