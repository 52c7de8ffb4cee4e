"""--lora: commands on a model with an adapter."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run
from lora_file import merged, write_lora
from one_prompt import PROMPT
from oracle import Oracle


@pytest.fixture(autouse=True)
def adapter(folder: Path, oracle: Oracle) -> Path:
    return write_lora(folder / "a.gguf", oracle)


def test_a_command_on_an_adapted_model(path: Path, tokens: list[int]) -> None:
    made = document("logit-lens", "l_out-2", "-p", PROMPT, "--lora", "a.gguf=0.5")
    [adapter] = made["model"]["lora"]
    assert adapter["file"] == "a.gguf" and adapter["scale"] == 0.5
    assert made["run"]["model"]["lora"] == [adapter]
    assert made["run"]["files"] == {"a.gguf": adapter["sha256"]}
    expected = merged(path, [(Path("a.gguf"), 0.5)]).run(tokens)["logits"]
    for row, truth in zip(made["lens"], expected, strict=True):
        assert row["top"][0]["id"] == int(np.argmax(truth))
        assert row["top"][0]["logit"] == pytest.approx(truth.max(), abs=1e-3)


def test_a_replay_takes_the_same_adapter(oracle: Oracle) -> None:
    made = document("run", "-p", PROMPT, "-n", "3", "--lora", "a.gguf=0.5")
    Path("r.json").write_text(json.dumps(made))
    report = json.loads(run("replay", "r.json", "--json").stdout)
    assert report["verdict"] == "exact" and report["notices"] == []
    assert "--lora a.gguf=0.5" in report["command"]
    write_lora(Path("a.gguf"), oracle, seed=5)
    assert "a.gguf has changed" in run("replay", "r.json", code=1).stderr


def test_errors_are_one_line(path: Path) -> None:
    assert "no such file: none.gguf" in refused("run", "-p", PROMPT, "--lora", "none.gguf")
    assert "not a number" in refused("run", "-p", PROMPT, "--lora", "a.gguf=x")
    assert "a LoRA adapter is needed" in refused("run", "-p", PROMPT, "--lora", str(path))
    assert "a LoRA adapter" in refused("run", "-p", PROMPT, "-m", "a.gguf")


def test_a_vector_of_the_plain_model_is_told() -> None:
    run("vector", "train", "sentiment", "-o", "v.gguf")
    words = ("run", "-p", PROMPT, "-n", "1", "--steer", "v.gguf")
    assert run(*words).stderr == ""
    said = run(*words, "--lora", "a.gguf").stderr
    assert said == "mia: v.gguf was made with other LoRA adapters on the model\n"
