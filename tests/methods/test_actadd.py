"""Activation addition against the oracle: padding, alignment, several at once, samples."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from reference import check, expected
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.errors import RangeError, UsageError
from mia.methods import actadd
from mia.methods.actadd import Addition
from mia.model import Model
from mia.notices import MiaWarning
from mia.request import Capture, Request, Sampling


def test_the_shorter_prompt_gets_spaces_on_its_right(llama: Tiny) -> None:
    m = llama.model
    plus, minus = actadd.padded(m, "The cat sat", " yes")
    assert plus == m.tokenize("The cat sat") and len(minus) == len(plus)
    (space,) = m.tokenize(" ", bos=False)
    short = m.tokenize(" yes")
    assert len(short) == len(plus) - 2
    assert minus == short + [space] * (len(plus) - len(short))
    assert actadd.padded(m, " yes", "The cat sat")[0] == minus
    with pytest.raises(UsageError, match="both empty"):
        actadd.padded(m, "", "", bos=False)
    with pytest.raises(UsageError, match="both empty"):
        actadd.padded(m, "", "", bos=True)


def test_padding_is_the_space_inside_a_text(tmp_path: Path) -> None:
    with Model(write_tiny(tmp_path / "spm.gguf", "llama", spm=True), threads=1) as m:
        plus, minus = actadd.padded(m, "cat dog Paris", "Rome")
        assert plus == m.tokenize("cat dog Paris")
        n = len(m.tokenize("Rome"))
        assert minus[:n] == m.tokenize("Rome") and len(minus) == len(plus) > n
        assert {m.piece(t) for t in minus[n:]} == {" "}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_difference_is_added_before_the_block_at_the_front(case: Tiny, layer: int) -> None:
    m, ids = case.model, case.prompt()
    a = Addition("The red cat", "no", 3.0, layer)
    edits = actadd.edits(m, [a], len(ids))
    request = Request(ids, edits, [Capture("resid_pre"), Capture("resid_post")], "all", n_predict=4)
    got = m.run([request])[0]

    plus, minus = actadd.padded(m, a.plus, a.minus)
    site = f"resid_pre.{layer}"
    h = case.oracle.run(plus)[site] - case.oracle.run(minus)[site]

    def add(x: np.ndarray) -> np.ndarray:
        x[: len(h)] += 3.0 * h
        return x

    want = case.oracle.run([*ids, *got.tokens[:-1]], {site: add})
    np.testing.assert_allclose(got[site], want[site][: len(ids)], atol=2e-4)
    np.testing.assert_allclose(logits(got), want["logits"][: len(ids)], atol=2e-4)
    assert got.tokens == want["logits"][len(ids) - 1 :].argmax(-1).tolist()[: len(got.tokens)]


def test_several_at_once_add_up(llama: Tiny) -> None:
    m, ids = llama.model, llama.prompt()
    several = [
        Addition("The cat", "The dog", 2, 1),
        Addition("yes yes", "no", -1, 1),
        Addition("blue", "red", 1, 2),
    ]
    request = Request(ids, actadd.edits(m, several, len(ids)), [Capture("resid_post")], "all")
    got = m.run([request])[0]
    check(got, request, llama.oracle)
    h = {i: actadd.difference(m, a)[a.layer] for i, a in enumerate(several)}
    want = llama.oracle.run(ids)["resid_pre.1"]
    want[: len(h[0])] += 2 * h[0]
    want[: len(h[1])] -= h[1]
    np.testing.assert_allclose(expected(llama.oracle, request)["resid_post.0"], want, atol=1e-4)


def test_all_layers_of_a_difference_in_one_go(llama: Tiny) -> None:
    a = Addition("The cat", "no", layer=1)
    every = actadd.difference(llama.model, a, [0, 1, 2])
    np.testing.assert_allclose(every[1], actadd.difference(llama.model, a)[1], atol=1e-6)
    assert not every[0][0].any()  # the BOS is the same in both


def test_what_cannot_be_added(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="covers 4 tokens, the prompt has 2"):
        actadd.edits(llama.model, [Addition("The cat sat", "no", 1, 1)], 2)
    with pytest.raises(RangeError, match=r"layer 3 is out of range; .* has 0 to 2"):
        actadd.edits(llama.model, [Addition("cat", "no", 1, 3)], 9)


def test_samples_of_a_seed_are_those_of_a_run_by_itself(llama: Tiny) -> None:
    m, ids, a = llama.model, llama.prompt(), Addition("The cat", "no", 4, 1)
    edits = actadd.edits(m, [a], len(ids), bos=False)
    how = Sampling(temperature=1.0, top_p=0.9, frequency_penalty=1.0, seed=5)
    with pytest.warns(MiaWarning, match="at the start of a prompt without a BOS"):
        report = actadd.compare(m, ids, [a], n=3, n_predict=6, sampling=how)
    rows = report.samples
    assert [r.seed for r in rows] == [5, 6, 7]
    for r in rows:
        own = Sampling(temperature=1.0, top_p=0.9, frequency_penalty=1.0, seed=r.seed)
        assert r.baseline == m.generate(ids, 6, sampling=own).text
        assert r.output == m.generate(ids, 6, edits=edits, sampling=own).text
    assert len({r.baseline for r in rows} | {r.output for r in rows}) > 3
    assert report.plain().startswith(f"5 unsteered: {rows[0].baseline!r}\n5 steered: ")
    with pytest.raises(UsageError, match="all the same; give a temperature"):
        actadd.compare(m, ids, [a], n=2, sampling=Sampling())


def test_a_continuation_says_what_was_added(llama: Tiny) -> None:
    m, a = llama.model, Addition("The cat sat", "no", 4, 1)
    for bos in (True, False):
        ids = m.ids("The capital of France is", bos=bos)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MiaWarning)
            got = actadd.add(m, ids, [a], n_predict=4)
        # the contrast has a BOS if the prompt has one
        edits = actadd.edits(m, [a], len(ids), bos=bos)
        assert got.tokens == m.generate(ids, 4, edits=edits).tokens
        (added,) = got.document()["additions"]
        assert [t["id"] for t in added["plus_tokens"]] == m.tokenize("The cat sat", bos=bos)
        assert len(added["minus_tokens"]) == len(added["plus_tokens"])
    with pytest.warns(MiaWarning, match="token 0 is at the start of a prompt without a BOS"):
        actadd.add(m, m.ids("The capital of France", bos=False), [a], n_predict=1)


def test_one_coefficient_and_layer_for_all_or_one_each(llama: Tiny) -> None:
    m = llama.model
    two = actadd.additions(m, ["a", "b"], layers="-1", coeffs=[2.0])
    assert two == [Addition("a", " ", 2, 2), Addition("b", " ", 2, 2)]
    each = actadd.additions(m, ["a", "b"], ["c", "d"], layers="1,1", coeffs=[2, -2])
    assert each == [Addition("a", "c", 2, 1), Addition("b", "d", -2, 1)]
    with pytest.raises(UsageError, match="got 2 plus texts but 1 minus text"):
        actadd.additions(m, ["a", "b"], ["c"], layers="1")
    with pytest.raises(UsageError, match="got 2 plus texts but 3 coefficients"):
        actadd.additions(m, ["a", "b"], coeffs=[1, 2, 3], layers="1")
    with pytest.raises(UsageError, match="got 2 plus texts but 3 layers"):
        actadd.additions(m, ["a", "b"], layers="0..2")
