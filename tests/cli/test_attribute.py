"""attribute: what it prints and draws, and how it refuses."""

from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run
from one_prompt import PROMPT
from oracle import Oracle


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


def test_attribute_adds_up(oracle: Oracle, tokens: list[int]) -> None:
    doc = document("attribute", "-p", PROMPT, "--answer", " France")
    logit = oracle.run(tokens)["logits"][-1][doc["answer"]["id"]]
    total = doc["embed"] + doc["bias"] + sum(doc["attn"]) + sum(doc["mlp"])
    assert abs(doc["logit"] - logit) < 1e-4 and abs(total - logit) < 1e-4
    assert doc["model"]["architecture"] == "llama" and doc["tokens"][0]["index"] == 0
    assert abs(doc["sum"] - logit) < 1e-4 and doc["soft_capped"] is False
    assert np.abs(np.asarray(doc["heads"]).sum(1) - doc["attn"]).max() < 1e-4
    lines = run("attribute", "-p", PROMPT, "--answer", " France", "-k", "1").stdout.splitlines()
    assert f"(the model's own logit: {doc['logit']:.4f})" in lines[-3]
    top = doc["top"][0]
    assert lines[-2] == f"heads: {top['layer']}.{top['head']} {top['value']:+.4f}"


def test_attribute_against_and_picture() -> None:
    words = ("attribute", "-p", PROMPT, "--answer", " France", "--against", " Italy")
    doc = document(*words, "--plot", "a.png")
    one, two = (
        document("attribute", "-p", PROMPT, "--answer", t)["logit"] for t in (" France", " Italy")
    )
    assert abs(doc["logit"] - (one - two)) < 1e-4 and doc["against"]["text"] == " Italy"
    assert Path("a.png").stat().st_size > 3000
    assert "the model's own difference" in run(*words).stdout


def test_attribute_refuses() -> None:
    same = ("attribute", "-p", PROMPT, "--answer", " France", "--against", " France")
    assert refused(*same) == "answer and against are the same token, ' France'"
    assert "tokens (" in refused("attribute", "-p", PROMPT, "--answer", " Berlin")
    assert "--token-idx '0,1' is 2 tokens, not one" in refused(
        "attribute", "-p", PROMPT, "--answer", " France", "--token-idx", "0,1"
    )
