"""tune as a person types it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import document, refused, run

from mia.bake import checks
from mia.vectors import load

pytestmark = pytest.mark.usefixtures("vector_files")
PROMPT = "The capital of France is"
FAST = ("--neutral-tokens", "16", "--coeff", "0.5,2")
WORDS = ("tune", "v.gguf", "-p", PROMPT, *FAST)


def test_every_setting_and_the_best(folder: Path) -> None:
    options = ("--answer", " cat", "--operators", "add,ablate", "--widths", "1,2", "--runs", "99")
    got = document(*WORDS, *options, "--kl-budget", "5", "--best", "best.gguf")
    assert got["space"] == {
        "settings": 9,
        "operators": ["add", "project_out"],
        "layers": "1..2",
        "widths": [1, 2],
        "coeffs": [0.5, 2.0],
    }
    assert len(got["trials"]) == 9 and got["kl_budget"] == 5
    best = max((t for t in got["trials"] if t["kl"] <= 5), key=lambda t: t["score"])
    assert got["best"] == best and got["front"][-1] == best
    assert load("best.gguf").metadata["tuned_operator"] == best["operator"]
    told = run(
        *WORDS, *options, "--kl-budget", "5", "--best", "best.gguf", "--plot", "f.png"
    ).stderr
    assert "wrote best.gguf; to use it: mia steer best.gguf -p PROMPT" in told
    assert Path("f.png").exists()


@pytest.mark.parametrize(
    ("site", "operator"),
    [
        ("resid_post", "add"),
        ("mlp_out", "mia.bake.changes:remove --minimise"),
        ("resid_post", "project_out --minimise"),
        ("resid_post", "add --normalize"),
    ],
)
def test_the_best_is_baked_by_the_command_that_is_told(
    monkeypatch: pytest.MonkeyPatch, site: str, operator: str
) -> None:
    monkeypatch.setattr(checks, "_TEXTS", 1)
    replace(load("v.gguf"), site=site).save("w.safetensors")
    options = ("--kl-budget", "50", "--best", "best.safetensors", "--operators", *operator.split())
    operator = operator.removesuffix(" --minimise")
    words = ("tune", "w.safetensors", "-p", PROMPT, *FAST, "--answer", " cat", *options)
    told = run(*words).stderr
    _, _, bake = told.partition("; to bake it: mia ")
    assert bool(bake) == (operator in ("add", "mia.bake.changes:remove")), told
    other = "was tuned for"
    if not bake:
        assert other in run("bake", "best.safetensors", "-o", "o.gguf").stderr
        return
    baked = run(*bake.replace("OUT", "o").split(), "--json")
    assert other not in baked.stderr
    [kind] = {e["operator"] for e in json.loads(baked.stdout)["edits"]}
    assert kind == operator.rpartition(":")[2]
    if site == "resid_post":
        assert other in run("bake", "best.safetensors", "-o", "o.gguf").stderr


def test_a_record_is_gone_on_with() -> None:
    options = ("--answer", " cat", "--runs", "5", "--seed", "1", "--kl-budget", "50")
    words = (*WORDS, *options, "--record", "r.jsonl")
    first = run(*words).stdout
    lines = Path("r.jsonl").read_bytes()
    assert lines.count(b"\n") == 1 + 5
    assert run(*words).stdout == first and Path("r.jsonl").read_bytes() == lines
    assert refused(*words, "--neutral-tokens", "8").startswith(
        "r.jsonl was made with another neutral"
    )


def test_words_of_texts_and_prompts_of_a_file() -> None:
    Path("w.txt").write_text("cat\nthe\n")
    Path("p.txt").write_text("The cat\nThe dog\n")
    options = ("--prompts-from", "p.txt", "--words", "w.txt", "--runs", "6", "--kl-budget", "50")
    words = ("tune", "v.gguf", *FAST, *options)
    mass = document(*words, "-n", "4", "-q")
    assert mass["score"]["metric"] == "log-probability of listed words"
    assert len(mass["score"]["prompts"]) == 2 and mass["score"]["samples"] == 0
    share = document(*words, "--samples", "2", "-n", "4")
    assert share["score"]["metric"] == "share of listed words" and 0 <= share["plain"] <= 1


def test_a_budget_that_nothing_meets_is_told() -> None:
    words = (*WORDS, "--answer", " cat", "--kl-budget", "1e-9", "--operators", "add")
    result = run(*words, "--best", "best.gguf", code=1)
    assert "no setting that was tried stays within a KL of 1e-09" in result.stdout
    assert "best.gguf is not written" in result.stderr and not Path("best.gguf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the metric logprob needs an answer"),
        (("--answer", "a", "--words", "french_words"), "--answer is not for --words"),
        (("--answer", "a", "--samples", "3"), "--samples needs --words"),
        (("--answer", "a", "-n", "3"), "--n-predict needs --words"),
        (("--answer", "a", "--operators", "hello"), "unknown operator 'hello'"),
        (("--answer", "a", "--widths", "9"), "no 9 consecutive layers"),
        (("--answer", "a", "--prompts-from", "p.txt"), "--prompt is not for --prompts-from"),
        (("--answer", "a", "--best", "best.txt"), "a vector file ends in .gguf or .safetensors"),
        (("--answer", "a", "--metric", "kl"), "kl is what a change costs"),
        (("--words", "none_words"), "there is no file none_words"),
    ],
)
def test_what_is_refused(options: tuple[str, ...], message: str) -> None:
    assert message in refused(*WORDS, *options)
