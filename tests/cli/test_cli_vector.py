"""vector as a person types it: what it trains on, what it refuses, what it lists."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run

from mia.vectors import Vector, load


@pytest.fixture(autouse=True)
def pairs(folder: Path) -> None:
    (folder / "pos.txt").write_text("The cat sat\nsky is blue\n")
    (folder / "neg.txt").write_text("The dog sat\nsky is red\n")


@pytest.mark.parametrize("site", ["attn_pattern", "attn_scores"])
def test_sites_by_key_have_no_vectors(site: str) -> None:
    words = ("vector", "train", "pos.txt", "neg.txt", "-o", "v.safetensors", "--site", site)
    assert "one row a token" in refused(*words)


@pytest.mark.parametrize("site", ["l_out-2", "resid_post.2", "blocks.2.hook_resid_post"])
def test_a_sites_layer_is_the_layer(site: str) -> None:
    words = ("vector", "train", "pos.txt", "neg.txt", "-o", "v.gguf", "--site", site)
    run(*words)
    assert load("v.gguf").layers == [2]
    assert "names layers, and so does --layers" in refused(*words, "--layers", "1")
    far = site.replace("2", "9")
    message = f"'{far}': layer 9 is out of range; this model has 0 to 2"
    assert refused(*words[:-1], far) == message


@pytest.mark.parametrize(
    ("out", "site", "message"),
    [
        ("v.npy", "resid_post", "ends in .gguf or .safetensors"),
        ("v.gguf", "mlp_out", "is for resid_post"),
    ],
)
def test_the_file_is_checked_before_the_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, out: str, site: str, message: str
) -> None:
    monkeypatch.setenv("MIA_MODEL", "gone.gguf")
    words = ("vector", "train", "pos.txt", "neg.txt", "-o", out, "--site", site)
    assert message in refused(*words)


def test_a_vector_says_what_it_was_made_of() -> None:
    words = ("vector", "train", "pos.txt", "neg.txt", "-o", "v.gguf", "--no-bos")
    made = document(*words)
    found = load("v.gguf").metadata
    assert found["data"] == "pos.txt, neg.txt" and found["items"] == "0..1"
    assert found["data_sha256"].split() == [
        hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in ("pos.txt", "neg.txt")
    ]
    assert found["bos"] == "false"
    # layer 0 is not in the file, and not said to be
    assert [r["layer"] for r in made["layers"]] == load("v.gguf").layers == [1, 2]
    kept = document(*words, "--layer-zero")
    assert [r["layer"] for r in kept["layers"]] == load("v.gguf").layers == [0, 1, 2]


def test_convert_lists_what_is_in_the_file() -> None:
    Vector({i: np.ones(4, np.float32) for i in (0, 1)}).save("v.safetensors")
    converted = document("vector", "convert", "v.safetensors", "-o", "v.gguf")
    assert [r["layer"] for r in converted["layers"]] == [1]
