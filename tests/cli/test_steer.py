"""steer, steer-explain and steer-words as a person types them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, greedy, refused, run

from mia.llama.gguf_write import write_gguf
from mia.model import Model
from mia.vectors import Vector, load

pytestmark = pytest.mark.usefixtures("vector_files")
PROMPT = "The capital of France is"


def test_steer_shows_both_runs(path: Path) -> None:
    got = document("steer", "v.gguf", "--coeff", "3", "--layers", "1", "-p", PROMPT, "-n", "4")
    tokens = [t["id"] for t in got["tokens"]]
    v = load("v.gguf")[1]
    want = greedy(path, tokens, {"resid_post.1": lambda x: x + 3 * v}, 4)
    assert [t["id"] for t in got["output_tokens"]] == want
    assert got["output"] == "".join(t["text"] for t in got["output_tokens"])
    assert got["steered"] == [
        {"coeff": 3.0, "output": got["output"], "output_tokens": got["output_tokens"]}
    ]
    plain = document("run", "-p", PROMPT, "-n", "4")["output"]
    assert got["baseline"] == plain and got["model"]["architecture"] == "llama"
    lines = run("steer", "v.gguf", "--coeff", "3", "--layers", "1", "-p", PROMPT, "-n", "4").stdout
    assert lines.splitlines()[0] == f"baseline:  {plain}".rstrip("\n") or plain in lines
    assert "3:" in lines
    only = document("steer", "v.gguf", "-p", PROMPT, "-n", "2", "--no-baseline")
    assert "baseline" not in only


def test_several_coefficients_are_side_by_side() -> None:
    got = document("steer", "v.gguf", "--coeff", "-3,0.5,3", "-p", PROMPT, "-n", "4")
    assert [r["coeff"] for r in got["steered"]] == [-3, 0.5, 3]
    for row in got["steered"]:
        one = document("steer", "v.gguf", "--coeff", f"{row['coeff']}", "-p", PROMPT, "-n", "4")
        assert one["output"] == row["output"]


def test_arithmetic_and_several_vectors_are_one_sum(path: Path) -> None:
    load("v.gguf").save("w.gguf")
    sums = [
        document("steer", "2*v.gguf", "-p", PROMPT, "-n", "5"),
        document("steer", "v.gguf", "w.gguf", "-p", PROMPT, "-n", "5"),
        document("steer", "v.gguf", "--coeff", "2", "-p", PROMPT, "-n", "5"),
    ]
    assert len({s["output"] for s in sums}) == 1
    nothing = document("steer", "v.gguf - w.gguf", "-p", PROMPT, "-n", "5")
    assert nothing["output"] == nothing["baseline"]


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        (("--token-idx", "3.."), 3, None),
        (("--token-idx", "-1"), 5, None),
        (("--where", "prompt"), 0, 6),
        (("--where", "generated"), 6, None),
        (("--token-idx", "2..", "--where", "prompt"), 2, 6),
    ],
)
def test_which_tokens(path: Path, options: tuple[str, ...], first: int, last: int | None) -> None:
    got = document(
        "steer", "v.gguf", "--layers", "2", "--coeff", "4", "-p", PROMPT, "-n", "5", *options
    )
    tokens = [t["id"] for t in got["tokens"]]
    assert len(tokens) == 6
    v = load("v.gguf")[2]

    def add(x: np.ndarray) -> np.ndarray:
        x[first:last] += 4 * v
        return x

    assert [t["id"] for t in got["output_tokens"]] == greedy(path, tokens, {"resid_post.2": add}, 5)


def test_operators_and_normalize(path: Path) -> None:
    got = document(
        "steer",
        "v.gguf",
        "--layers",
        "1",
        "--operator",
        "ablate",
        "--normalize",
        "-p",
        PROMPT,
        "-n",
        "4",
    )
    v = load("v.gguf")[1].astype(np.float64)

    def ablate(x: np.ndarray) -> np.ndarray:
        out = x - np.outer(x @ v, v) / (v @ v)
        return (
            out
            * np.linalg.norm(x, axis=1, keepdims=True)
            / np.linalg.norm(out, axis=1, keepdims=True)
        )

    tokens = [t["id"] for t in got["tokens"]]
    assert [t["id"] for t in got["output_tokens"]] == greedy(
        path, tokens, {"resid_post.1": ablate}, 4
    )


def test_explain_runs_nothing() -> None:
    got = document("steer-explain", "v.gguf", "-p", PROMPT)
    assert [(r["site"], r["path"]) for r in got["explain"]] == [
        ("resid_post.1", "control vector"),
        ("resid_post.2", "control vector"),
    ]
    assert "output" not in got
    lines = run("steer-explain", "v.gguf", "-p", PROMPT, "--coeff", "1,2").stdout.splitlines()
    assert all("callback  (a control vector steers all" in x for x in lines) and len(lines) == 2


def test_a_budget_chooses_the_coefficient() -> None:
    got = document(
        "steer", "v.gguf", "-p", PROMPT, "-n", "3", "--coeff", "0.1,0.5,4", "--kl-budget", "0.2"
    )
    within = [r["coeff"] for r in got["kl"] if r["kl"] <= 0.2]
    assert got["coeff"] == max(within) and len(got["kl"]) == 3
    fixed = document("steer", "v.gguf", "-p", PROMPT, "-n", "3", "--coeff", str(got["coeff"]))
    assert fixed["output"] == got["output"]
    assert "no coefficient stays within" in refused(
        "steer", "v.gguf", "-p", PROMPT, "--kl-budget", "1e-9"
    )


def test_words_are_measured_in_samples() -> None:
    Path("words.txt").write_text("cat\nis\nThe\nparis\n")
    samples = ("--words", "words.txt", "--samples", "4")
    words = ("steer-words", "v.gguf", "-p", PROMPT, "-n", "6", *samples)
    got = document(*words, "--temperature", "1", "--coeff", "0,4")
    assert [r["coeff"] for r in got["measure"]] == [0, 0, 4]
    from mia.measure.metrics import word_share

    for row in got["measure"]:
        assert len(row["texts"]) == 4
        shares = [word_share(t, {"cat", "is", "the", "paris"}) for t in row["texts"]]
        mean, low, high = (row["share"][k] for k in ("value", "low", "high"))
        assert mean == pytest.approx(np.mean(shares), abs=1e-6) and low <= mean <= high
    assert "share of listed words" in run(*words, "--temperature", "1").stdout
    by_default = document(*words)
    assert by_default == document(*words, "--temperature", "1")
    assert "give a temperature" in refused(*words, "--temperature", "0")
    assert "--samples" in run(*words, "--samples", "1", code=2).stderr


def test_older_names_of_operators_are_read() -> None:
    def explained(operator: str) -> dict[str, Any]:
        made = document("steer-explain", "v.gguf", "-p", PROMPT, "--operator", operator)
        return {k: v for k, v in made.items() if k != "run"}  # the words as they were typed

    for old, name in (("ablate", "project_out"), ("ablate-add", "project_out_add")):
        rows = explained(old)["explain"]
        assert {r["operator"] for r in rows} == {name}
        assert explained(name) == explained(old)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--coeff", "much"), "--coeff 'much' is not a number"),
        (("--coeff", "inf"), "not finite"),
        (("--operator", "push"), "unknown operator 'push'; known: replace, add"),
        (("--layers", "9"), "layer 9 is out of range; there are 0 to 2"),
        (("--layers", "0"), "none of these layers; it has 1..2"),
        (("--token-idx", "99"), "99 is out of range"),
        (
            ("--token-idx", "1", "--where", "generated"),
            "tokens cannot be combined with where='generated'",
        ),
        (("--kl-budget", "-1"), "not positive"),
        (("--operator", "ablate", "--coeff", "1,4"), "'project_out' takes no coefficient"),
        (("--operator", "ablate", "--coeff", "1"), "'project_out' takes no coefficient"),
        (("--operator", "ablate", "--kl-budget", "1"), "no coefficient that a budget could"),
    ],
)
def test_steer_refuses(options: tuple[str, ...], message: str) -> None:
    assert message in refused("steer", "v.gguf", "-p", PROMPT, *options)


def test_bad_vectors_are_one_clear_line() -> None:
    Vector({1: np.ones(7, np.float32)}).save("narrow.gguf")
    Vector({9: np.ones(48, np.float32)}).save("deep.gguf")
    nan = {"direction.1": np.full(48, np.nan)}
    write_gguf("nan.gguf", {"general.architecture": "controlvector"}, nan)
    for file, message in (
        ("narrow.gguf", "narrow.gguf has directions of 7; the model's width at resid_post is 48"),
        ("deep.gguf", "deep.gguf has a direction for layer 9; the model has 0 to 2"),
        ("nan.gguf", "layer 1 has numbers that are not finite"),
        ("gone.gguf", "there is no file gone.gguf"),
    ):
        assert message in refused("steer", file, "-p", PROMPT)
        assert message.split("; the model's")[0] in refused("run", "--steer", file, "-p", PROMPT)


def test_a_budget_takes_the_coefficients_that_are_given() -> None:
    words = ("steer", "v.gguf", "-p", PROMPT, "-n", "3", "--kl-budget")
    assert [r["coeff"] for r in document(*words, "99", "--coeff", "1")["kl"]] == [1]
    assert len(document(*words, "99")["kl"]) == 12
    assert document(*words, "99", "--coeff", "-0.1,-0.5")["coeff"] == -0.5


def test_explain_knows_what_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("steer-explain", "v.gguf", "-p", PROMPT)

    def paths(*more: str) -> set[str]:
        return {r["path"] for r in document(*words, *more)["explain"]}

    monkeypatch.delattr(Model, "run")  # nothing is run
    assert paths("--coeff", "1,2") == {"callback"}
    assert paths("--coeff", "2") == paths() == {"control vector"}
    own = document(*words, "--operator", "own_functions:halfway")["explain"]
    assert {r["operator"] for r in own} == {"own_functions:halfway"}


def test_a_document_says_how_it_was_steered() -> None:
    words = ("steer", "2*v.gguf", "-p", PROMPT, "-n", "1", "--layers", "1", "--token-idx", "2..")
    assert document(*words, "--operator", "clamp", "--normalize")["steering"] == {
        "vectors": [{"vector": "2*v.gguf", "site": "resid_post", "layers": [1]}],
        "operator": "clamp",
        "tokens": "all",
        "token_idx": "2..",
        "normalize": True,
    }
    got = document("steer", "v.gguf", "-p", PROMPT, "-n", "1", "--where", "prompt")["steering"]
    assert got["tokens"] == "prompt" and got["vectors"][0]["layers"] == [1, 2]


def test_layers_that_a_vector_has_not_are_named() -> None:
    result = run("steer", "v.gguf", "-p", PROMPT, "-n", "1", "--layers", "0-2")
    assert result.stderr.splitlines() == ["mia: v.gguf has no layer 0: it is not steered there"]
    for words in (
        ("perplexity", "-p", PROMPT, "--steer-layers", "0-2"),
        ("perplexity-sweep", "--on", "pairs.jsonl", "--layers", "0-2"),
    ):
        result = run(*words, "--steer", "v.gguf")
        assert "v.gguf has no layer 0: it is not" in result.stderr
    result = run("perplexity", "-p", PROMPT, "--steer", "v.gguf", "--steer-layers", "1")
    assert result.stderr == ""


def test_a_vector_of_another_model_is_said(path: Path) -> None:
    with Model(path, threads=1) as m:
        sha = m.file_hash
    v = load("v.gguf")
    for name, facts in (("own", {"model_sha256": sha}), ("alien", {"model_sha256": "0" * 64})):
        Vector(v.directions, metadata={**facts, "model": "big"}).save(f"{name}.gguf")
    said = "was made with another model, big\n"
    Path("on.txt").write_text("The cat is red\n")
    for words in (
        ("steer", "alien.gguf", "-p", PROMPT, "-n", "1"),
        ("steer", "own.gguf - alien.gguf", "-p", PROMPT, "-n", "1"),
        ("perplexity", "-p", PROMPT, "--steer", "alien.gguf"),
        ("perplexity-sweep", "--on", "on.txt", "--steer", "alien.gguf"),
    ):
        stderr = run(*words).stderr
        assert stderr.endswith(said) and stderr.count("\n") == 1 and "alien.gguf" in stderr
        assert run(*words, "-q").stderr == ""
    assert run("steer", "own.gguf", "-p", PROMPT, "-n", "1").stderr == ""


def test_a_prompt_file_may_begin_with_a_byte_order_mark() -> None:
    Path("p.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    marked, plain = (document("run", *p, "-n", "1") for p in (("-f", "p.txt"), ("-p", PROMPT)))
    assert marked["tokens"] == plain["tokens"]
