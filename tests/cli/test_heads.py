"""heads and ablate: what they print and draw, and how they refuse."""

from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run
from one_prompt import HEADS, LAYERS, PROMPT, log_prob, patterns, without_head
from oracle import Oracle

from mia.methods.heads import score_pattern


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


# -- heads ----------------------------------------------------------------------------


def test_heads_of_a_prompt(oracle: Oracle, tokens: list[int]) -> None:
    doc = document("heads", "-p", PROMPT, "-k", "2")
    expected = score_pattern(patterns(oracle, tokens), tokens)
    for name, a in doc["scores"].items():
        assert np.abs(np.asarray(a) - expected[name]).max() < 1e-4
    top = doc["top"]["previous"]
    assert len(top) == 2 and top[0]["score"] == np.max(doc["scores"]["previous"])
    assert doc["prompts"] == 1 and doc["model"]["architecture"] == "llama"
    lines = run("heads", "-p", PROMPT, "-k", "1").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "previous",
        "duplicate",
        "induction",
        "entropy",
    ]
    assert lines[0] == f"previous: {top[0]['layer']}.{top[0]['head']} {top[0]['score']:.3f}"


def test_heads_without_repetition_say_so() -> None:
    assert "induction: no token of the prompt is repeated" in run("heads", "-p", "The cat").stdout
    doc = document("heads", "-p", "The cat")
    assert doc["scores"]["induction"] == [[None] * HEADS] * LAYERS
    assert doc["top"]["induction"] == [] and len(doc["top"]["previous"]) == 10


def test_heads_on_random_tokens_and_without_the_best() -> None:
    words = ("heads", "--repeat-random", "6", "--prompts", "2", "--ablate-top", "2")
    doc = document(*words)
    assert len(doc["tokens"]) == 13 and doc["prompts"] == 2
    loss = doc["copying"]["loss"]
    assert [r["what"] for r in loss] == [
        "whole model",
        "without the top 2",
        *["without 2 random"] * 5,
    ]
    best = [{k: t[k] for k in ("layer", "head")} for t in doc["top"]["induction"][:2]]
    assert loss[1]["heads"] == best and loss[0]["factor"] == 1
    assert all(best[0] not in r["heads"] for r in loss[2:])
    assert document(*words) == doc  # the same seed, the same everything
    assert document(*words, "--seed", "1")["tokens"] != doc["tokens"]
    factors = [r["factor"] for r in loss[2:]]
    expected = {"least": min(factors), "median": sorted(factors)[2], "most": max(factors)}
    assert doc["copying"]["random_factor"] == pytest.approx(expected, abs=1e-5)
    assert len(document(*words, "--draws", "3")["copying"]["loss"]) == 5
    assert "loss on the copy, without the top 2: " in run(*words).stdout


def test_heads_draws_a_score() -> None:
    run("heads", "-p", PROMPT, "--plot", "heads.svg", "--score", "previous")
    assert ">previous</text>" in Path("heads.svg").read_text()


def test_heads_refuses() -> None:
    assert "give either a prompt" in refused("heads")
    assert "give either a prompt" in refused("heads", "-p", "a", "--repeat-random", "4")
    assert "--ablate-top needs --repeat-random" in refused("heads", "-p", "a", "--ablate-top", "1")
    wrong = run("heads", "-p", "a", "--score", "copying", code=2)
    assert "--score" in wrong.stderr and "'copying' is not one of" in wrong.stderr
    assert "the model has 18 heads" in refused(
        "heads", "--repeat-random", "4", "--ablate-top", "18"
    )


# -- ablate ---------------------------------------------------------------------------


def test_ablate_sweeps_all_heads(oracle: Oracle, tokens: list[int]) -> None:
    doc = document("ablate", "-p", PROMPT, "--answer", " France", "-k", "3")
    (answer,) = (t["id"] for t in doc["answer"])
    clean = log_prob(oracle.run(tokens)["logits"][-1], answer)
    assert abs(doc["logprob"] - clean) < 1e-4 and doc["ablated_at"] == [7]

    edit = without_head(oracle, 4, slice(-1, None))
    without = oracle.run(tokens, {"head_out.1": edit})["logits"][-1]
    assert abs(doc["drop"][1][4] - (clean - log_prob(without, answer))) < 1e-4
    values = [abs(t["value"]) for t in doc["top"]]
    assert len(values) == 3 and values[0] == np.abs(doc["drop"]).max()
    lines = run("ablate", "-p", PROMPT, "--answer", " France", "-k", "1").stdout.splitlines()
    top = doc["top"][0]
    assert lines[0] == f"log-probability of ' France': {doc['logprob']:.4f}"
    assert lines[1].startswith(f"without {top['layer']}.{top['head']}: ")
    assert lines[1].endswith(f"(drop {top['value']:+.4f})")


def test_ablate_everywhere_is_what_run_with_ablate_does(oracle: Oracle, tokens: list[int]) -> None:
    words = ("ablate", "-p", PROMPT, "--answer", " France", "--heads", "1.4", "--token-idx", "*")
    doc = document(*words)
    logits = oracle.run(tokens, {"head_out.1": without_head(oracle, 4)})["logits"][-1]
    without = log_prob(logits, doc["answer"][0]["id"])
    assert abs(doc["logprob"] - doc["drop"][1][4] - without) < 1e-4
    assert doc["drop"][0] == [None] * 6 and doc["ablated_at"] == "all"
    same = document(*words, "--ablate-attention")
    assert abs(same["drop"][1][4] - doc["drop"][1][4]) < 1e-4
    ran = document("run", "-p", PROMPT, "-n", "1", "--ablate", "1.4")["output_tokens"][0]
    assert ran["id"] == logits.argmax() and abs(ran["logprob"] - log_prob(logits, ran["id"])) < 1e-4


def test_ablate_draws_and_refuses() -> None:
    run("ablate", "-p", PROMPT, "--answer", " France", "--plot", "drop.png")
    assert Path("drop.png").stat().st_size > 3000
    assert "the answer is empty" in refused("ablate", "-p", PROMPT, "--answer", "")
    assert "token index 9 is out of range; there are 0 to 7" in refused(
        "ablate", "-p", PROMPT, "--answer", " France", "--token-idx", "9"
    )


# -- on a terminal --------------------------------------------------------------------


def test_a_terminal_shows_grids_above_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("ablate", "-p", PROMPT, "--answer", " France", "--heads", "1.2")
    plain = run("heads", "-p", PROMPT, "-k", "1").stdout, run(*words).stdout
    monkeypatch.setattr("mia.cli._command.on_terminal", lambda: True)
    text = run("heads", "-p", PROMPT, "-k", "1").stdout
    lines = text.splitlines()
    assert lines[0] == "induction (layers down, heads across)"
    assert lines[1].split() == [str(h) for h in range(HEADS)]
    scores = document("heads", "-p", PROMPT)["scores"]["induction"]
    assert lines[2].split() == ["0", *(f"{x:.2f}" for x in scores[0])]
    assert text.endswith(plain[0])
    text = run(*words).stdout
    lines = text.splitlines()
    assert lines[0].startswith("drop in log-probability") and len(lines[2].split()) == 1
    assert text.endswith(plain[1])


def test_options_that_cannot_act_are_refused() -> None:
    words = ("heads", "-p", PROMPT, "-m", "gone.gguf")
    assert refused(*words, "--prompts", "3") == "--prompts needs --repeat-random N"
    assert refused(*words, "--seed", "3") == "--seed needs --repeat-random N"
    assert refused(*words, "--draws", "3") == "--draws needs --ablate-top K"
