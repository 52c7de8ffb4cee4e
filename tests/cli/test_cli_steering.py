"""Commands about steering as a person types them: steer, vector, actadd, caa, iti, perplexity."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, refused, run
from oracle import Oracle

from mia.llama.gguf_write import write_gguf
from mia.vectors import Vector, load

PROMPT = "The capital of France is"


@pytest.fixture(autouse=True)
def data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    make = {i: rng.standard_normal(48).astype(np.float32) for i in (1, 2)}
    Vector(make, metadata={"name": "v", "architecture": "llama"}).save("v.gguf")
    Path("pairs.jsonl").write_text(
        '{"positive": "The cat sat", "negative": "The dog sat"}\n'
        '{"positive": "sky is blue", "negative": "sky is red"}\n'
    )
    ab = [
        {
            "question": f"{q}\n\nChoices:\n (A) yes\n (B) no and no",
            "answer_matching_behavior": "(A)" if i % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
        }
        for i, q in enumerate(["cat is red?", "sky is blue?", "Paris in Rome?", "the dog?"])
    ]
    Path("ab.json").write_text(json.dumps(ab))


def greedy(path: Path, tokens: list[int], edits: Any, n: int) -> list[int]:
    """The oracle's continuation."""
    out: list[int] = []
    for _ in range(n):
        out.append(int(Oracle(path).run([*tokens, *out], edits)["logits"][-1].argmax()))
    return out


# -- steer -------------------------------------------------------------------------


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
        (("--from-token-idx", "3"), 3, None),
        (("--from-token-idx", "-1"), 5, None),
        (("--prompt-only",), 0, 6),
        (("--generated-only",), 6, None),
        (("--from-token-idx", "2", "--prompt-only"), 2, 6),
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
    got = document("steer", "v.gguf", "-p", PROMPT, "--explain")
    assert [(r["site"], r["path"]) for r in got["explain"]] == [
        ("resid_post.1", "control vector"),
        ("resid_post.2", "control vector"),
    ]
    assert "output" not in got
    lines = run("steer", "v.gguf", "-p", PROMPT, "--explain", "--coeff", "1,2").stdout.splitlines()
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
    words = ("steer", "v.gguf", "-p", PROMPT, "-n", "6", "--words", "words.txt", "--samples", "4")
    got = document(*words, "--temperature", "1", "--coeff", "0,4")
    assert [r["coeff"] for r in got["measure"]] == [0, 0, 4]
    from mia.measure.metrics import word_share

    for row in got["measure"]:
        assert len(row["texts"]) == 4
        shares = [word_share(t, {"cat", "is", "the", "paris"}) for t in row["texts"]]
        mean, low, high = (row["share"][k] for k in ("value", "low", "high"))
        assert mean == pytest.approx(np.mean(shares), abs=1e-6) and low <= mean <= high
    assert "share of listed words" in run(*words, "--temperature", "1").stdout
    assert "give --temperature" in refused(*words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--coeff", "much"), "--coeff 'much' is not a number"),
        (("--coeff", "inf"), "not finite"),
        (("--operator", "push"), "unknown operator 'push'; known: add"),
        (("--layers", "9"), "layer 9 is out of range; this model has 0 to 2"),
        (("--layers", "0"), "none of these layers; it has 1-2"),
        (("--prompt-only", "--generated-only"), "no token to steer"),
        (("--from-token-idx", "99"), "99 is out of range"),
        (("--from-token-idx", "1", "--generated-only"), "about the prompt"),
        (("--kl-budget", "-1"), "not positive"),
        (("--operator", "ablate", "--coeff", "1,4"), "ablate has no coefficient"),
        (("--operator", "ablate", "--kl-budget", "1"), "run it without --kl-budget"),
        (("--samples", "9"), "--samples is for --words"),
        (("--words", "french_words", "--no-baseline"), "takes no --no-baseline"),
    ],
)
def test_steer_refuses(options: tuple[str, ...], message: str) -> None:
    assert message in refused("steer", "v.gguf", "-p", PROMPT, *options)


