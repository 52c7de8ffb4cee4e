"""experts, and the options that change experts: what they print, draw and refuse."""

from pathlib import Path

import numpy as np
import pytest
from commands import document, greedy, refused, run
from one_prompt import PROMPT, Function, N
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.model import Model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("cli") / "mixture.gguf", "mixtral", add_bos=False)


def without(*experts: int) -> Function:
    def edit(rows: np.ndarray) -> np.ndarray:
        rows[:, experts] = -np.inf
        return rows

    return edit


def test_experts_gives_the_numbers(oracle: Oracle, tokens: list[int]) -> None:
    doc, sites = document("experts", "-p", PROMPT), oracle.run(tokens)
    assert doc["positions"] == list(range(N)) and len(doc["layers"]) == 3
    for i, layer in enumerate(doc["layers"]):
        assert layer["layer"] == i
        assert layer["experts"] == sites[f"experts.{i}"].tolist()
        assert np.abs(layer["weights"] - sites[f"expert_weights.{i}"]).max() < 1e-4
        assert np.abs(layer["logits"] - sites[f"router.{i}"]).max() < 1e-4
    some = document("experts", "-p", PROMPT, "--layers", "1", "--token-idx", "-2..")
    assert some["positions"] == [6, 7]
    assert some["layers"][0]["experts"] == doc["layers"][1]["experts"][-2:]


def test_experts_prints_a_line_for_each_token(oracle: Oracle, tokens: list[int]) -> None:
    lines = run("experts", "-p", PROMPT, "--layers", "0").stdout.splitlines()
    assert len(lines) == 1 + N and lines[0].startswith("Layer 0: 6 experts, entropy ")
    a, b = oracle.run(tokens)["experts.0"][0].astype(int)
    assert lines[1].startswith(f"0: The: {a} 0.") and f"|{b} 0." in lines[1]


@pytest.mark.parametrize("name", ["e.png", "e.html"])
def test_experts_draws(name: str) -> None:
    for view in ("tokens", "load"):
        result = run("experts", "-p", PROMPT, "--plot", name, "--view", view)
        assert result.stdout.startswith("Layer 0: ") and f"wrote {name}" in result.stderr
        assert len(Path(name).read_bytes()) > 3000


def test_a_terminal_shows_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mia.cli._command.on_terminal", lambda: True)
    lines = run("experts", "-p", PROMPT).stdout.splitlines()
    assert lines[0].startswith("experts that each token chose") and len(lines) == 2 + 3
    lines = run("experts", "-p", PROMPT, "--view", "load").stdout.splitlines()
    assert lines[0] == "load (layers down, experts across)" and len(lines) == 2 + 3


def test_run_without_experts(path: Path, tokens: list[int]) -> None:
    doc = document("run", "-p", PROMPT, "-n", "4", "--ablate-experts", "0.1-2,2.0")
    truth = {"router.0": without(1, 2), "router.2": without(0)}
    assert [t["id"] for t in doc["output_tokens"]] == greedy(path, tokens, truth, 4)
    assert "baseline" in doc


def test_run_with_silent_and_forced_experts(path: Path, tokens: list[int]) -> None:
    def zero(w: np.ndarray) -> np.ndarray:
        w[:, 1] = 0
        return w

    def force(z: np.ndarray) -> np.ndarray:
        z[:, 5] = np.maximum(z[:, 5], np.delete(z, 5, 1).max(1) + 0.01)
        return z

    doc = document(
        "run", "-p", PROMPT, "-n", "4", "--zero-experts", "*.1", "--force-experts", "1.5"
    )
    truth = {f"expert_weights.{i}": zero for i in range(3)} | {"router.1": force}
    assert [t["id"] for t in doc["output_tokens"]] == greedy(path, tokens, truth, 4)


def test_ablate_measures_heads_of_a_model_without_an_expert(
    path: Path, oracle: Oracle, tokens: list[int]
) -> None:
    doc = document("ablate", "-p", PROMPT, "--answer", " Paris", "--ablate-experts", "1.0")
    logits = oracle.run(tokens, {"router.1": without(0)})["logits"][-1]
    with Model(path, threads=1) as m:
        (answer,) = m.tokenize(" Paris", bos=False)
    want = logits[answer] - np.log(np.exp(logits).sum())
    assert doc["logprob"] == pytest.approx(want, abs=1e-4)


def test_refused(path_without_bos: Path) -> None:
    dense = ["-m", str(path_without_bos)]
    assert "this model has no experts" in refused("experts", "-p", "a", *dense)
    assert "this model has no experts" in refused("run", "-p", "a", "--zero-experts", "0.1", *dense)
    assert "experts to ablate '0.6': expert 6 is out of range; there are 0 to 5" in refused(
        "run", "-p", "a", "--ablate-experts", "0.6"
    )
    assert "layer 0 chooses 2 of 6 experts for each token: leave at least 2, not 1" in refused(
        "run", "-p", "a", "--ablate-experts", "0.0-4"
    )
