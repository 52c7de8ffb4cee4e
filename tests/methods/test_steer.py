"""Steered continuations as reports, against runs by hand."""

import pytest
from tiny import Tiny

from mia.errors import UsageError
from mia.measure.metrics import word_share
from mia.methods.listed_words import listed_words
from mia.methods.steer import SteeringOptions, explain, steer
from mia.notices import MiaWarning
from mia.request import Request, Sampling
from mia.steering import Steering
from mia.vectors import Vector


def vector(t: Tiny) -> Vector:
    return Vector({i: t.vector(f"resid_post.{i}", seed=i) for i in (1, 2)})


@pytest.mark.parametrize("coeffs", [None, [2.0], [-2.0, 0.5]])
def test_each_coefficient_is_the_run_with_its_edits(
    llama: Tiny, coeffs: list[float] | None
) -> None:
    m, v, ids = llama.model, vector(llama), llama.prompt()
    report = steer(m, ids, v, coeffs=coeffs, n_predict=5)
    assert [r.coeff for r in report.runs] == (coeffs or [1.0])
    for run in report.runs:
        edits = Steering(v, coeff=run.coeff).edits()
        alone = m.run([Request(ids, edits, logits=None, n_predict=5)])[0]
        assert run.generation.tokens == alone.tokens
    assert report.baseline is not None
    assert report.baseline.tokens == m.run([Request(ids, logits=None, n_predict=5)])[0].tokens
    lines = report.plain().split("\n")
    assert lines[0] == f"baseline:  {report.baseline.text}".split("\n")[0]
    assert [r["coeff"] for r in report.rows()] == [0.0, *(coeffs or [1.0])]
    assert steer(m, ids, v, n_predict=1, baseline=False).baseline is None


@pytest.mark.parametrize(
    ("how", "tokens", "generated"),
    [
        (SteeringOptions(tokens="3.."), [3, 4, 5, 6, 7, 8], True),
        (SteeringOptions(where="prompt"), None, False),
        (SteeringOptions(where="generated"), (), True),
        (SteeringOptions(where="prompt", tokens="-1"), [8], False),
    ],
)
def test_where_it_steers(
    llama: Tiny, how: SteeringOptions, tokens: list[int] | None, generated: bool
) -> None:
    m, v, ids = llama.model, vector(llama), llama.prompt(9)
    got = steer(m, ids, v, coeffs=[4], how=how, n_predict=5)
    edits = Steering(v, coeff=4, tokens=tokens, generated=generated).edits()
    want = m.run([Request(ids, edits, logits=None, n_predict=5)])[0]
    assert got.runs[0].generation.tokens == want.tokens
    assert got.document()["steering"]["tokens"] == how.where


def test_a_budget_chooses_and_says_so(llama: Tiny) -> None:
    with pytest.warns(MiaWarning, match=r"coefficient 0\.1: mean KL 0\.\d{3}"):
        got = steer(
            llama.model, llama.prompt(), vector(llama), coeffs=[0.1, 30], kl_budget=0.5, n_predict=2
        )
    assert got.choice is not None and list(got.choice.kl) == [0.1, 30]
    assert [r.coeff for r in got.runs] == [0.1] and got.document()["coeff"] == 0.1


def test_what_cannot_steer(llama: Tiny) -> None:
    m, v, ids = llama.model, vector(llama), llama.prompt()
    out = SteeringOptions(operator="project_out")
    with pytest.raises(UsageError, match="'project_out' takes no coefficient"):
        steer(m, ids, v, coeffs=[1], how=out)
    with pytest.raises(UsageError, match="no coefficient that a budget could choose"):
        steer(m, ids, v, kl_budget=1, how=out)
    with pytest.raises(UsageError, match="no vector to steer with"):
        steer(m, ids, [])
    with pytest.raises(UsageError, match="no coefficient is given"):
        steer(m, ids, v, coeffs=[])
    with pytest.raises(UsageError, match="tokens cannot be combined with where='generated'"):
        steer(m, ids, v, how=SteeringOptions(where="generated", tokens="1"))


def test_paths_of_one_and_of_several_coefficients(llama: Tiny) -> None:
    m, v, ids = llama.model, vector(llama), llama.prompt()
    assert {r["path"] for r in explain(m, ids, v).rows()} == {"control vector"}
    assert {r["path"] for r in explain(m, ids, v, coeffs=[1, 2]).rows()} == {"callback"}
    out = explain(m, ids, v, how=SteeringOptions(operator="project_out"))
    assert "callback  (the operator is not add)" in out.plain().splitlines()[0]


def test_shares_of_listed_words(llama: Tiny) -> None:
    m, v, ids = llama.model, vector(llama), llama.prompt()
    report = listed_words(
        m, ids, v, "french_words", coeffs=[4, 0], samples=3, n_predict=6, sampling=None
    )
    assert [s.coeff for s in report.shares] == [0, 4, 0]
    how = Sampling(temperature=1.0, seed=2)
    edits = Steering(v, coeff=4).edits()
    want = m.run([Request(ids, edits, logits=None, n_predict=6, sampling=how)])[0]
    assert report.shares[1].texts[2] == m.text(want.tokens)
    unsteered = report.shares[0]
    assert unsteered.change is None and unsteered.share.n == 3
    assert report.shares[2].texts == unsteered.texts and report.shares[2].change is None
    assert len(report.rows()) == 9
    with pytest.raises(UsageError, match="samples must be at least 2, got 1"):
        listed_words(m, ids, v, "french_words", samples=1)
    with pytest.raises(UsageError, match="give a temperature"):
        listed_words(m, ids, v, "french_words", sampling=Sampling())


def test_the_share_is_of_words_in_the_list(llama: Tiny) -> None:
    m, v, ids = llama.model, vector(llama), llama.prompt()
    report = listed_words(m, ids, v, "positive_words", samples=4, n_predict=8)
    texts = report.shares[1].texts
    from mia.datasets.shipped import read_lines

    listed = set(read_lines("positive_words").values())
    mean = sum(word_share(t, listed) for t in texts) / len(texts)
    assert report.shares[1].share.value == pytest.approx(mean)


def test_layers_and_tokens_may_be_numbers(llama: Tiny) -> None:
    m, v, ids = llama.model, vector(llama), llama.prompt()
    numbers = steer(m, ids, v, how=SteeringOptions(layers=[2], tokens=[-2, -1]), n_predict=3)
    text = steer(m, ids, v, how=SteeringOptions(layers="2", tokens="-2,-1"), n_predict=3)
    assert numbers.document() == text.document()