def test_bad_vectors_are_one_clear_line() -> None:
    Vector({1: np.ones(7)}).save("narrow.gguf")
    Vector({9: np.ones(48)}).save("deep.gguf")
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
    words = ("steer", "v.gguf", "-p", PROMPT, "--explain", "--coeff", "1,2")

    def paths(*more: str) -> set[str]:
        return {r["path"] for r in document(*words, *more)["explain"]}

    assert paths() == {"callback"}
    assert paths("--words", "french_words", "--temperature", "1") == {"control vector"}
    from mia.model import Model

    monkeypatch.delattr(Model, "run")  # nothing is run
    assert paths("--kl-budget", "0.5") == {"control vector"}
    own = document(*words, "--operator", "own_functions:halfway")["explain"]
    assert {r["operator"] for r in own} == {"own_functions:halfway"}


def test_a_document_says_how_it_was_steered() -> None:
    words = ("steer", "2*v.gguf", "-p", PROMPT, "-n", "1", "--layers", "1", "--from-token-idx", "2")
    assert document(*words, "--operator", "clamp", "--normalize")["steering"] == {
        "vectors": [{"vector": "2*v.gguf", "site": "resid_post", "layers": [1]}],
        "operator": "clamp",
        "tokens": "all",
        "from_token_idx": 2,
        "normalize": True,
    }
    got = document("steer", "v.gguf", "-p", PROMPT, "-n", "1", "--prompt-only")["steering"]
    assert got["tokens"] == "prompt" and got["vectors"][0]["layers"] == [1, 2]


def test_layers_that_a_vector_has_not_are_named() -> None:
    result = run("steer", "v.gguf", "-p", PROMPT, "-n", "1", "--layers", "0-2")
    assert result.stderr.splitlines() == ["mia: v.gguf has no layer 0: it is not steered there"]
    for more in (("-p", PROMPT), ("--sweep", "layers", "--on", "pairs.jsonl")):
        result = run("perplexity", *more, "--steer", "v.gguf", "--steer-layers", "0-2")
        assert "v.gguf has no layer 0: it is not" in result.stderr
    result = run("perplexity", "-p", PROMPT, "--steer", "v.gguf", "--steer-layers", "1")
    assert result.stderr == ""


def test_a_vector_of_another_model_is_said(path: Path) -> None:
    from mia.model import Model

    with Model(path, threads=1) as m:
        sha = m.file_hash
    v = load("v.gguf")
    for name, facts in (("own", {"model_sha256": sha}), ("alien", {"model_sha256": "0" * 64})):
        Vector(v.directions, metadata={**facts, "model": "big"}).save(f"{name}.gguf")
    said = "was made on another model, big\n"
    Path("on.txt").write_text("The cat is red\n")
    for words in (
        ("steer", "alien.gguf", "-p", PROMPT, "-n", "1"),
        ("steer", "own.gguf - alien.gguf", "-p", PROMPT, "-n", "1"),
        ("perplexity", "-p", PROMPT, "--steer", "alien.gguf"),
        ("perplexity", "--sweep", "layers", "--on", "on.txt", "--steer", "alien.gguf"),
    ):
        stderr = run(*words).stderr
        assert stderr.endswith(said) and stderr.count("\n") == 1 and "alien.gguf" in stderr
        assert run(*words, "-q").stderr == ""
    assert run("steer", "own.gguf", "-p", PROMPT, "-n", "1").stderr == ""


