"""bake: the command, its errors, and that nothing is left behind."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from commands import document, refused, run
from one_prompt import PROMPT

from mia.bake import checks
from mia.io import files

pytestmark = pytest.mark.usefixtures("vector_files")


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of a bake reads little, for speed."""
    monkeypatch.setattr(checks, "_TEXTS", 2)
    monkeypatch.setattr(checks, "_TOKENS", 12)


def test_a_lora_is_written_tested_and_run() -> None:
    made = document("bake", "v.gguf", "-o", "w.gguf", "-p", PROMPT, "--coeff", "0.5")
    assert (made["kind"], made["strength"], made["tensors"], made["rank"]) == ("lora", 0.5, 4, 1)
    assert [c["texts"] for c in made["checks"]] == ["neutral", "prompts"]
    assert all(c["edit_baked"] < 1e-9 < 1e-3 < c["plain_edit"] for c in made["checks"])
    assert {e["site"] for e in made["edits"]} == {
        f"{s}.{i}" for s in ("attn_out", "mlp_out") for i in (1, 2)
    }
    fields = gguf.GGUFReader("w.gguf").fields
    kept = json.loads(fields["mia.bake.check"].contents())
    assert [kept["neutral"], kept["prompts"]] == made["checks"]
    assert fields["mia.model_sha256"].contents() == made["model"]["sha256"]
    plain, baked = (
        document("run", "-p", PROMPT, "-n", "4", *o) for o in ((), ("--lora", "w.gguf"))
    )
    assert baked["model"]["lora"][0]["file"] == "w.gguf" and plain["output"] != ""
    assert "KL(edit || baked)" in run("bake", "v.gguf", "-o", "w.gguf").stdout


def test_a_replay_makes_the_numbers_again() -> None:
    made = document("bake", "v.gguf", "-o", "w.gguf", "--direction-layer", "1")
    Path("w.gguf").unlink()
    Path("r.json").write_text(json.dumps(made))
    assert json.loads(run("replay", "r.json", "--json").stdout)["verdict"] == "exact"
    assert not Path("w.gguf").exists()


def test_heads_and_control_vectors() -> None:
    made = document("bake", "--ablate", "1.2,1.4", "-o", "h.gguf")
    assert (made["tensors"], made["rank"], made["strength"]) == (1, 16, None)
    made = document("bake", "v.gguf", "-o", "c.gguf", "--kind", "control-vector", "--coeff", "2")
    assert made["checks"][0]["edit_baked"] < 1e-9
    shown = document("vector", "show", "c.gguf", "-k", "0")
    twice = document("vector", "show", "v.gguf", "-k", "0")
    norms = ([r["norm"] for r in d["layers"]] for d in (shown, twice))
    np.testing.assert_allclose(next(norms), 2 * np.array(next(norms)), rtol=1e-5)


def test_a_budget_chooses_the_strength() -> None:
    words = ("bake", "v.gguf", "-o", "w.gguf", "--direction-layer", "1")
    made = document(*words, "--kl-budget", "0.05")
    kl = {row["strength"]: row["kl"] for row in made["kl"]}
    assert len(kl) == 10 and kl[made["strength"]] <= 0.05
    assert all(k > 0.05 for s, k in kl.items() if s > made["strength"])
    few = document(*words, "--kl-budget", "0.05", "--coeff", "0.05,0.1")
    assert [row["strength"] for row in few["kl"]] == [0.05, 0.1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("v.gguf", "-o", "w.bin"), "w.bin: what is baked ends in .gguf"),
        (("-o", "w.gguf"), "give a vector, or heads to ablate"),
        (("v.gguf", "--ablate", "1.2", "-o", "w.gguf"), "give a vector, or heads to ablate"),
        (("--ablate", "1.2", "--coeff", "2", "-o", "w.gguf"), "--coeff is for a vector"),
        (("v.gguf", "-o", "w.gguf", "--coeff", "0"), "strength 0 changes nothing"),
        (("v.gguf", "-o", "w.gguf", "--coeff", "1,2"), "2 strengths are for a KL budget"),
        (("v.gguf", "-o", "w.gguf", "--weight-type", "f16"), "is for kind model, not lora"),
        (
            ("v.gguf", "-o", "w.gguf", "--kl-budget", "1e-9", "--coeff", "1,2"),
            "no strength stays within",
        ),
        (("v.gguf", "-o", "w.gguf", "--direction-layer", "0"), "v has no layer 0"),
        (("v.gguf", "-o", "w.gguf", "--kind", "control-vector", "--embedding"), "at resid_post"),
        (("none.gguf", "-o", "w.gguf"), "there is no file none.gguf"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(words: tuple[str, ...], message: str) -> None:
    before = set(Path().iterdir())
    assert message in refused("bake", *words)
    assert {p for p in Path().iterdir() if p.name != "cache"} == before


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(Path().iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mia.methods.bake.write_check", full)
    assert "No space left on device" in refused("bake", "v.gguf", "-o", "w.gguf")
    assert {p for p in Path().iterdir() if p.name != "cache"} == before
    assert files.check_writable("w.gguf")


def test_a_bake_does_not_write_over_what_it_reads(path: Path) -> None:
    kept = {file: file.read_bytes() for file in (path, Path("v.gguf"))}
    for file in kept:
        message = refused("bake", "v.gguf", "-o", str(file), "--kind", "model")
        assert message == f"{file} is what is baked; give another file to write"
    assert all(file.read_bytes() == data for file, data in kept.items())
