"""task-vector as a person types it."""

from pathlib import Path

import pytest
from commands import refused
from letters import WORDS, run, twice, write_tasks

from mia import vectors

SETS = ("--sets", "2", "--dummies", "3")
ONE = ("--sets", "1", "--dummies", "2")
EVAL = ("task-vector", "eval", "next.json")


@pytest.fixture(autouse=True)
def tasks(folder: Path) -> None:
    write_tasks(folder)


def test_trains() -> None:
    document = twice("task-vector", "train", "next.json", "-o", "{name}.safetensors", *SETS)
    row = document["vectors"][0]
    assert (row["task"], row["file"], row["seed"]) == ("next", "next.safetensors", 0)
    assert vectors.load("next.safetensors").metadata["layer"] == str(row["layer"])
    result = run("task-vector", "train", "next.json", "-o", "a.safetensors", *SETS)
    assert result.stdout.startswith("next: layer ")
    assert result.stdout.endswith("on dev; a.safetensors\n")
    assert result.stderr == "mia: wrote a.safetensors\n"
    run("task-vector", "train", "next.json", "before.json", "-o", "{name}.safetensors", *ONE)
    assert vectors.load("before.safetensors").metadata["task"] == "before"


def test_evaluates() -> None:
    run("task-vector", "train", "next.json", "-o", "{name}.safetensors", *SETS)
    saved = twice(*EVAL, "--vector", "{name}.safetensors")
    new = twice(*EVAL, "before.json", "--by-layer", *SETS)
    assert saved["rows"][0]["vector"] == new["rows"][0]["vector"]
    assert list(new["rows"][0]["by_layer"]) == ["0", "1", "2"]
    assert new["rows"][0]["vector"].keys() == {"value", "low", "high", "correct", "n"}
    both = twice(*EVAL, "--repeats", "2", *SETS)["rows"][0]
    assert both["vector"]["n"] == 12 and len(both["layers"]) == 2
    lines = run(*EVAL, "before.json", *SETS).stdout.splitlines()
    assert len(lines) == 4 and lines[0].startswith("task") and lines[3].startswith("mean")
    assert run(*EVAL, "--match", "exact", *SETS).stdout
    printed = run(*EVAL, "--by-layer", *ONE).stdout.splitlines()
    assert printed[3].split() == ["layer", "next"] and printed[-1].split()[0] == "2"


def test_layers_are_those_tried_or_the_one_of_a_saved_vector() -> None:
    assert twice(*EVAL, "--layers", "1", *ONE)["rows"][0]["layers"] == [1]
    assert twice(*EVAL, "--layers", "0..1", *ONE)["rows"][0]["layer"] in (0, 1)
    run("task-vector", "train", "next.json", "-o", "v.safetensors", *ONE)
    saved = (*EVAL, "--vector", "v.safetensors", "--layers")
    assert twice(*saved, "2")["rows"][0]["layers"] == [2]
    refusal = refused(*saved, "0,2", *WORDS)
    assert refusal == "--layers '0,2': a saved vector is used at one layer"


def test_known_pairs_and_the_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from mia.methods.icl import IclExperiment

    monkeypatch.setattr(
        IclExperiment,
        "known",
        lambda ex: replace(ex.task, pairs=ex.task.pairs[:15], known_of=len(ex.task.pairs)),
    )
    row = twice(*EVAL, "--known", "--no-bos", *ONE)["rows"][0]
    assert (row["known_of"], row["bos"], sum(row["pairs"].values())) == (26, False, 15)
    assert twice(*EVAL, *ONE)["rows"][0]["bos"] is True


def test_conflict() -> None:
    words = ("task-vector", "conflict", "next.json", "before.json", *SETS)
    document = twice(*words)
    assert document["with_vector"]["vector"]["n"] == document["without"]["examples"]["n"] > 0
    assert "with the vector of before" in run(*words).stdout


def test_a_saved_vector_made_elsewhere_is_noticed() -> None:
    run("task-vector", "train", "next.json", "-o", "v.safetensors", *ONE)
    eval_ = (*EVAL, "--vector", "v.safetensors")
    assert run(*eval_).stderr == ""
    assert "another seed" in run(*eval_, "--seed", "3").stderr
    assert run(*eval_, "--seed", "3", "-q").stderr == ""
    other = run("task-vector", "eval", "before.json", "--vector", "v.safetensors").stderr
    assert "was made for the task next" in other and other.count("\n") == 1
    theta = vectors.load("v.safetensors")
    metadata = {**theta.metadata, "model_sha256": "0", "model": "x"}
    vectors.Vector(theta.directions, "resid_post", metadata).save("v.safetensors")
    assert "was made with another model, x" in run(*eval_).stderr
    wrong = run("function-vector", "eval", "next.json", "--vector", "v.safetensors", code=1)
    assert wrong.stderr == "mia: v.safetensors is not a function vector; it is a task vector\n"


def test_draws() -> None:
    pytest.importorskip("matplotlib")
    document = twice(*EVAL, *ONE, "--plot", "p.svg")
    assert Path("p.svg").read_text().startswith("<?xml")
    assert list(document["rows"][0]["by_layer"]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "nope"), "unknown task 'nope'"),
        (("train", "next.json", "before.json", "-o", "a.safetensors"), "2 tasks need 2 files"),
        (("train", "next.json", "-o", "a.gguf"), "must end in .safetensors"),
        (("train", "next.json", "-o", "no/a.safetensors"), "there is no folder no"),
        (("eval", "next.json", "--plot", "a.txt"), "must end in .png, .svg, .pdf"),
        (("eval", "next.json", "--layers", "77"), "--layers '77': layer 77 is out of range"),
        (("eval", "next.json", "--known"), "next: after examples the model answers"),
        (("eval", "next.json", "--format", "x"), "unknown format 'x'"),
        (
            ("eval", "next.json", "--vector", "x.safetensors", "--repeats", "2"),
            "it does not go with --vector",
        ),
        (
            ("eval", "next.json", "--vector", "x.safetensors", "--sets", "3"),
            "--sets is for a new vector; it does not go with --vector",
        ),
        (
            ("eval", "next.json", "--vector", "x.safetensors", "--dummies", "3"),
            "--dummies is for a new vector; it does not go with --vector",
        ),
        (("conflict", "next.json", "nope"), "unknown task 'nope'"),
    ],
)
def test_refusals_are_one_line(words: tuple[str, ...], message: str) -> None:
    options = (w for w in zip(WORDS[::2], WORDS[1::2], strict=True) if w[0] not in words)
    assert message in refused("task-vector", *words, *(w for pair in options for w in pair))


def test_an_unknown_match_is_a_usage_error() -> None:
    assert "invalid value for '--match'" in run(*EVAL, "--match", "some", code=2).stderr