def test_a_prompt_file_may_begin_with_a_byte_order_mark() -> None:
    Path("p.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    marked, plain = (document("run", *p, "-n", "1") for p in (("-f", "p.txt"), ("-p", PROMPT)))
    assert marked["tokens"] == plain["tokens"]


# -- vector ------------------------------------------------------------------------


def test_train_show_combine_convert(path: Path) -> None:
    result = run("vector", "train", "pairs.jsonl", "-o", "t.gguf")
    assert "layer 0 is left out" in result.stderr and "wrote t.gguf" in result.stderr
    t = load("t.gguf")
    assert t.layers == [1, 2] and t.name == "t" and t.metadata["n_pairs"] == "2"
    oracle = Oracle(path)
    from mia.model import Model

    with Model(path, threads=1) as m:
        rows = [
            oracle.run(m.tokenize(a))["resid_post.2"][-1]
            - oracle.run(m.tokenize(b))["resid_post.2"][-1]
            for a, b in (("The cat sat", "The dog sat"), ("sky is blue", "sky is red"))
        ]
        np.testing.assert_allclose(t[2], np.mean(rows, 0), atol=1e-4)

    shown = document("vector", "show", "t.gguf", "-k", "3")
    assert [r["layer"] for r in shown["layers"]] == [1, 2]
    scores = oracle.lens(t[2][None])[0]
    with Model(path, threads=1) as m:
        assert shown["layers"][1]["toward"] == [m.piece(int(i)) for i in np.argsort(-scores)[:3]]
        assert shown["layers"][1]["away"] == [m.piece(int(i)) for i in np.argsort(scores)[:3]]
    assert shown["layers"][1]["norm"] == pytest.approx(t.norms[2], abs=1e-5)
    assert "n_pairs: 2" in run("vector", "show", "t.gguf", "-k", "0").stdout

    run("vector", "combine", "t.gguf - 0.5*v.gguf", "-o", "c.safetensors", "-q")
    np.testing.assert_allclose(load("c.safetensors")[1], t[1] - 0.5 * load("v.gguf")[1], atol=1e-6)
    found = json.loads(run("vector", "convert", "c.safetensors", "-o", "c.gguf", "--json").stdout)
    assert found["file"] == "c.gguf" and found["name"] == "t - 0.5*v"
    np.testing.assert_array_equal(load("c.gguf")[2], load("c.safetensors")[2])
    run("vector", "combine", "c.gguf", "-o", "u.gguf", "--unit", "-q")
    assert load("u.gguf").norms[2] == pytest.approx(1)


def test_train_options(path: Path) -> None:
    got = document(
        "vector", "train", "pairs.jsonl", "-o", "t.safetensors", "--site", "ffn_out", "--method", "pca",
        "--read", "mean", "--layers", "0,2", "--no-bos",
    )  # fmt: skip
    assert got["site"] == "mlp_out" and [r["layer"] for r in got["layers"]] == [0, 2]
    assert got["metadata"]["aggregator"] == "pca" and got["metadata"]["read"] == "mean"
    assert [r["norm"] for r in got["layers"]] == [pytest.approx(1)] * 2
    run("vector", "train", "pairs.jsonl", "-o", "z.gguf", "--layer-zero", "-q")
    assert load("z.gguf").layers == [0, 1, 2]
    shown = run("vector", "show", "t.safetensors", "-k", "2").stdout
    assert "site: mlp_out" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pairs.jsonl", "-o", "t.txt"), "ends in .gguf or .safetensors"),
        (("pairs.jsonl", "-o", "t.gguf", "--method", "median"), "unknown aggregator 'median'"),
        (("pairs.jsonl", "-o", "no/t.gguf"), "there is no folder no"),
        (("gone.jsonl", "-o", "t.gguf"), "there is no file gone.jsonl"),
        (("empty.jsonl", "-o", "t.gguf"), "is empty"),
        (("two.txt", "one.txt", "-o", "t.gguf"), "two.txt has 2 texts and one.txt has 1"),
        (("pairs.jsonl", "-o", "t.gguf", "--site", "logits"), "a site with layers"),
        (("pairs.jsonl", "-o", "t.gguf", "--site", "mlp_out"), ".safetensors can hold"),
        (("pairs.jsonl", "-o", "t.gguf", "--layers", "7"), "layer 7 is out of range"),
    ],
)
def test_train_refuses(words: tuple[str, ...], message: str) -> None:
    Path("empty.jsonl").write_text("")
    Path("two.txt").write_text("a\nb\n")
    Path("one.txt").write_text("a\n")
    assert message in refused("vector", "train", *words)
    assert not list(Path().glob("t.*"))


def test_combine_refuses() -> None:
    for expression, message in (
        ("v.gguf + gone.gguf", "there is no file gone.gguf"),
        ("v.gguf * v.gguf", "numbers only"),
        ("v.gguf +", "ends where"),
    ):
        assert message in refused("vector", "combine", expression, "-o", "t.gguf")


# -- actadd ------------------------------------------------------------------------


