"""attention, heads, ablate, attribute, and the options that silence heads, as a person types them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, refused, run, shown_help
from oracle import Oracle

from mia.cli.attention import cells
from mia.model import Model

PROMPT = "The capital of France is the capital of"
N, LAYERS, HEADS = 8, 3, 6


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


@pytest.fixture(scope="module")
def tokens(path: Path) -> list[int]:
    with Model(path, threads=1) as m:
        return m.tokenize(PROMPT)


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    return Oracle(path)


@pytest.mark.parametrize(
    "words",
    [
        ("attention",),
        ("heads",),
        ("heads", "--repeat-random", "6"),
        ("ablate", "--answer", " France"),
        ("attribute", "--answer", " France"),
        ("run", "-n", "1"),
    ],
)
def test_documents_say_the_model_and_the_tokens(words: tuple[str, ...]) -> None:
    prompt = () if "--repeat-random" in words else ("-p", PROMPT)
    found = document(*words, *prompt)
    assert found["model"]["architecture"] == "llama" and found["tokens"][0]["index"] == 0


# -- attention ----------------------------------------------------------------------------


def _patterns(oracle: Oracle, tokens: list[int], **edits: Any) -> np.ndarray:
    sites = oracle.run(tokens, {k.replace("_at_", "."): f for k, f in edits.items()})
    return np.stack([sites[f"attn_pattern.{i}"] for i in range(LAYERS)]).swapaxes(1, 2)


def test_attention_gives_the_numbers(oracle: Oracle, tokens: list[int]) -> None:
    found = document("attention", "-p", PROMPT)
    weights = np.asarray(found["weights"])
    assert weights.shape == (LAYERS, HEADS, N, N) == (3, 6, len(tokens), len(tokens))
    assert np.abs(weights - _patterns(oracle, tokens)).max() < 1e-4
    assert found["layers"] == [0, 1, 2] and found["heads"] == list(range(6))
    some = document("attention", "-p", PROMPT, "--layers", "1..2", "--heads", "1.4,2.0")
    assert some["layers"] == [1, 2] and some["heads"] == [0, 4]
    assert np.array_equal(some["weights"], weights[1:][:, [0, 4]])


def test_attention_goes_to_safetensors(oracle: Oracle, tokens: list[int]) -> None:
    from safetensors import safe_open

    result = run("attention", "-p", PROMPT, "-o", "maps.safetensors")
    assert result.stdout == "" and "wrote maps.safetensors" in result.stderr
    with safe_open("maps.safetensors", framework="numpy") as f:
        assert list(f.keys()) == ["attention"]
        assert np.abs(f.get_tensor("attention") - _patterns(oracle, tokens)).max() < 1e-4
        assert json.loads(f.metadata()["tokens"]) == tokens
        assert f.metadata()["layers"] == "[0, 1, 2]" and f.metadata()["model_sha256"]
    run("attention", "-p", PROMPT, "-o", "w.safetensors", "--value-weighted")
    with safe_open("w.safetensors", framework="numpy") as f:
        assert list(f.keys()) == ["value_weighted"]
    run("attention", "-p", PROMPT, "-o", "maps.json")
    assert len(json.loads(Path("maps.json").read_text())["weights"]) == LAYERS


def test_attention_lists_the_strongest_keys(oracle: Oracle, tokens: list[int]) -> None:
    lines = run("attention", "-p", PROMPT, "-k", "2", "--heads", "1.3").stdout.splitlines()
    row = _patterns(oracle, tokens)[1, 3, -1]
    a, b = np.argsort(-row)[:2]
    assert lines[0] == "query 7:  of"
    assert lines[1].startswith(f"1.3: {a}:") and f" {row[a]:.2f}|{b}:" in lines[1]
    other = run("attention", "-p", PROMPT, "--token-idx", "0", "--layers", "0").stdout.splitlines()
    assert len(other) == 1 + HEADS and other[1] == "0.0: 0:The 1.00"


@pytest.mark.parametrize("name", ["maps.png", "maps.svg", "maps.pdf", "maps.html", "few.png"])
def test_attention_draws(name: str) -> None:
    more = ["--heads", "0.1,2.*"] if name == "few.png" else []
    result = run("attention", "-p", PROMPT, "--draw", name, *more)
    assert result.stdout == "" and f"wrote {name}" in result.stderr
    text = Path(name).read_bytes()
    assert len(text) > 3000
    if name == "maps.html":
        assert b"const DATA = {" in text
    if name == "maps.svg":
        assert b">layer</text>" in text and b">head</text>" in text


def test_attention_of_a_changed_run(oracle: Oracle, tokens: list[int]) -> None:
    def silence(z: np.ndarray) -> np.ndarray:
        z[:, 8 * 3 : 8 * 4] = 0
        return z

    found = document("attention", "-p", PROMPT, "--ablate", "0.3")
    want = _patterns(oracle, tokens, head_out_at_0=silence)
    assert np.abs(np.asarray(found["weights"]) - want).max() < 1e-4
    blocked = np.asarray(document("attention", "-p", PROMPT, "--block", "5->0")["weights"])
    assert (blocked[:, :, 5, 0] == 0).all() and np.abs(blocked.sum(-1) - 1).max() < 1e-4


def test_attention_refuses() -> None:
    assert "its name must end in .png, .svg, .pdf, .html" in refused(
        "attention", "-p", "a", "--draw", "a.bmp"
    )
    assert "head 6 is out of range; 0 to 5" in refused("attention", "-p", "a", "--heads", "0.6")
    assert "layer 3 is out of range" in refused("attention", "-p", "a", "--layers", "3")
    assert "is 8 tokens; one query" in refused("attention", "-p", PROMPT, "--token-idx", "*")
    assert "no head of --heads 0.1 is in --layers 1" in refused(
        "attention", "-p", "a", "--heads", "0.1", "--layers", "1"
    )
    assert "there is no folder" in refused("attention", "-p", "a", "-o", "no/a.json")


def test_help_says_when_flash_attention_is_off() -> None:
    text = shown_help("attention")
    assert (
        "Reading patterns needs flash attention off" in text and "everywhere else it is on" in text
    )


def test_cells_are_coloured_by_weight() -> None:
    text = cells(np.asarray([[1, 0], [0, 0.5]]), [" a", "\n"])
    assert text.plain.splitlines()[:2] == ["          a   0     ", "         \\n   1     "]
    styles = [str(s.style) for s in text.spans]
    assert styles.count("on rgb(252,255,164)") == 1 and styles.count("on rgb(0,0,4)") == 1


def test_a_terminal_shows_cells_and_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attention", "heads"):
        monkeypatch.setattr(f"mia.cli.{module}.on_terminal", lambda: True)
    shown = run("attention", "-p", PROMPT, "--heads", "1.3").stdout.splitlines()
    assert shown[0].startswith("layer 1 · head 3 (most: ") and len(shown) == 2 + N
    assert [line.split()[0] for line in shown[1:3]] == ["The", "capital"]
    long = refused("attention", "-p", " cat" * 40, "--heads", "1.3")
    assert "a map of 40 tokens is wider than this terminal" in long
    lines = run("heads", "-p", PROMPT).stdout.splitlines()
    assert lines[0] == "induction (layers down, heads across)"
    assert lines[1].split() == [str(h) for h in range(HEADS)]
    scores = document("heads", "-p", PROMPT)["scores"]["induction"]
    assert lines[2].split() == ["0", *(f"{x:.2f}" for x in scores[0])]
    drops = run("ablate", "-p", PROMPT, "--answer", " France", "--heads", "1.2").stdout.splitlines()
    assert drops[0].startswith("drop in log-probability") and len(drops[2].split()) == 1


# -- heads -----------------------------------------------------------------------------------


def test_heads_of_a_prompt(oracle: Oracle, tokens: list[int]) -> None:
    from mia.methods.heads import score_pattern

    found = document("heads", "-p", PROMPT, "-k", "2")
    want = score_pattern(_patterns(oracle, tokens), tokens)
    for name, a in found["scores"].items():
        assert np.abs(np.asarray(a) - want[name]).max() < 1e-4
    top = found["top"]["previous"]
    assert len(top) == 2 and top[0]["score"] == np.max(found["scores"]["previous"])
    assert found["prompts"] == 1
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
    assert document("heads", "-p", "The cat")["scores"]["induction"] == [[None] * HEADS] * LAYERS


def test_heads_on_random_tokens_and_without_the_best() -> None:
    words = ("heads", "--repeat-random", "6", "--prompts", "2", "--ablate-top", "2")
    found = document(*words)
    assert len(found["tokens"]) == 13 and found["prompts"] == 2
    loss = found["copying"]["loss"]
    assert [r["what"] for r in loss] == [
        "whole model",
        "without the top 2",
        *["without 2 random"] * 5,
    ]
    best = [[t["layer"], t["head"]] for t in found["top"]["induction"][:2]]
    assert loss[1]["heads"] == best and loss[0]["factor"] == 1
    assert all(best[0] not in r["heads"] for r in loss[2:])
    assert document(*words) == found  # the same seed, the same everything
    assert document(*words, "--seed", "1")["tokens"] != found["tokens"]
    factors = [r["factor"] for r in loss[2:]]
    want = {"least": min(factors), "median": sorted(factors)[2], "most": max(factors)}
    assert found["copying"]["random_factor"] == pytest.approx(want, abs=1e-5)
    assert len(document(*words, "--draws", "3")["copying"]["loss"]) == 5
    assert "loss on the copy, without the top 2: " in run(*words).stdout


def test_heads_draws_a_score() -> None:
    run("heads", "-p", PROMPT, "--draw", "heads.svg", "--score", "previous")
    assert ">previous</text>" in Path("heads.svg").read_text()


def test_heads_refuses() -> None:
    assert "give either a prompt" in refused("heads")
    assert "give either a prompt" in refused("heads", "-p", "a", "--repeat-random", "4")
    assert "--ablate-top needs --repeat-random" in refused("heads", "-p", "a", "--ablate-top", "1")
    assert "unknown score 'copying'" in refused("heads", "-p", "a", "--score", "copying")
    assert "the model has 18 heads" in refused(
        "heads", "--repeat-random", "4", "--ablate-top", "18"
    )


# -- ablate ------------------------------------------------------------------------------------


def _logprob(logits: np.ndarray, token: int) -> float:
    return float(logits[token] - np.log(np.exp(logits).sum()))


def test_ablate_sweeps_all_heads(oracle: Oracle, tokens: list[int]) -> None:
    found = document("ablate", "-p", PROMPT, "--answer", " France", "-k", "3")
    (answer,) = (t["id"] for t in found["answer"])
    clean = _logprob(oracle.run(tokens)["logits"][-1], answer)
    assert abs(found["logprob"] - clean) < 1e-4 and found["ablated_at"] == [7]

    def silence(z: np.ndarray) -> np.ndarray:
        z[-1, 8 * 4 : 8 * 5] = 0
        return z

    without = oracle.run(tokens, {"head_out.1": silence})["logits"][-1]
    assert abs(found["drop"][1][4] - (clean - _logprob(without, answer))) < 1e-4
    values = [abs(t["value"]) for t in found["top"]]
    assert len(values) == 3 and values[0] == np.abs(found["drop"]).max()
    lines = run("ablate", "-p", PROMPT, "--answer", " France", "-k", "1").stdout.splitlines()
    top = found["top"][0]
    assert lines[0] == f"log-probability of ' France': {found['logprob']:.4f}"
    assert lines[1].startswith(f"without {top['layer']}.{top['head']}: ")
    assert lines[1].endswith(f"(drop {top['value']:+.4f})")


def test_ablate_everywhere_is_what_run_with_ablate_does(oracle: Oracle, tokens: list[int]) -> None:
    def silence(z: np.ndarray) -> np.ndarray:
        z[:, 8 * 4 : 8 * 5] = 0
        return z

    words = ("ablate", "-p", PROMPT, "--answer", " France", "--heads", "1.4", "--token-idx", "*")
    found = document(*words)
    without = _logprob(
        oracle.run(tokens, {"head_out.1": silence})["logits"][-1], found["answer"][0]["id"]
    )
    assert abs(found["logprob"] - found["drop"][1][4] - without) < 1e-4
    assert found["drop"][0] == [None] * 6 and found["ablated_at"] == "all"
    same = document(*words, "--ablate-attention")
    assert abs(same["drop"][1][4] - found["drop"][1][4]) < 1e-4
    ran = document("run", "-p", PROMPT, "-n", "1", "--ablate", "1.4")["output_tokens"][0]
    logits = oracle.run(tokens, {"head_out.1": silence})["logits"][-1]
    assert ran["id"] == logits.argmax() and abs(ran["logprob"] - _logprob(logits, ran["id"])) < 1e-4


def test_ablate_draws_and_refuses() -> None:
    run("ablate", "-p", PROMPT, "--answer", " France", "--draw", "drop.png")
    assert Path("drop.png").stat().st_size > 3000
    assert "the answer is empty" in refused("ablate", "-p", PROMPT, "--answer", "")
    assert "--token-idx 9 is out of range" in refused(
        "ablate", "-p", PROMPT, "--answer", " France", "--token-idx", "9"
    )


# -- attribute ----------------------------------------------------------------------------------


def test_attribute_adds_up(oracle: Oracle, tokens: list[int]) -> None:
    found = document("attribute", "-p", PROMPT, "--answer", " France")
    logit = oracle.run(tokens)["logits"][-1][found["answer"]["id"]]
    total = found["embed"] + found["bias"] + sum(found["attn"]) + sum(found["mlp"])
    assert abs(found["logit"] - logit) < 1e-4 and abs(total - logit) < 1e-4
    assert abs(found["sum"] - logit) < 1e-4 and found["soft_capped"] is False
    assert np.abs(np.asarray(found["heads"]).sum(1) - found["attn"]).max() < 1e-4
    lines = run("attribute", "-p", PROMPT, "--answer", " France", "-k", "1").stdout.splitlines()
    assert f"(the model's own logit: {found['logit']:.4f})" in lines[-3]
    top = found["top"][0]
    assert lines[-2] == f"heads: {top['layer']}.{top['head']} {top['value']:+.4f}"


def test_attribute_against_and_picture() -> None:
    words = ("attribute", "-p", PROMPT, "--answer", " France", "--against", " Italy")
    found = document(*words, "--draw", "a.png")
    one, two = (
        document("attribute", "-p", PROMPT, "--answer", t)["logit"] for t in (" France", " Italy")
    )
    assert abs(found["logit"] - (one - two)) < 1e-4 and found["against"]["text"] == " Italy"
    assert Path("a.png").stat().st_size > 3000
    assert "the model's own difference" in run(*words).stdout


def test_attribute_refuses() -> None:
    assert "tokens (" in refused("attribute", "-p", PROMPT, "--answer", " Berlin")
    assert "one logit is attributed" in refused(
        "attribute", "-p", PROMPT, "--answer", " France", "--token-idx", "0,1"
    )


# -- the options of every command ------------------------------------------------------------------


def _first(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = document("run", "-p", PROMPT, "-n", "1", *words)["output_tokens"][0]
    return found


def _is(found: dict[str, Any], logits: np.ndarray) -> None:
    assert found["id"] == logits.argmax()
    assert abs(found["logprob"] - _logprob(logits, found["id"])) < 1e-4


def test_select_keeps_one_head(oracle: Oracle, tokens: list[int]) -> None:
    def keep(z: np.ndarray) -> np.ndarray:
        z.reshape(len(z), HEADS, -1)[:, [0, 1, 3, 4, 5]] = 0
        return z

    _is(_first("--select", "1.2"), oracle.run(tokens, {"head_out.1": keep})["logits"][-1])
    _is(
        _first("--select", "1.2", "--ablate-attention"),
        oracle.run(tokens, {"head_out.1": keep})["logits"][-1],
    )


def test_ablate_with_the_mean_of_a_file(oracle: Oracle, tokens: list[int], path: Path) -> None:
    run("save", "head_out", "other.safetensors", "-p", "The dog sat on the mat")
    with Model(path, threads=1) as m:
        theirs = oracle.run(m.tokenize("The dog sat on the mat"))["head_out.2"]

    def mean(z: np.ndarray) -> np.ndarray:
        z[:, 8:16] = theirs[:, 8:16].mean(0)
        return z

    want = oracle.run(tokens, {"head_out.2": mean})["logits"][-1]
    _is(_first("--ablate", "2.1", "--ablate-with", "mean", "other.safetensors"), want)


def test_ablate_by_resampling_is_seeded() -> None:
    words = ("--ablate", "*.*", "--ablate-with", "resample")
    assert _first(*words) == _first(*words, "--ablate-seed", "0")
    assert _first(*words) != _first(*words, "--ablate-seed", "1")
    run("save", "head_out", "other.safetensors", "-p", "The dog")
    assert (
        _first("--ablate", "*.*", "--ablate-with", "resample-from", "other.safetensors") != _first()
    )


def test_blocks_add_up(oracle: Oracle, tokens: list[int]) -> None:
    def blind(scores: np.ndarray) -> np.ndarray:
        scores[5, :, 0] = scores[7, :, 3] = -np.inf
        return scores

    truth = {f"attn_scores.{i}": blind for i in range(LAYERS)}
    _is(_first("--block", "5->0", "--block", "-1->3"), oracle.run(tokens, truth)["logits"][-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ablate", "3.0"], "layer 3 is out of range; this model has 0 to 2"),
        (["--ablate", "nine"], "'nine' is not LAYER.HEAD"),
        (["--select", "0.9"], "head 9 is out of range; 0 to 5"),
        (
            ["--ablate-with", "resample"],
            "--ablate-with and --ablate-attention need --ablate or --select",
        ),
        (
            ["--ablate", "0.1", "--ablate-with", "noise"],
            "'noise' is not known; known: zero, mean FILE",
        ),
        (
            ["--ablate", "0.1", "--ablate-with", "mean", "no.safetensors"],
            "there is no file no.safetensors",
        ),
        (
            ["--ablate", "0.1", "--ablate-with", "resample", "--ablate-attention"],
            "it takes no resample",
        ),
        (["--block", "5-0"], "'5-0' is not QUERIES->KEYS"),
        (["--block", "9->0"], "token index 9 is out of range; 0 to 7"),
        (["--block", "3->*"], "query 3 has no key left to look at in layer 0, head 0"),
    ],
)
def test_wrong_changes_are_refused(words: list[str], message: str) -> None:
    assert message in refused("run", "-p", PROMPT, "-n", "1", *words)


def test_mean_without_a_file_is_a_usage_error() -> None:
    result = run("run", "-p", PROMPT, "--ablate", "0.1", "--ablate-with", "mean", code=2)
    assert "--ablate-with takes 2 values, 1 are given" in result.stderr


def test_sites_say_what_heads_are() -> None:
    about = {s["site"]: s["about"] for s in json.loads(run("sites", "--json").stdout)["sites"]}
    assert (
        about["q"].startswith("6 query heads of 8")
        and about["head_out"] == "6 heads of 8 side by side, before W_O"
    )
    assert about["v"] == "2 value heads of 8, each read by 3 query heads"
    assert about["resid_post"] == "" and "not with flash attention" in about["attn_pattern"]
    graph = run("sites", "--graph").stdout
    assert any(line.endswith("= head_out.1") and "kqv_out-1" in line for line in graph.splitlines())
    assert any(
        line.endswith("= attn_scores.1") and "MUL_MAT" in line for line in graph.splitlines()
    )
