"""Attention sinks at the first token, and answers that lack their space."""

import warnings

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.measure import prompts
from mia.measure.prompts import check_answer, first_token_is_sink
from mia.model import Model
from mia.notices import MiaWarning

PROMPT = "The capital of France is"


def test_a_sink_is_a_first_token_whose_residual_is_long(llama: Tiny) -> None:
    """The tiny model has none; with its first token's residual 100 times as long it has."""
    assert not first_token_is_sink(llama.model)
    with llama.model.steered():
        llama.model.standing_edits.append(Edit("l_out-1", "scale", tokens=0, coeff=100))
        assert first_token_is_sink(llama.model)
        llama.model.standing_edits[:] = [Edit("l_out-1", "scale", tokens=1, coeff=100)]
        assert not first_token_is_sink(llama.model)
        llama.model.standing_edits.clear()


def _ratio(tiny: Tiny, ids: list[int], answer: str, other: str) -> float:
    """How many times likelier the first token of `other` is, as the oracle computes it."""
    logits = tiny.oracle.run(ids)["logits"][-1]
    first, second = (tiny.model.continuation(" is", text)[0] for text in (answer, other))
    assert first != second
    return float(np.exp(logits[second] - logits[first]))


@pytest.mark.parametrize(("answer", "other"), [("cat", " cat"), (" cat", "cat")])
def test_another_spelling_that_is_much_likelier_is_told(
    llama: Tiny, answer: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = llama.model.ids(PROMPT)
    ratio = _ratio(llama, ids, answer, other)
    monkeypatch.setattr(prompts, "_LIKELY", 0.0)
    monkeypatch.setattr(prompts, "_MUCH", ratio * 0.99)
    with pytest.warns(MiaWarning, match=f"is the answer {other!r}?"):
        check_answer(llama.model, ids, answer)
    monkeypatch.setattr(prompts, "_MUCH", ratio * 1.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_answer(llama.model, ids, answer)
        check_answer(llama.model, ids, " ")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_answer(llama.model, ids, answer)  # unlikely either way


@pytest.mark.slow
def test_smollm2_has_a_sink_and_says_the_space_of_paris(smollm2: Model) -> None:
    assert first_token_is_sink(smollm2)
    ids = smollm2.ids(PROMPT, bos=True)
    with pytest.warns(MiaWarning, match=r"'Paris' is measured.* ' Paris' has 0\.\d+: is the"):
        check_answer(smollm2, ids, "Paris")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_answer(smollm2, ids, " Paris")
