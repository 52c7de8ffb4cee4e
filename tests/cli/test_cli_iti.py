"""iti as a person types it."""

import hashlib
import json
from pathlib import Path

import pytest
from commands import document, refused, run

from mia.vectors import load


def test_a_vector_says_what_it_was_made_of_and_eval_what_it_asks_again() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    rows = [
        {"question": f"{x}?", "correct_answers": ["b"], "incorrect_answers": ["c"]}
        for x in ("cat", "dog", "red", "sky")
    ]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = ("iti", "train", "q.jsonl", "-o", "v.safetensors", "--heads", "2")
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
    assert "made from items 0..1 of this q.jsonl" in run(*words, "..2").stderr
    assert "give at least two" in refused(*words, "3")