def test_actadd(path: Path) -> None:
    words = (
        "actadd",
        "--plus",
        "The cat",
        "--minus",
        "no",
        "--coeff",
        "4",
        "--layer",
        "1",
        "-p",
        PROMPT,
    )
    got = document(*words, "-n", "4")
    from mia.methods import actadd
    from mia.model import Model

    with Model(path, threads=1) as m:
        plus, minus = actadd.padded(m, "The cat", "no")
    oracle = Oracle(path)
    h = oracle.run(plus)["resid_pre.1"] - oracle.run(minus)["resid_pre.1"]

    def add(x: np.ndarray) -> np.ndarray:
        x[: len(h)] += 4 * h
        return x

    tokens = [t["id"] for t in got["tokens"]]
    assert [t["id"] for t in got["output_tokens"]] == greedy(path, tokens, {"resid_pre.1": add}, 4)
    assert "baseline" in got
    rows = document(*words, "-n", "4", "--compare", "3", "--temperature", "1", "--seed", "7")[
        "samples"
    ]
    assert [r["seed"] for r in rows] == [7, 8, 9]
    twice = ("-n", "2", "--compare", "1", "--temperature", "1")
    assert "0 unsteered: " in run(*words, *twice).stdout


def test_actadd_of_several_and_what_it_refuses() -> None:
    two = ("actadd", "--plus", "The cat", "--plus", "blue", "-p", PROMPT)
    got = document(
        *two, "--minus", "no", "--minus", "red", "--coeff", "1", "--layer", "1", "-n", "2"
    )
    assert got["output"]
    assert "2 --plus are given and 1 --minus" in refused(*two, "--minus", "no", "--layer", "1")
    assert "2 --plus are given and 3 --layer" in refused(*two, *("--layer", "1") * 3)
    assert "layer 6 is out of range" in refused("actadd", "--plus", "cat", "-p", PROMPT)
    long = ("actadd", "--plus", PROMPT * 2, "--layer", "1", "-p", "cat")
    assert "use a longer prompt" in refused(*long)


def test_actadd_says_what_was_set_against_what(path: Path) -> None:
    words = ("actadd", "--plus", "The cat sat", "--minus", " yes", "--layer", "1", "--coeff", "2")
    words = (*words, "-p", PROMPT, "-n", "2")
    (a,) = document(*words)["additions"]
    assert (a["plus"], a["minus"], a["coeff"], a["layer"]) == ("The cat sat", " yes", 2, 1)
    assert [t["text"] for t in a["minus_tokens"]][-3:] == [" yes", " ", " "]
    assert [t["id"] for t in a["plus_tokens"]] == _tokens(path, "The cat sat")
    assert len(a["plus_tokens"]) == len(a["minus_tokens"])
    sampled = document(*words, "--compare", "1", "--temperature", "1")
    assert sampled["additions"] == [a]


def test_actadd_refuses_what_would_show_nothing() -> None:
    words = ("actadd", "--plus", "cat", "--layer", "1", "-p", PROMPT, "-n", "2")
    assert "give --temperature" in refused(*words, "--compare", "2")
    sampled = (*words, "--temperature", "1", "--compare")
    assert "takes no --no-baseline" in refused(*sampled, "2", "--no-baseline")
    assert "or equal to 1" in " ".join(run(*sampled, "0", code=2).stderr.split())
    empty = ("actadd", "--plus", "", "--minus", "", "--layer", "1", "-p", PROMPT)
    assert "both empty" in refused(*empty)


# -- caa and iti -----------------------------------------------------------------------


def test_caa(path: Path) -> None:
    result = run("caa", "train", "ab.json", "-o", "{name}.gguf", "--items", "0..2")
    assert "ab.gguf: 3 items" in result.stdout
    assert load("ab.gguf").metadata["n_items"] == "3"
    words = (
        "caa",
        "eval",
        "ab.gguf",
        "ab.json",
        "--layers",
        "1,2",
        "--multipliers",
        "-2,2",
        "--items",
        "2..",
    )
    run(*words[:-1], "3..", code=1)
    got = document(*words)
    assert got["n_items"] == 2 and len(got["table"]) == 4
    from mia.methods import caa
    from mia.model import Model

    with Model(path, threads=1) as m:
        table = caa.evaluate(
            m, load("ab.gguf"), caa.load_items("ab.json")[2:], layers=[1, 2], multipliers=[-2, 2]
        )
    assert [r["p_matching"] for r in got["table"]] == pytest.approx(
        table.means.ravel().tolist(), abs=1e-5
    )
    assert "without steering" in run(*words).stdout
    both = run(
        "caa",
        "train",
        "ab.json",
        "refuse_vs_comply",
        "--items",
        "0..1",
        "--equal-norm",
        "-o",
        "{name}.gguf",
        "-q",
    )
    assert "refuse_vs_comply.gguf: 2 items" in both.stdout
    assert load("ab.gguf").norms[1] == pytest.approx(
        load("refuse_vs_comply.gguf").norms[1], rel=1e-5
    )


