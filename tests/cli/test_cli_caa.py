"""caa as a person types it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run

from mia.vectors import Vector, load


@pytest.fixture(autouse=True)
def items(folder: Path) -> None:
    rows = [
        {
            "question": f"{q}\n\nChoices:\n (A) yes\n (B) no",
            "answer_matching_behavior": "(A)",
            "answer_not_matching_behavior": "(B)",
        }
        for q in ("red?", "blue?", "cat?", "dog?")
    ]
    (folder / "ab.json").write_text(json.dumps(rows))


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
    assert same == (
        "mia: v.gguf was made from items 1..1 of this ab.json, which are asked again; give other "
        "--items\n"
    )
    # arithmetic keeps what its parts were made of
    assert "items 1..1 of" in run("caa", "eval", "2*v.gguf", "ab.json", "--items", "1..2").stderr
    Path("ab.json").write_text(Path("ab.json").read_text() + "\n")
    assert run("caa", "eval", "v.gguf", "ab.json").stderr == ""


def test_a_vector_of_another_model_is_said_to_be() -> None:
    facts = {"model": "other", "model_sha256": "0" * 64}
    Vector({1: np.ones(48, np.float32)}, metadata=facts).save("v.gguf")
    said = run("caa", "eval", "v.gguf", "ab.json").stderr
    assert said == "mia: v.gguf was made on another model, other\n"
    assert run("caa", "eval", "v.gguf", "ab.json", "-q").stderr == ""


def test_refused_before_the_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIA_MODEL", "gone.gguf")
    train = ("caa", "train", "ab.json", "-o")
    assert "ends in .gguf or .safetensors" in refused(*train, "v.txt")
    assert "--equal-norm is for several" in refused(*train, "v.gguf", "--equal-norm")
