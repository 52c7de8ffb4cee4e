"""caa as a person types it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run

from mia.datasets.choices import load_items
from mia.methods import caa_evaluation
from mia.model import Model
from mia.vectors import Vector, load

pytestmark = pytest.mark.usefixtures("vector_files")
PROMPT = "The capital of France is"


def test_caa(path: Path) -> None:
    result = run("caa", "train", "ab.json", "-o", "{name}.gguf", "--items", "0..2")
    assert "ab.gguf: 3 items" in result.stdout
    assert load("ab.gguf").metadata["n_items"] == "3"
    words = (
        "caa",
        "eval",
        "ab.gguf",
        "ab.json",
        "--layers",
        "1,2",
        "--multipliers",
        "-2,2",
        "--items",
        "2..",
    )
    run(*words[:-1], "3..", code=1)
    got = document(*words)
    assert got["n_items"] == 2 and len(got["table"]) == 4
    with Model(path, threads=1) as m:
        table = caa_evaluation.matching(
            m, load("ab.gguf"), load_items("ab.json")[2:], layers=[1, 2], multipliers=[-2, 2]
        )
    assert [r["p_matching"] for r in got["table"]] == pytest.approx(
        table.means.ravel().tolist(), abs=1e-5
    )
    assert "without steering" in run(*words).stdout
    both = run(
        "caa",
        "train",
        "ab.json",
        "refuse_vs_comply",
        "--items",
        "0..1",
        "--equal-norm",
        "-o",
        "{name}.gguf",
        "-q",
    )
    assert "refuse_vs_comply.gguf: 2 items" in both.stdout
    assert load("ab.gguf").norms[1] == pytest.approx(
        load("refuse_vs_comply.gguf").norms[1], rel=1e-5
    )


def test_caa_refuses() -> None:
    assert "need 2 files" in refused("caa", "train", "ab.json", "refuse_vs_comply", "-o", "x.gguf")
    assert "there are 0 to 3" in refused(
        "caa", "train", "ab.json", "-o", "x.gguf", "--items", "2..9"
    )
    assert "is not a" in refused("caa", "train", "ab.json", "-o", "x.gguf", "--items", "some")
    assert "nor a shipped set" in refused("caa", "eval", "v.gguf", "gone.json")
    assert "must end in" in refused("caa", "eval", "v.gguf", "ab.json", "--plot", "x.txt")


def test_caa_draws() -> None:
    pytest.importorskip("matplotlib")
    run("caa", "eval", "v.gguf", "ab.json", "--layers", "1,2", "--plot", "t.png", "-q")
    assert Path("t.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def four(folder: Path) -> None:
    rows = [
        {
            "question": f"{q}\n\nChoices:\n (A) yes\n (B) no",
            "answer_matching_behavior": "(A)",
            "answer_not_matching_behavior": "(B)",
        }
        for q in ("red?", "blue?", "cat?", "dog?")
    ]
    (folder / "ab.json").write_text(json.dumps(rows))


@pytest.mark.usefixtures("four")
def test_a_vector_says_what_it_was_made_of_and_eval_what_it_asks_again() -> None:
    made = run("caa", "train", "ab.json", "-o", "v.gguf", "--items", "..1", "--no-bos")
    assert "v.gguf: 2 items, layers 1-2" in made.stdout
    found = load("v.gguf").metadata
    assert found["data"] == "ab.json" and found["items"] == "0..1" and found["bos"] == "false"
    assert found["data_sha256"] == hashlib.sha256(Path("ab.json").read_bytes()).hexdigest()

    words = ("caa", "eval", "v.gguf", "ab.json", "--items", "2..", "--by-text")
    assert run(*words).stderr == ""
    held_out = document(*words)
    assert held_out["vector"] == "v.gguf" and held_out["items"] == "2..3"
    assert held_out["bos"] is True and held_out["by_text"] is True
    same = run("caa", "eval", "v.gguf", "ab.json", "--items", "1..2").stderr
    assert same == ("mia: v.gguf was trained on items 1 of this evaluation; use held-out items\n")
    # arithmetic keeps what its parts were made of
    assert "items 1 of" in run("caa", "eval", "2*v.gguf", "ab.json", "--items", "1..2").stderr
    Path("ab.json").write_text(Path("ab.json").read_text() + "\n")
    assert run("caa", "eval", "v.gguf", "ab.json").stderr == ""


def test_a_vector_of_another_model_is_said_to_be() -> None:
    facts = {"model": "other", "model_sha256": "0" * 64}
    Vector({1: np.ones(48, np.float32)}, metadata=facts).save("v.gguf")
    said = run("caa", "eval", "v.gguf", "ab.json").stderr
    assert said == "mia: v.gguf was made with another model, other\n"
    assert run("caa", "eval", "v.gguf", "ab.json", "-q").stderr == ""


def test_refused_before_the_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIA_MODEL", "gone.gguf")
    train = ("caa", "train", "ab.json", "-o")
    assert "ends in .gguf or .safetensors" in refused(*train, "v.txt")
    assert "--equal-norm needs at least two behaviours" in refused(*train, "v.gguf", "--equal-norm")
