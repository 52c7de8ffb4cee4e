"""perplexity and perplexity-sweep as a person types them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, refused, run
from oracle import Oracle

from mia.model import Model
from mia.vectors import load

pytestmark = pytest.mark.usefixtures("vector_files")
PROMPT = "The capital of France is"


def test_perplexity(path: Path) -> None:
    words = ("perplexity", "-p", "The cat sat on the red mat and the dog")
    got = document(*words, "--steer", "v.gguf", "--steer-coeff", "2")
    ids = [*_tokens(path, "The cat sat on the red mat and the dog")]
    oracle, v = Oracle(path), load("v.gguf")

    def value(edits: Any) -> float:
        x = oracle.run(ids, edits)["logits"][:-1]
        x = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return float(np.exp(-x[np.arange(len(x)), ids[1:]].mean()))

    plain = value(None)
    changed = value({f"resid_post.{i}": lambda x, i=i: x + 2 * v[i] for i in (1, 2)})
    assert got["perplexity"] == pytest.approx(plain, rel=1e-4)
    assert got["changed"] == pytest.approx(changed, rel=1e-4)
    assert got["ratio"] == pytest.approx(changed / plain, rel=1e-4)
    assert got["n_scored"] == len(ids) - 1
    assert "times as much" in run(*words, "--steer", "v.gguf").stdout
    assert "times as much" not in run(*words).stdout


def _tokens(path: Path, text: str) -> list[int]:
    with Model(path, threads=1) as m:
        return m.tokenize(text)


def test_perplexity_names_what_it_did() -> None:
    Path("long.txt").write_text("The cat sat on the red mat. " * 12)
    words = ("perplexity", "-f", "long.txt", "--steer", "v.gguf", "--steer-coeff", "2")
    got = document(*words, "--steer-layers", "2", "--window", "9999", "--ctx", "50")
    assert got["window"] == 50 and got["n_windows"] == -(-got["n_tokens"] // 50)
    assert got["steer"] == [{"vector": "v.gguf", "site": "resid_post", "layers": [2]}]
    assert got["coeff"] == 2 and got["stride"] is None
    result = run("perplexity", "-f", "long.txt", "--window", "9999", "--ctx", "50")
    assert "windows of up to 50" in result.stdout
    assert "window reduced to the context size, 50" in result.stderr
    slid = document(*words, "--window", "40", "--stride", "10")
    assert slid["stride"] == 10 and slid["n_windows"] > got["n_windows"]
    assert slid["n_scored"] == slid["n_tokens"] - 1
    run("save", "l_out-1", "c.safetensors", "-p", PROMPT)
    patch = ("--patch", "l_out-1", "c.safetensors", "1", "2")
    assert document("perplexity", "-f", "long.txt", *patch)["ratio"] > 0
    line = refused("perplexity", "-f", "long.txt", "--window", "40", *patch)
    assert "token-specific edits need a text that fits in one window" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steer-coeff", "2"), "--steer-coeff and --steer-layers need --steer"),
        (("--steer-coeff", "0"), "--steer-coeff and --steer-layers need --steer"),
        (("--steer-layers", "1"), "--steer-coeff and --steer-layers need --steer"),
        (("--window", "9", "--stride", "12"), "a stride of 12 is out of range"),
    ],
)
def test_perplexity_refuses(options: tuple[str, ...], message: str) -> None:
    assert message in refused("perplexity", "-p", PROMPT, *options)


def test_a_sweep_counts_its_lines_and_names_the_long_one() -> None:
    words = ("perplexity-sweep", "--on", "on.txt", "--steer", "v.gguf", "--no-bos")
    Path("on.txt").write_text("The cat is red\nsky is blue and red\n the\n")
    got = document(*words)
    assert got["sweep"]["on-topic"]["n_texts"] == 2 and got["sweep"]["on-topic"]["n_skipped"] == 1
    assert got["steer"][0]["vector"] == "v.gguf" and got["coeff"] == 1
    assert "on.txt: 1 of 3 lines have no token to score" in run(*words).stderr
    Path("on.txt").write_text("The cat is red\n\n" + "sky is blue " * 9)
    line = refused(*words, "--ctx", "20")
    assert line.startswith("on.txt, line 3: ") and line.endswith("the context holds 20")


def test_perplexity_by_layer() -> None:
    Path("on.txt").write_text("The cat is red\n\nsky is blue and red\n")
    Path("off.txt").write_text("Paris is in Rome\n")
    words = ("perplexity-sweep", "--on", "on.txt", "--off", "off.txt")
    got = document(*words, "--plus", " cat", "--coeff", "2")
    assert got["layers"] == [0, 1, 2] and set(got["sweep"]) == {"on-topic", "off-topic"}
    assert len(got["sweep"]["on-topic"]["ratio"]) == 3
    assert (got["plus"], got["minus"], got["coeff"]) == (" cat", " ", 2)
    by_vector = document(*words, "--steer", "v.gguf", "--coeff", "2")
    assert by_vector["layers"] == [1, 2]
    for ratio in by_vector["sweep"]["on-topic"]["ratio"]:
        assert ratio["low"] <= ratio["value"] <= ratio["high"] and ratio["n"] == 2
    one = document(*words, "--steer", "v.gguf", "--coeff", "2", "--layers", "2")
    assert one["sweep"]["off-topic"]["ratio"] == by_vector["sweep"]["off-topic"]["ratio"][1:]
    assert "on-topic ratio" in run(*words, "--steer", "v.gguf").stdout


def test_several_vectors_of_a_sweep_are_added_up() -> None:
    Path("on.txt").write_text("The cat is red\nsky is blue and red\n")
    words = ("perplexity-sweep", "--on", "on.txt")
    twice = document(*words, "--steer", "v.gguf", "--steer", "v.gguf")
    assert twice["sweep"] == document(*words, "--steer", "v.gguf", "--coeff", "2")["sweep"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steer", "v.gguf"), "needs texts"),
        (("--on", "on.txt"), "injects one thing"),
        (("--on", "on.txt", "--steer", "v.gguf", "--plus", "cat"), "injects one thing"),
        (("--on", "on.txt", "--steer", "v.gguf", "--minus", "cat"), "--minus needs --plus"),
        (("--on", "on.txt", "--steer", "v.gguf", "--coeff", "1,2"), "takes one coefficient"),
        (("--on", "gone.txt", "--steer", "v.gguf"), "there is no file gone.txt"),
        (("--on", "on.txt", "--steer", "v.gguf", "--plot", "x.txt"), "must end in"),
    ],
)
def test_a_sweep_refuses(words: tuple[str, ...], message: str) -> None:
    Path("on.txt").write_text("The cat is red\n")
    assert message in refused("perplexity-sweep", *words)


def test_a_sweep_draws() -> None:
    pytest.importorskip("matplotlib")
    Path("on.txt").write_text("The cat is red\nsky is blue and red\n")
    words = ("perplexity-sweep", "--on", "on.txt", "--steer", "v.gguf", "--plot", "t.png", "-q")
    run(*words)
    assert Path("t.png").read_bytes().startswith(b"\x89PNG")
