"""models, models convert, doctor: what they print, and how they refuse."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, refused, run
from tiny_gguf import write_tiny

from mia.io import activations
from mia.show.report import Report

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


def test_models_lists_names(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    Path("models.toml").write_text(f'[mine]\npath = "{path}"\n')
    listed = {m["name"]: m for m in json.loads(run("models", "--json").stdout)["models"]}
    assert listed["mine"]["present"] is True and "smollm2" in listed
    assert "mine" in run("models").stdout
    assert document("tokens", "-m", "mine", "-p", "x")["model"]["name"] == "mine"


def test_the_list_of_models_is_written() -> None:
    result = run("models", "-o", "m.json")
    assert result.stdout == "" and result.stderr == "mia: wrote m.json\n"
    assert json.loads(Path("m.json").read_text()) == json.loads(run("models", "--json").stdout)
    assert run("models", "-o", "m.json", "-q").stderr == ""
    assert "there is no folder no" in refused("models", "-o", "no/m.json")


@pytest.mark.parametrize("text", ["[x]\nwrong = 1\n", "not toml", '[x]\npath = "a"\nctx = "b"\n'])
def test_a_faulty_models_toml_is_one_line(text: str) -> None:
    Path("models.toml").write_text(text)
    assert "models.toml" in refused("models")


def test_converted_models_say_the_same(path: Path, tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small.gguf", "llama", qtype="Q8_0", add_bos=False)
    made = json.loads(run("models", "convert", str(small), "f32", "big.gguf", "--json").stdout)
    assert made["bytes"] > small.stat().st_size
    assert "weights f32" in run("doctor", "-m", "big.gguf").stdout
    run("save", "embed", "a.safetensors", "-m", str(small), "-p", PROMPT)
    run("save", "embed", "b.safetensors", "-m", "big.gguf", "-p", PROMPT)
    a, b = (activations.load(f"{n}.safetensors").arrays["embed"] for n in "ab")
    np.testing.assert_array_equal(a, b)
    result = run("models", "convert", str(small), "f16", "x.bin", code=1)
    assert result.stderr == "mia: x.bin: the file's name must end in .gguf\n"
    assert not Path("x.bin").exists()
    result = run("models", "convert", str(small), "q9", "x.gguf", code=1)
    assert "known: f32" in result.stderr and not Path("x.gguf").exists()
    result = run("models", "convert", str(small), "f16", str(small), code=1)
    assert "is the model itself" in result.stderr


def test_doctor_says_what_there_is() -> None:
    doc = document("doctor")
    assert doc["healthy"] and {f["level"] for f in doc["findings"]} == {"ok"}
    assert "weights f32, KV cache f32" in run("doctor").stdout


def test_doctor_of_a_file_that_is_broken() -> None:
    Path("broken.gguf").write_bytes(b"GGUF and no more")
    done = run("doctor", "broken.gguf", code=1)
    assert "fail  model" in done.stdout and "broken.gguf" in done.stdout


def test_doctor_says_when_the_callback_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("MIA_NATIVE") == "0":
        pytest.skip("the compiled callback is off")
    assert document("doctor")["callback"] == "compiled"
    monkeypatch.setattr("mia.llama.library.native_watch", lambda: None)
    doc = document("doctor")
    (finding,) = [f for f in doc["findings"] if f["level"] == "warn"]
    assert doc["callback"] == "Python" and "C compiler" in finding["advice"]


def test_demo_hints_at_what_comes_next_where_a_person_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stub(Report):
        def document(self) -> dict[str, Any]:
            return {}

        def plain(self) -> str:
            return "shown"

    monkeypatch.setattr("mia.methods.demo.demo", Stub)
    result = run("demo")
    assert result.stdout == "shown\n" and result.stderr.startswith("mia: next: mia logit-lens ")
    for words in (["--json"], ["-q"], ["-o", "d.json"]):
        assert "next:" not in run("demo", *words).stderr
