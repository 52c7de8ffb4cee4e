"""The command `diff`."""

from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run
from lora_file import merged, write_lora
from mixed_gguf import of_layer, perturbed
from one_prompt import PROMPT
from oracle import Oracle
from tiny_gguf import write_tiny


@pytest.fixture
def other(folder: Path, path: Path) -> str:
    perturbed(path, folder / "other.gguf", of_layer(1), size=0.02)
    return "other.gguf"


def test_it_names_the_layer_that_differs(path: Path, other: str) -> None:
    made = document("diff", str(path), other, "-p", PROMPT)
    assert (made["model"]["file"], made["other"]["file"]) == ("tiny.gguf", "other.gguf")
    assert made["blame"]["ranked"][0] == "layer 1" and made["tensors"]["n_same"] == 23
    assert [layer["layer"] for layer in made["layers"]] == [0, 1, 2]
    assert made["layers"][0]["error"] == 0 < made["layers"][1]["error"]
    assert [m["name"] for m in (made["run"]["model"], *made["run"]["others"])] == ["tiny", "other"]
    text = run("diff", str(path), other, "-p", PROMPT).stdout
    assert "A: tiny   B: other" in text and "first: layer 1" in text


def test_a_text_of_several_windows_without_blame(folder: Path, path: Path, other: str) -> None:
    Path("text.txt").write_text("The cat sat on the red sky. " * 12 + "\n")
    made = document(
        "diff", str(path), other, "-f", "text.txt", "--diff-window", "16", "--blame-tokens", "0",
        "--lens-tokens", "3", "--plot", "d.png",
    )  # fmt: skip
    n = len(made["tokens"]) // 16
    assert n >= 2 and made["n_windows"] == n and made["end"]["n_positions"] == 7 * n
    assert (made["blame"], made["n_lens"]) == (None, 3)
    assert Path("d.png").read_bytes().startswith(b"\x89PNG")


def test_what_it_refuses(folder: Path, path: Path, other: str) -> None:
    write_tiny(folder / "short.gguf", "llama", n_layer=2)
    message = refused("diff", str(path), "short.gguf", "-p", PROMPT)
    assert message == "tiny and short cannot be compared: they have 3 and 2 layers"
    assert "no such file: none.gguf" in refused("diff", str(path), "none.gguf", "-p", PROMPT)
    assert (
        refused("diff", str(path), other)
        == "give the prompt once: -p TEXT, or -f FILE (- for stdin)"
    )
    message = refused("diff", str(path), other, "-p", PROMPT, "--blame-tokens", "0", "--null", "2")
    assert message.startswith("--null is of the blame")


def test_a_vector_and_a_sweep_on_both(path: Path, other: str, vector_files: None) -> None:
    run("sweep", "-p", PROMPT, "--zero", "--over", "layer", "-o", "s.json")
    words = ["--steer", "v.gguf", "--steer-coeff", "2", "--sweep", "s.json", "--blame-tokens", "0"]
    made = document("diff", str(path), other, "-p", PROMPT, *words, "-o", "d.json")
    assert made["steered"]["coeff"] == 2 and made["swept"]["n"] == 3
    assert set(made["run"]["files"]) == {"v.gguf", "s.json"}
    assert document("replay", "d.json")["verdict"] == "exact"
    message = refused("diff", str(path), other, "-p", PROMPT, "--steer-coeff", "2")
    assert message == "--steer-coeff needs --steer"


def test_an_adapter_is_of_b_alone(path: Path) -> None:
    write_lora(Path("l.gguf"), Oracle(path))
    run("sweep", "-p", PROMPT, "--zero", "--over", "layer", "--token-idx", "2", "-o", "s.jsonl")
    words = (
        "diff",
        str(path),
        str(path),
        "-p",
        PROMPT,
        "--lora-b",
        "l.gguf=0.5",
        "--sweep",
        "s.jsonl",
    )
    made = document(*words, "-o", "d.json")
    assert "lora" not in made["model"] and made["other"]["lora"][0]["scale"] == 0.5
    assert made["end"]["kl"]["value"] > 1e-3 and made["swept"]["correlation"] < 0.99999
    assert document("replay", "d.json")["verdict"] == "exact"
    assert "A: tiny   B: tiny + 0.5 * l.gguf" in run(*words).stdout


def test_a_result_of_another_file_is_not_replayed(path: Path, other: str, folder: Path) -> None:
    run("diff", str(path), other, "-p", PROMPT, "-o", "r.json")
    run("replay", "r.json")
    perturbed(path, folder / "other.gguf", of_layer(2), size=0.02)
    assert "the result was made with other (SHA-256" in run("replay", "r.json", code=1).stderr


def test_a_file_with_and_without_an_adapter(
    folder: Path, path: Path, oracle: Oracle, tokens: list[int]
) -> None:
    write_lora(folder / "a.gguf", oracle, only=of_layer(1))
    lora = [str(path), str(path), "-p", PROMPT, "--lora-b", "a.gguf=0.5"]
    made = document("diff", *lora)
    assert made["blame"]["ranked"][0] == "layer 1" and "lora" not in made["model"]
    assert [(x["file"], x["scale"]) for x in made["other"]["lora"]] == [("a.gguf", 0.5)]
    x, y = oracle.run(tokens), merged(path, [(Path("a.gguf"), 0.5)]).run(tokens)
    for layer in made["layers"]:
        h, g = (run[f"resid_post.{layer['layer']}"] for run in (x, y))
        error = np.linalg.norm(g - h, axis=1) / np.linalg.norm(h, axis=1)
        assert layer["error"] == pytest.approx(error.mean(), abs=1e-5)
    text = run("diff", *lora).stdout
    assert "A: tiny   B: tiny + 0.5 * a.gguf\n" in text and "without adapters" in text
    same = document("diff", *lora, "--lora-a", "a.gguf=0.5", "--blame-tokens", "0")
    assert same["end"]["kl"]["value"] == pytest.approx(0, abs=1e-5)  # A has 16 bits
    assert same["layers"][2]["error"] == 0


def test_a_sweep_is_run_with_the_adapters_of_b(folder: Path, path: Path, oracle: Oracle) -> None:
    write_lora(folder / "a.gguf", oracle)
    sweep = ["sweep", "-p", PROMPT, "--zero", "--over", "layer", "--token-idx", "2..5"]
    plain = document(*sweep, "-o", "s.json")
    adapted = document(*sweep, "--lora", "a.gguf")
    x, y = (np.ravel(d["values"]) - d["unchanged"] for d in (plain, adapted))
    lora = ["--lora-b", "a.gguf", "--sweep", "s.json", "--blame-tokens", "0", "-o", "d.json"]
    made = document("diff", str(path), str(path), "-p", PROMPT, *lora)
    assert made["swept"]["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)
    assert document("replay", "d.json")["verdict"] == "exact"
