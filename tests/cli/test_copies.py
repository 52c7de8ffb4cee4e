"""--as and `models cache`: commands on copies of a model in another type, and the advice to make one."""

import json
from pathlib import Path

import pytest
from commands import document, refused, run
from letters import write_tasks
from one_prompt import PROMPT
from tiny_gguf import write_tiny

from mia.models import advice, copies

ABLATE = ("ablate", "-p", PROMPT, "--answer", " cat", "-k", "2")
ADVICE = "mia: weights of q8_0 round activations to 8 bits: on small, changes by 1e-5 move"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("small") / "small.gguf", "llama", qtype="Q8_0")


def test_a_command_on_a_copy(path: Path) -> None:
    plain = document("logit-lens", "l_out-2", "-p", PROMPT)
    first = run("logit-lens", "l_out-2", "-p", PROMPT, "--as", "f16", "--json")
    assert first.stderr == (
        "mia: made a copy of small as f16 (0 MB), which is kept: mia models cache\n"
    )
    made = json.loads(first.stdout)
    assert made["model"] == {
        **plain["model"],
        "as_type": "f16",
        "as_type_note": "weights of q8_0 are rounded to f16",
    }
    assert made["run"]["model"]["sha256"] == plain["model"]["sha256"]
    assert made["run"]["model"]["as_type"] == "f16"
    assert made["lens"] != plain["lens"]
    again = run("logit-lens", "l_out-2", "-p", PROMPT, "--as", "f16", "--json")
    assert (again.stdout, again.stderr) == (first.stdout, "")


def test_a_replay_runs_on_the_same_type() -> None:
    made = document("run", "-p", PROMPT, "-n", "3", "--as", "f32")
    Path("r.json").write_text(json.dumps(made))
    result = run("replay", "r.json", "--json")
    report = json.loads(result.stdout)
    assert report["verdict"] == "exact" and report["notices"] == []
    assert " --as f32" in report["command"]
    # a copy is mia's own, and is made again by a replay too, which writes nothing else
    run("models", "cache", "--clear")
    assert document("replay", "r.json")["verdict"] == "exact"
    assert len(document("models", "cache")["copies"]) == 1


def test_an_unknown_type_is_a_usage_error() -> None:
    result = run("tokens", "-p", "x", "--as", "q8_0", code=2)
    assert "'q8_0' is not one of 'f16', 'bf16', 'f32'" in result.stderr


def test_captures_and_vectors_of_the_model_are_its_own(path: Path) -> None:
    run("save", "l_out-1", "a.safetensors", "-p", PROMPT, "-q")
    Path("pairs.jsonl").write_text('{"positive": "The cat sat", "negative": "The dog sat"}\n')
    run("vector", "train", "pairs.jsonl", "-o", "v.gguf", "-q")
    run("tokens", "-p", "x", "--as", "f16", "-q")
    patched = run(
        "patch", "l_out-1", "a.safetensors", "-p", PROMPT, "-n", "2", "--as", "f16", "--bos"
    )
    steered = run("steer", "v.gguf", "-p", PROMPT, "-n", "2", "--as", "f16", "--bos")
    assert "another model" not in patched.stderr + steered.stderr


def test_doctor_examines_the_copy(path: Path) -> None:
    text = run("doctor", "--as", "f32").stdout
    assert "weights f32, KV cache f32" in text
    assert "weights q8_0" in run("doctor").stdout


def test_the_cache_is_listed_and_emptied(path: Path, folder: Path) -> None:
    assert run("models", "cache").stdout.startswith("0.0 of ")
    run("tokens", "-p", "x", "--as", "f16", "-q")
    run("tokens", "-p", "x", "--as", "f32", "-q")
    listed = document("models", "cache")
    assert [c["type"] for c in listed["copies"]] == ["f32", "f16"]
    assert {c["source"] for c in listed["copies"]} == {str(path)}
    assert listed["folder"] == str(folder / "cache" / "copies")
    lines = run("models", "cache").stdout.splitlines()
    assert lines[0].split()[:2] == ["small", "f32"] and str(path) in lines[0]
    assert refused("models", "cache", "--remove", "other").startswith(
        "there is no copy of 'other'; copies: small"
    )
    removed = run("models", "cache", "--remove", str(path)).stdout.splitlines()
    assert [line.split()[:3] for line in removed[:2]] == [
        ["removed", "small", "f32"],
        ["removed", "small", "f16"],
    ]
    assert len(removed) == 3 and document("models", "cache", "--clear")["copies"] == []


# -- advice --------------------------------------------------------------------------------------


def test_a_sweep_says_that_its_effects_may_drown(folder: Path) -> None:
    first = run(*ABLATE, "--json")
    assert first.stderr.count("\n") == first.stderr.count(ADVICE) == 1
    assert first.stderr.endswith(" takes most of this noise away: --as f16\n")
    assert "8 bits" not in first.stdout
    assert len(list((folder / "cache" / "noise").glob("*.json"))) == 1
    assert run(*ABLATE, "-q").stderr == ""
    assert ADVICE not in run(*ABLATE, "--as", "f16").stderr


def test_the_noise_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*ABLATE)
    monkeypatch.setattr(advice, "noise_floor", lambda model: 1 / 0)
    assert run(*ABLATE).stderr == first.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("heads", "--repeat-random", "5", "--prompts", "2", "--ablate-top", "1"),
        ("function-vector", "compose", "next.json,next.json,next.json,next.json", "--shots", "1",
         "--prompts", "2", "--effect-prompts", "1", "--n-heads", "1"),
    ],
    ids=["heads", "function-vector"],
)  # fmt: skip
def test_other_commands_on_small_effects(words: tuple[str, ...]) -> None:
    write_tasks(Path())
    assert run(*words).stderr.count(ADVICE) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("heads", "-p", PROMPT),  # what is attended to is no effect
        ("run", "-p", PROMPT, "-n", "1"),
        ("logit-lens", "l_out", "-p", PROMPT),
    ],
)
def test_others_advise_nothing(words: tuple[str, ...]) -> None:
    assert ADVICE not in run(*words).stderr


def test_no_advice_where_a_copy_does_not_fit(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    size = copies.bytes_as(path, "f16")
    monkeypatch.setattr(advice, "available_memory", lambda: 2 * size - 1)
    assert run(*ABLATE).stderr == ""
    monkeypatch.setattr(advice, "available_memory", lambda: 2 * size)
    assert ADVICE in run(*ABLATE).stderr
    monkeypatch.setattr(copies, "has_room", lambda needed: False)
    assert run(*ABLATE).stderr == ""


@pytest.mark.parametrize("qtype", ["F32", "F16"])
def test_types_that_round_nothing_to_8_bits_need_none(qtype: str) -> None:
    write_tiny("float.gguf", "llama", qtype=qtype)
    assert ADVICE[:20] not in run(*ABLATE, "-m", "float.gguf").stderr
