"""attention: what it prints, draws and writes, and how it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run, shown_help
from one_prompt import HEADS, LAYERS, PROMPT, N, patterns, without_head
from oracle import Oracle


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


def test_attention_gives_the_numbers(oracle: Oracle, tokens: list[int]) -> None:
    doc = document("attention", "-p", PROMPT)
    weights = np.asarray(doc["weights"])
    assert weights.shape == (LAYERS, HEADS, N, N) == (3, 6, len(tokens), len(tokens))
    assert np.abs(weights - patterns(oracle, tokens)).max() < 1e-4
    assert doc["layers"] == [0, 1, 2] and doc["heads"] == list(range(6))
    assert doc["model"]["architecture"] == "llama" and doc["tokens"][0]["index"] == 0
    some = document("attention", "-p", PROMPT, "--layers", "1..2", "--heads", "1.4,2.0")
    assert some["layers"] == [1, 2] and some["heads"] == [0, 4]
    assert np.array_equal(some["weights"], weights[1:][:, [0, 4]])


def test_attention_goes_to_safetensors(oracle: Oracle, tokens: list[int]) -> None:
    from safetensors import safe_open

    result = run("attention", "-p", PROMPT, "-o", "maps.safetensors")
    assert result.stdout == "" and "wrote maps.safetensors" in result.stderr
    with safe_open("maps.safetensors", framework="numpy") as f:
        assert list(f.keys()) == ["attention"]
        assert np.abs(f.get_tensor("attention") - patterns(oracle, tokens)).max() < 1e-4
        assert json.loads(f.metadata()["tokens"]) == tokens
        assert f.metadata()["layers"] == "[0, 1, 2]" and f.metadata()["model_sha256"]
    run("attention", "-p", PROMPT, "-o", "w.safetensors", "--value-weighted")
    with safe_open("w.safetensors", framework="numpy") as f:
        assert list(f.keys()) == ["value_weighted"]
    run("attention", "-p", PROMPT, "-o", "maps.json")
    assert len(json.loads(Path("maps.json").read_text())["weights"]) == LAYERS


def test_attention_lists_the_strongest_keys(oracle: Oracle, tokens: list[int]) -> None:
    lines = run("attention", "-p", PROMPT, "-k", "2", "--heads", "1.3").stdout.splitlines()
    row = patterns(oracle, tokens)[1, 3, -1]
    a, b = np.argsort(-row)[:2]
    assert lines[0] == "query 7:  of"
    assert lines[1].startswith(f"1.3: {a}:") and f" {row[a]:.2f}|{b}:" in lines[1]
    other = run("attention", "-p", PROMPT, "--token-idx", "0", "--layers", "0").stdout.splitlines()
    assert len(other) == 1 + HEADS and other[1] == "0.0: 0:The 1.00"


@pytest.mark.parametrize("name", ["maps.png", "maps.svg", "maps.pdf", "maps.html", "few.png"])
def test_attention_draws(name: str) -> None:
    more = ["--heads", "0.1,2.*"] if name == "few.png" else []
    result = run("attention", "-p", PROMPT, "--plot", name, *more)
    assert result.stdout.startswith("query 7: ") and f"wrote {name}" in result.stderr
    text = Path(name).read_bytes()
    assert len(text) > 3000
    if name == "maps.html":
        assert b"const DATA = {" in text
    if name == "maps.svg":
        assert b">layer</text>" in text and b">head</text>" in text


def test_attention_of_a_changed_run(oracle: Oracle, tokens: list[int]) -> None:
    doc = document("attention", "-p", PROMPT, "--ablate", "0.3")
    expected = patterns(oracle, tokens, {"head_out.0": without_head(oracle, 3)})
    assert np.abs(np.asarray(doc["weights"]) - expected).max() < 1e-4
    blocked = np.asarray(document("attention", "-p", PROMPT, "--block", "5->0")["weights"])
    assert (blocked[:, :, 5, 0] == 0).all() and np.abs(blocked.sum(-1) - 1).max() < 1e-4


def test_attention_refuses() -> None:
    assert "its name must end in .png, .svg, .pdf, .html" in refused(
        "attention", "-p", "a", "--plot", "a.bmp"
    )
    assert "head 6 is out of range; there are 0 to 5" in refused(
        "attention", "-p", "a", "--heads", "0.6"
    )
    assert "layer 3 is out of range" in refused("attention", "-p", "a", "--layers", "3")
    assert "--token-idx '*' is 8 tokens, not one" in refused(
        "attention", "-p", PROMPT, "--token-idx", "*"
    )
    assert "no head of 0.1 is in layers 1" in refused(
        "attention", "-p", "a", "--heads", "0.1", "--layers", "1"
    )
    assert "there is no folder" in refused("attention", "-p", "a", "-o", "no/a.json")


def test_help_says_when_flash_attention_is_off() -> None:
    text = shown_help("attention")
    assert (
        "Reading patterns needs flash attention off" in text
        and "elsewhere it is on if the cache type supports it" in text
    )


def test_a_terminal_shows_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mia.cli._command.on_terminal", lambda: True)
    lines = run("attention", "-p", PROMPT, "--heads", "1.3").stdout.splitlines()
    assert lines[0].startswith("layer 1 · head 3 (most: ") and len(lines) == 3 + N
    assert [line.split()[0] for line in lines[1:3]] == ["The", "capital"]
    many = run("attention", "-p", PROMPT, "--heads", "*.0-4").stdout.splitlines()
    assert many[0] == "query 7:  of" and len(many) == 1 + 3 * 5


def test_a_map_that_is_wider_than_the_terminal_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mia.cli._command.on_terminal", lambda: True)
    lines = run("attention", "-p", " cat" * 40, "--heads", "1.3").stdout.splitlines()
    assert lines[0].startswith("a map of 40 tokens is wider than this terminal")
    assert lines[1] == "query 39:  cat" and lines[2].startswith("1.3: ") and len(lines) == 3