def test_caa_refuses() -> None:
    assert "need 2 files" in refused("caa", "train", "ab.json", "refuse_vs_comply", "-o", "x.gguf")
    assert "there are items 0 to 3" in refused(
        "caa", "train", "ab.json", "-o", "x.gguf", "--items", "2..9"
    )
    assert "not a range" in refused("caa", "train", "ab.json", "-o", "x.gguf", "--items", "some")
    assert "nor a shipped set" in refused("caa", "eval", "v.gguf", "gone.json")
    assert "must end in" in refused("caa", "eval", "v.gguf", "ab.json", "--plot", "x.txt")


def test_caa_draws() -> None:
    pytest.importorskip("matplotlib")
    run("caa", "eval", "v.gguf", "ab.json", "--layers", "1,2", "--plot", "t.png", "-q")
    assert Path("t.png").read_bytes().startswith(b"\x89PNG")


def test_iti() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    got = document("iti", "train", "ab.json", "-o", "i.safetensors", "--heads", "3", "--seed", "1")
    assert (
        len(got["heads"]) == 3 and np.shape(got["accuracy"]) == (3, 6) and got["site"] == "head_out"
    )
    plain = run("iti", "train", "ab.json", "-o", "j.safetensors", "--heads", "2").stdout
    assert plain.startswith("probe accuracy of 18 heads")
    words = ("iti", "eval", "i.safetensors", "ab.json", "--alpha", "0,5")
    scores = document(*words, "--generate", "1", "-n", "3")
    assert [s["alpha"] for s in scores["scores"]] == [0, 5] and len(scores["answers"]) == 1
    assert scores["scores"][0]["mc2_change"] == {"value": 0, "low": 0, "high": 0, "n": 4}
    assert "change of MC2" in run(*words, "--generate", "1", "-n", "3").stdout
    steered = document("steer", "i.safetensors", "--coeff", "5", "-p", PROMPT, "-n", "2")
    assert steered["output"]
    assert "which .safetensors can hold" in refused("iti", "train", "ab.json", "-o", "i.gguf")
    assert "the model has 18" in refused(
        "iti", "train", "ab.json", "-o", "k.safetensors", "--heads", "99"
    )


# -- perplexity ----------------------------------------------------------------------


def test_perplexity(path: Path) -> None:
    words = ("perplexity", "-p", "The cat sat on the red mat and the dog")
    got = document(*words, "--steer", "v.gguf", "--coeff", "2")
    ids = [*_tokens(path, "The cat sat on the red mat and the dog")]
    oracle, v = Oracle(path), load("v.gguf")

    def value(edits: Any) -> float:
        x = oracle.run(ids, edits)["logits"][:-1]
        x = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return float(np.exp(-x[np.arange(len(x)), ids[1:]].mean()))

    plain = value(None)
    changed = value({f"resid_post.{i}": lambda x, i=i: x + 2 * v[i] for i in (1, 2)})
    assert got["perplexity"] == pytest.approx(plain, rel=1e-4)
    assert got["changed"] == pytest.approx(changed, rel=1e-4)
    assert got["ratio"] == pytest.approx(changed / plain, rel=1e-4)
    assert got["n_scored"] == len(ids) - 1
    assert "times as much" in run(*words, "--steer", "v.gguf").stdout
    assert "times as much" not in run(*words).stdout


def _tokens(path: Path, text: str) -> list[int]:
    from mia.model import Model

    with Model(path, threads=1) as m:
        return m.tokenize(text)


