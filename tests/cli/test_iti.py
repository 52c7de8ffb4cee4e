"""iti as a person types it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run

from mia.vectors import load

pytestmark = pytest.mark.usefixtures("vector_files")
PROMPT = "The capital of France is"


def test_iti() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    got = document(
        "iti", "train", "ab.json", "-o", "i.safetensors", "--n-heads", "3", "--seed", "1"
    )
    assert (
        len(got["heads"]) == 3 and np.shape(got["accuracy"]) == (3, 6) and got["site"] == "head_out"
    )
    plain = run("iti", "train", "ab.json", "-o", "j.safetensors", "--n-heads", "2").stdout
    assert plain.startswith("probe accuracy of 18 heads")
    words = ("iti", "eval", "i.safetensors", "ab.json", "--alpha", "0,5")
    scores = document(*words, "--generate", "1", "-n", "3")
    assert [s["alpha"] for s in scores["scores"]] == [0, 5] and len(scores["answers"]) == 1
    assert scores["scores"][0]["mc2_change"] == {"value": 0, "low": 0, "high": 0, "n": 4}
    assert "change of MC2" in run(*words, "--generate", "1", "-n", "3").stdout
    steered = document("steer", "i.safetensors", "--coeff", "5", "-p", PROMPT, "-n", "2")
    assert steered["output"]
    other = refused("iti", "eval", "v.gguf", "ab.json")
    assert other == "v.gguf is a vector at resid_post; ITI needs one at head_out"
    inert = refused("iti", "eval", "i.safetensors", "ab.json", "-n", "3")
    assert inert == "--n-predict needs --generate N"
    assert "which .safetensors can hold" in refused("iti", "train", "ab.json", "-o", "i.gguf")
    assert "n_heads must be 1 to 18" in refused(
        "iti", "train", "ab.json", "-o", "k.safetensors", "--n-heads", "99"
    )


def test_a_vector_says_what_it_was_made_of_and_eval_what_it_asks_again() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    rows = [
        {"question": f"{x}?", "correct_answers": ["b"], "incorrect_answers": ["c"]}
        for x in ("cat", "dog", "red", "sky")
    ]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = ("iti", "train", "q.jsonl", "-o", "v.safetensors", "--n-heads", "2")
    run(*train, "--items", "..1", "--bos")
    found = load("v.safetensors").metadata
    assert found["data"] == "q.jsonl" and found["items"] == "0..1" and found["bos"] == "true"
    assert found["data_sha256"] == hashlib.sha256(Path("q.jsonl").read_bytes()).hexdigest()

    words = ("iti", "eval", "v.safetensors", "q.jsonl", "--items")
    more = ("2..", "--per-token", "--no-bos")
    assert run(*words, *more).stderr == ""
    held_out = document(*words, *more)
    assert held_out["vector"] == "v.safetensors" and held_out["items"] == "2..3"
    assert held_out["bos"] is False and held_out["per_token"] is True
    assert "trained on items 0..1 of this evaluation" in run(*words, "..2").stderr
    assert "give at least two" in refused(*words, "3")
