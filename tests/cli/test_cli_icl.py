"""task-vector, function-vector and soft-vector as a person types them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import refused, run
from typer.testing import Result

from mia import vectors

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NEXT = dict(zip(LETTERS, LETTERS[1:] + "a", strict=True))


@pytest.fixture(autouse=True)
def tasks(folder: Path) -> None:
    (folder / "next.json").write_text(json.dumps(NEXT))
    (folder / "before.json").write_text(json.dumps({b: a for a, b in NEXT.items()}))


SMALL = ("--shots", "2", "--format", "{input}:{output};", "--test", "6", "--dev", "4")


def _run(*words: str, code: int = 0) -> Result:
    return run(*words, *SMALL, code=code)


def _twice(*words: str) -> dict[str, Any]:
    """The JSON of a command, which a second run repeats."""
    first, second = (_run(*words, "--json").stdout for _ in range(2))
    assert first == second
    value: dict[str, Any] = json.loads(first)
    assert value["model"]["n_layer"] == 3
    return value


def test_task_vector() -> None:
    sets = ("--sets", "2", "--dummies", "3")
    made = _twice("task-vector", "extract", "next.json", "-o", "{name}.safetensors", *sets)
    row = made["vectors"][0]
    assert (row["task"], row["file"], row["seed"]) == ("next", "next.safetensors", 0)
    assert vectors.load("next.safetensors").metadata["layer"] == str(row["layer"])
    assert (
        "layer" in _run("task-vector", "extract", "next.json", "-o", "a.safetensors", *sets).stdout
    )

    saved = _twice("task-vector", "eval", "next.json", "--vector", "{name}.safetensors")
    fresh = _twice("task-vector", "eval", "next.json", "before.json", "--by-layer", *sets)
    assert saved["rows"][0]["vector"] == fresh["rows"][0]["vector"]
    assert list(fresh["rows"][0]["by_layer"]) == ["0", "1", "2"]
    both = _twice("task-vector", "eval", "next.json", "--repeats", "2", *sets)["rows"][0]
    assert both["vector"]["n"] == 12 and len(both["layers"]) == 2
    lines = _run("task-vector", "eval", "next.json", "before.json", *sets).stdout.splitlines()
    assert len(lines) == 4 and lines[0].startswith("task") and lines[3].startswith("mean")
    assert _run("task-vector", "eval", "next.json", "--match", "exact", *sets).stdout

    clash = _twice("task-vector", "conflict", "next.json", "before.json", *sets)
    assert clash["with_vector"]["vector"]["n"] == clash["without"]["examples"]["n"] > 0
    assert (
        "with the vector of before"
        in _run("task-vector", "conflict", "next.json", "before.json", *sets).stdout
    )


def test_function_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--prompts", "3", "--effect-prompts", "2", "--heads", "2,3")
    made = _twice("function-vector", "extract", "next.json", "-o", "v.safetensors", *small)
    row = made["vectors"][0]
    assert len(row["heads"]) in (2, 3) and np.shape(made["effects"])[0] == 3
    assert set(row["decoded"]) == {"raw", "norm"}
    plain = _run("function-vector", "extract", "next.json", "-o", "v.safetensors", *small).stdout
    assert "heads: " in plain and "decoded, with final norm: " in plain
    saved = _twice("function-vector", "eval", "next.json", "--vector", "v.safetensors")
    fresh = _twice("function-vector", "eval", "next.json", "--by-layer", *small)
    assert saved["rows"][0]["zero_shot_vector"] == fresh["rows"][0]["zero_shot_vector"]
    assert len(fresh["rows"][0]["by_layer"]) == 3
    assert "+ vector" in _run("function-vector", "eval", "next.json", *small).stdout

    from mia.datasets import tasks

    monkeypatch.setattr(
        tasks,
        "compositions",
        lambda: [tasks.Composition("c", "next.json", "before.json", "before.json", "next.json")],
    )
    composed = _twice(
        "function-vector", "compose", "c", "--prompts", "3", "--effect-prompts", "2", "--heads", "3"
    )
    assert composed["rows"][0]["direct"] == composed["rows"][0]["composed"]
    assert _run(
        "function-vector", "compose", "--prompts", "3", "--effect-prompts", "2", "--heads", "3"
    ).stdout


def test_options_of_vectors_are_heard() -> None:
    sets = ("--sets", "1", "--dummies", "2")
    eval_ = ("task-vector", "eval", "next.json")
    assert _twice(*eval_, "--layer", "1", *sets)["rows"][0]["layers"] == [1]
    printed = _run(*eval_, "--by-layer", *sets).stdout.splitlines()
    assert printed[3].split() == ["layer", "next"] and printed[-1].split()[0] == "2"

    small = ("--prompts", "3", "--effect-prompts", "2", "--heads", "3")
    fv_eval = ("function-vector", "eval", "next.json")
    _run("function-vector", "extract", "next.json", "-o", "v.safetensors", *small)
    loud = _twice(*fv_eval, "--vector", "v.safetensors", "--coeff", "4", "--layer", "0")["rows"][0]
    assert (loud["coeff"], loud["layer"]) == (4, 0)
    assert _twice(*fv_eval, "--layer", "2", *small)["rows"][0]["layer"] == 2
    by_layer = _run(*fv_eval, "--by-layer", *small).stdout
    assert "next, shuffled" in by_layer and "where ICL is right" in by_layer
    own = "next.json,before.json,before.json,next.json"
    row = _twice("function-vector", "compose", own, *small)["rows"][0]
    assert row["composition"] == "next.json" and row["direct"] == row["composed"]


def test_says_where_a_saved_vector_is_from() -> None:
    sets = ("--sets", "1", "--dummies", "2")
    _run("task-vector", "extract", "next.json", "-o", "v.safetensors", *sets)
    eval_ = ("task-vector", "eval", "next.json", "--vector", "v.safetensors")
    assert _run(*eval_).stderr == ""
    assert "another seed" in _run(*eval_, "--seed", "3").stderr
    other = _run("task-vector", "eval", "before.json", "--vector", "v.safetensors").stderr
    assert "was made for the task next" in other and other.count("\n") == 1
    theta = vectors.load("v.safetensors")
    meta = {**theta.metadata, "model_sha256": "0", "model": "x"}
    vectors.Vector(theta.directions, "resid_post", meta).save("v.safetensors")
    assert "was made on another model, x" in _run(*eval_).stderr
    wrong = _run("function-vector", "eval", "next.json", "--vector", "v.safetensors", code=1)
    assert wrong.stderr == "mia: v.safetensors is no function vector; it is a task vector\n"


def test_soft_vector() -> None:
    small = ("--evaluations", "60", "--population", "6", "--batch", "3", "--prompts", "3")
    made = _twice("soft-vector", "train", "next.json", "-o", "s.safetensors", *small)
    assert made["evaluations"] <= 60 and made["curve"]
    assert (
        "heads; s.safetensors"
        in _run("soft-vector", "train", "next.json", "-o", "s.safetensors", *small).stdout
    )
    found = _twice("soft-vector", "eval", "next.json", "s.safetensors", "--sparse", "--compare")
    assert [r["name"] for r in found["rows"]] == [
        "soft vector",
        "sparse",
    ] and "task_vector" in found
    assert "soft vector (" in _run("soft-vector", "eval", "next.json", "s.safetensors").stdout


@pytest.mark.parametrize("group", ["task-vector", "function-vector", "soft-vector"])
def test_draws(group: str) -> None:
    pytest.importorskip("matplotlib")
    words = {
        "task-vector": ("eval", "next.json", "--sets", "1", "--dummies", "2"),
        "function-vector": (
            "extract",
            "next.json",
            "-o",
            "v.safetensors",
            "--prompts",
            "2",
            "--effect-prompts",
            "1",
            "--heads",
            "2",
        ),
        "soft-vector": (
            "train",
            "next.json",
            "-o",
            "s.safetensors",
            "--evaluations",
            "40",
            "--population",
            "4",
            "--prompts",
            "2",
        ),
    }[group]
    _run(group, *words, "--plot", "p.svg")
    assert Path("p.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("task-vector", "eval", "nope"), "unknown task 'nope'"),
        (
            ("task-vector", "eval", "next.json", "--match", "some"),
            "unknown match 'some'; known: first, exact",
        ),
        (
            ("task-vector", "extract", "next.json", "before.json", "-o", "a.safetensors"),
            "2 tasks need 2 files",
        ),
        (("task-vector", "extract", "next.json", "-o", "a.gguf"), "must end in .safetensors"),
        (("task-vector", "eval", "next.json", "--plot", "a.txt"), "must end in .png, .svg, .pdf"),
        (
            ("function-vector", "extract", "next.json", "-o", "a.safetensors", "--heads", "0"),
            "not a whole number from 1 to 18",
        ),
        (("function-vector", "eval", "next.json", "--layer", "3"), "--layer 3 is out of range"),
        (("function-vector", "compose", "x"), "unknown composition 'x'"),
        (("function-vector", "compose", "a,b"), "'a,b' is no composition: AC,BC,BD,AD are four"),
        (("function-vector", "compose", "--heads", "99"), "--heads 99: tiny has 18 heads"),
        (
            ("function-vector", "eval", "next.json", "--vector", "v.safetensors", "--heads", "2"),
            "it does not go with --vector",
        ),
        (
            ("function-vector", "eval", "next.json", "--vector", "v.safetensors", "--coeff", "1,2"),
            "a saved vector takes one --coeff",
        ),
        (("task-vector", "eval", "next.json", "--layer", "77"), "layer 77 is out of range"),
        (
            ("soft-vector", "eval", "next.json", "none.safetensors", "--keep", "0.5"),
            "--keep is for --sparse or --sparse-out",
        ),
        (("task-vector", "eval", "next.json", "--known"), "next: after examples the model answers"),
        (
            ("soft-vector", "train", "next.json", "-o", "a.safetensors", "--optimiser", "x"),
            "unknown optimiser 'x'",
        ),
        (
            ("soft-vector", "eval", "next.json", "none.safetensors"),
            "there is no file none.safetensors",
        ),
    ],
)
def test_refusals_are_one_line(words: tuple[str, ...], message: str) -> None:
    assert message in refused(*words, *SMALL)