def test_perplexity_names_what_it_did() -> None:
    Path("long.txt").write_text("The cat sat on the red mat. " * 12)
    words = ("perplexity", "-f", "long.txt", "--steer", "v.gguf", "--coeff", "2")
    got = document(*words, "--steer-layers", "2", "--window", "9999", "--ctx", "50")
    assert got["window"] == 50 and got["n_windows"] == -(-got["n_tokens"] // 50)
    assert got["steer"] == [{"vector": "v.gguf", "site": "resid_post", "layers": [2]}]
    assert got["coeff"] == 2 and got["stride"] is None
    result = run("perplexity", "-f", "long.txt", "--window", "9999", "--ctx", "50")
    assert "windows of up to 50" in result.stdout
    assert "no longer than the context; 50 is used" in result.stderr
    slid = document(*words, "--window", "40", "--stride", "10")
    assert slid["stride"] == 10 and slid["n_windows"] > got["n_windows"]
    assert slid["n_scored"] == slid["n_tokens"] - 1
    run("save", "l_out-1", "c.safetensors", "-p", PROMPT)
    patch = ("--patch", "l_out-1", "c.safetensors", "1", "2")
    assert document("perplexity", "-f", "long.txt", *patch)["ratio"] > 0
    line = refused("perplexity", "-f", "long.txt", "--window", "40", *patch)
    assert "changes at some tokens only need a text of one window" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plus", "cat"), "--plus needs --sweep layers"),
        (("--minus", "cat"), "--minus needs --sweep layers"),
        (("--on", "on.txt"), "--on needs --sweep layers"),
        (("--off", "on.txt"), "--off needs --sweep layers"),
        (("--plot", "x.png"), "--plot needs --sweep layers"),
        (("--coeff", "2"), "--coeff needs --steer"),
        (("--coeff", "0"), "--coeff needs --steer"),
        (("--steer-layers", "1"), "--steer-layers needs --steer"),
        (("--window", "9", "--stride", "12"), "a stride of 12 is out of range"),
    ],
)
def test_perplexity_refuses(options: tuple[str, ...], message: str) -> None:
    assert message in refused("perplexity", "-p", PROMPT, *options)


@pytest.mark.parametrize(
    "options",
    [
        ("-p", "x"),
        ("-f", "x"),
        ("--window", "9"),
        ("--stride", "9"),
        ("--ablate", "1.0"),
        ("--select", "1.0"),
        ("--block", "1->0"),
        ("--patch", "l_out-1", "x", "0", "0"),
        ("--chat",),
    ],
)
def test_a_sweep_refuses_what_it_would_not_use(options: tuple[str, ...]) -> None:
    words = ("perplexity", "--sweep", "layers", "--on", "pairs.jsonl", "--steer", "v.gguf")
    assert refused(*words, *options) == f"{options[0]} does nothing with --sweep"
    assert refused(*words, "--minus", "x") == "--minus needs --plus"


def test_a_sweep_counts_its_lines_and_names_the_long_one() -> None:
    words = ("perplexity", "--sweep", "layers", "--on", "on.txt", "--steer", "v.gguf", "--no-bos")
    Path("on.txt").write_text("The cat is red\nsky is blue and red\n the\n")
    got = document(*words)
    assert got["sweep"]["on-topic"]["n_texts"] == 2 and got["sweep"]["on-topic"]["n_skipped"] == 1
    assert got["steer"][0]["vector"] == "v.gguf" and got["coeff"] == 1
    assert "on.txt: 1 of 3 lines have no token to score" in run(*words).stderr
    Path("on.txt").write_text("The cat is red\n\n" + "sky is blue " * 9)
    line = refused(*words, "--ctx", "20")
    assert line.startswith("on.txt, line 3: ") and line.endswith("the context holds 20")


def test_perplexity_by_layer() -> None:
    Path("on.txt").write_text("The cat is red\n\nsky is blue and red\n")
    Path("off.txt").write_text("Paris is in Rome\n")
    words = ("perplexity", "--sweep", "layers", "--on", "on.txt", "--off", "off.txt")
    got = document(*words, "--plus", " cat", "--coeff", "2")
    assert got["layers"] == [0, 1, 2] and set(got["sweep"]) == {"on-topic", "off-topic"}
    assert len(got["sweep"]["on-topic"]["ratio"]) == 3
    by_vector = document(*words, "--steer", "v.gguf", "--coeff", "2")
    assert by_vector["layers"] == [1, 2]
    for i in (0, 1):
        low, high = by_vector["sweep"]["on-topic"]["interval"][i]
        assert low <= by_vector["sweep"]["on-topic"]["ratio"][i] <= high
    assert "on-topic ratio" in run(*words, "--steer", "v.gguf").stdout
    assert "known: layers" in refused("perplexity", "--sweep", "heads")
    assert "needs texts" in refused("perplexity", "--sweep", "layers", "--steer", "v.gguf")
    assert "injects one thing" in refused(*words)
