"""vector as a person types it: what it trains on, what it refuses, what it lists."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run
from oracle import Oracle

from mia.model import Model
from mia.vectors import Vector, load

pytestmark = pytest.mark.usefixtures("vector_files")
PROMPT = "The capital of France is"


def test_train_show_combine_convert(path: Path) -> None:
    result = run("vector", "train", "pairs.jsonl", "-o", "t.gguf")
    assert "layer 0 is left out" in result.stderr and "wrote t.gguf" in result.stderr
    t = load("t.gguf")
    assert t.layers == [1, 2] and t.name == "t" and t.metadata["n_pairs"] == "2"
    oracle = Oracle(path)
    with Model(path, threads=1) as m:
        rows = [
            oracle.run(m.tokenize(a))["resid_post.2"][-1]
            - oracle.run(m.tokenize(b))["resid_post.2"][-1]
            for a, b in (("The cat sat", "The dog sat"), ("sky is blue", "sky is red"))
        ]
        np.testing.assert_allclose(t[2], np.mean(rows, 0), atol=1e-4)

    shown = document("vector", "show", "t.gguf", "-k", "3")
    assert [r["layer"] for r in shown["layers"]] == [1, 2]
    scores = oracle.lens(t[2][None])[0]
    with Model(path, threads=1) as m:
        assert shown["layers"][1]["toward"] == [m.piece(int(i)) for i in np.argsort(-scores)[:3]]
        assert shown["layers"][1]["away"] == [m.piece(int(i)) for i in np.argsort(scores)[:3]]
    assert shown["layers"][1]["norm"] == pytest.approx(t.norms[2], abs=1e-5)
    assert "n_pairs: 2" in run("vector", "show", "t.gguf", "-k", "0").stdout

    run("vector", "combine", "t.gguf - 0.5*v.gguf", "-o", "c.safetensors", "-q")
    np.testing.assert_allclose(load("c.safetensors")[1], t[1] - 0.5 * load("v.gguf")[1], atol=1e-6)
    found = json.loads(run("vector", "convert", "c.safetensors", "-o", "c.gguf", "--json").stdout)
    assert found["file"] == "c.gguf" and found["name"] == "t - 0.5*v"
    np.testing.assert_array_equal(load("c.gguf")[2], load("c.safetensors")[2])
    run("vector", "combine", "c.gguf", "-o", "u.gguf", "--unit", "-q")
    assert load("u.gguf").norms[2] == pytest.approx(1)


def test_train_options(path: Path) -> None:
    got = document(
        "vector", "train", "pairs.jsonl", "-o", "t.safetensors", "--site", "ffn_out", "--method", "pca",
        "--read", "mean", "--layers", "0,2", "--no-bos",
    )  # fmt: skip
    assert got["site"] == "mlp_out" and [r["layer"] for r in got["layers"]] == [0, 2]
    assert got["metadata"]["aggregator"] == "pca" and got["metadata"]["read"] == "mean"
    assert [r["norm"] for r in got["layers"]] == [pytest.approx(1)] * 2
    run("vector", "train", "pairs.jsonl", "-o", "z.gguf", "--layer-zero", "-q")
    assert load("z.gguf").layers == [0, 1, 2]
    shown = run("vector", "show", "t.safetensors", "-k", "2").stdout
    assert "site: mlp_out" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pairs.jsonl", "-o", "t.txt"), "ends in .gguf or .safetensors"),
        (("pairs.jsonl", "-o", "t.gguf", "--method", "median"), "unknown aggregator 'median'"),
        (("pairs.jsonl", "-o", "no/t.gguf"), "there is no folder no"),
        (("gone.jsonl", "-o", "t.gguf"), "there is no file gone.jsonl"),
        (("empty.jsonl", "-o", "t.gguf"), "is empty"),
        (("two.txt", "one.txt", "-o", "t.gguf"), "two.txt has 2 texts and one.txt has 1"),
        (
            ("pairs.jsonl", "-o", "t.safetensors", "--site", "logits"),
            "a vector belongs to a site with layers",
        ),
        (("pairs.jsonl", "-o", "t.gguf", "--site", "mlp_out"), ".safetensors can hold"),
        (("pairs.jsonl", "-o", "t.gguf", "--read", "foo", "-m", "gone.gguf"), "read 'foo' is not"),
        (("pairs.jsonl", "-o", "t.gguf", "--read", "mean:3", "-m", "gone.gguf"), "'mean:3' is not"),
        (("pairs.jsonl", "-o", "t.gguf", "--layers", "7"), "layer 7 is out of range"),
    ],
)
def test_train_refuses(words: tuple[str, ...], message: str) -> None:
    Path("empty.jsonl").write_text("")
    Path("two.txt").write_text("a\nb\n")
    Path("one.txt").write_text("a\n")
    assert message in refused("vector", "train", *words)
    assert not list(Path().glob("t.*"))


def test_combine_refuses() -> None:
    for expression, message in (
        ("v.gguf + gone.gguf", "there is no file gone.gguf"),
        ("v.gguf * v.gguf", "numbers only"),
        ("v.gguf +", "ends where"),
    ):
        assert message in refused("vector", "combine", expression, "-o", "t.gguf")


@pytest.fixture
def texts(folder: Path) -> None:
    (folder / "pos.txt").write_text("The cat sat\nsky is blue\n")
    (folder / "neg.txt").write_text("The dog sat\nsky is red\n")


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("site", ["attn_pattern", "attn_scores"])
def test_sites_by_key_have_no_vectors(site: str) -> None:
    words = ("vector", "train", "pos.txt", "neg.txt", "-o", "v.safetensors", "--site", site)
    assert "one row per token" in refused(*words)


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("site", ["l_out-2", "resid_post.2", "blocks.2.hook_resid_post"])
def test_a_sites_layer_is_the_layer(site: str) -> None:
    words = ("vector", "train", "pos.txt", "neg.txt", "-o", "v.gguf", "--site", site)
    run(*words)
    assert load("v.gguf").layers == [2]
    assert "already names layers" in refused(*words, "--layers", "1")
    far = site.replace("2", "9")
    message = f"site '{far}': '9': layer 9 is out of range; there are 0 to 2"
    assert refused(*words[:-1], far) == message


@pytest.mark.usefixtures("texts")
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


@pytest.mark.usefixtures("texts")
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
