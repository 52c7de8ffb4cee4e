"""actadd as a person types it."""

from pathlib import Path

import numpy as np
import pytest
from commands import document, greedy, refused, run
from oracle import Oracle

from mia.methods import actadd
from mia.model import Model

pytestmark = pytest.mark.usefixtures("vector_files")
PROMPT = "The capital of France is"


def test_actadd(path: Path) -> None:
    words = (
        "actadd",
        "--plus",
        "The cat",
        "--minus",
        "no",
        "--coeff",
        "4",
        "--layers",
        "1",
        "-p",
        PROMPT,
    )
    got = document(*words, "-n", "4")

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
    rows = document(*words, "-n", "4", "--samples", "3", "--temperature", "1", "--seed", "7")[
        "samples"
    ]
    assert [r["seed"] for r in rows] == [7, 8, 9]
    twice = ("-n", "2", "--samples", "1", "--temperature", "1")
    assert "0 unsteered: " in run(*words, *twice).stdout


def test_actadd_of_several_and_what_it_refuses() -> None:
    two = ("actadd", "--plus", "The cat", "--plus", "blue", "-p", PROMPT)
    minus = ("--minus", "no", "--minus", "red")
    got = document(*two, *minus, "--coeff", "1", "--layers", "1", "-n", "2")
    assert got["output"]
    each = document(*two, *minus, "--coeff", "2,2", "--layers", "1,1", "-n", "2")["additions"]
    assert [(a["coeff"], a["layer"]) for a in each] == [(2, 1), (2, 1)]
    each = document(*two, *minus, "--coeff", "-1,2", "--layers", "2,1", "-n", "2")["additions"]
    assert [(a["coeff"], a["layer"]) for a in each] == [(-1, 2), (2, 1)]
    refusal = refused(*two, "--minus", "no", "--layers", "1")
    assert "got 2 plus texts but 1 minus text" in refusal
    assert "got 2 plus texts but 3 layers" in refused(*two, "--layers", "1,1,1")
    refusal = refused(*two, "--layers", "1", "--coeff", "1,2,1")
    assert "got 2 plus texts but 3 coefficients" in refusal
    assert "layer 6 is out of range" in refused("actadd", "--plus", "cat", "-p", PROMPT)
    long = ("actadd", "--plus", PROMPT * 2, "--layers", "1", "-p", "cat")
    assert "use a longer prompt" in refused(*long)


def test_actadd_says_what_was_set_against_what(path: Path) -> None:
    texts = ("--plus", "The cat sat", "--minus", " yes")
    words = ("actadd", *texts, "--layers", "1", "--coeff", "2", "-p", PROMPT, "-n", "2")
    (a,) = document(*words)["additions"]
    assert (a["plus"], a["minus"], a["coeff"], a["layer"]) == ("The cat sat", " yes", 2, 1)
    assert [t["text"] for t in a["minus_tokens"]][-3:] == [" yes", " ", " "]
    assert [t["id"] for t in a["plus_tokens"]] == _tokens(path, "The cat sat")
    assert len(a["plus_tokens"]) == len(a["minus_tokens"])
    sampled = document(*words, "--samples", "1", "--temperature", "1")
    assert sampled["additions"] == [a]


def test_actadd_refuses_what_would_show_nothing() -> None:
    words = ("actadd", "--plus", "cat", "--layers", "1", "-p", PROMPT, "-n", "2")
    assert "give a temperature" in refused(*words, "--samples", "2")
    sampled = (*words, "--temperature", "1", "--samples")
    assert "cannot be combined with --no-baseline" in refused(*sampled, "2", "--no-baseline")
    assert "or equal to 1" in " ".join(run(*sampled, "0", code=2).stderr.split())
    empty = ("actadd", "--plus", "", "--minus", "", "--layers", "1", "-p", PROMPT)
    assert "both empty" in refused(*empty)


def _tokens(path: Path, text: str) -> list[int]:
    with Model(path, threads=1) as m:
        return m.tokenize(text)
