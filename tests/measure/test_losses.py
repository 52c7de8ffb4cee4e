"""Losses against a float64 softmax."""

from typing import Any, cast

import numpy as np
import pytest

from mia import Model, Request
from mia.errors import UsageError
from mia.measure.losses import AnswerLogProb, MeanLoss, TokenLoss, log_probs, log_softmax


@pytest.mark.parametrize("shift", [0.0, 500.0, -500.0])
def test_all_losses_are_of_one_softmax(shift: float) -> None:
    logits = (np.random.default_rng(0).standard_normal((3, 7)) + shift).astype(np.float32)
    x = logits.astype(np.float64)
    p = np.exp(x - x.max(1, keepdims=True))
    truth = np.log(p / p.sum(1, keepdims=True))  # (3, 7)
    targets = [6, 0, 3]
    picked = truth[range(3), targets]
    assert log_softmax(logits) == pytest.approx(truth, abs=1e-12)
    assert log_probs(logits, targets) == pytest.approx(picked, abs=1e-6)
    assert AnswerLogProb(targets)(logits) == pytest.approx(picked.sum(), abs=1e-6)
    assert TokenLoss(targets)(logits) == pytest.approx(-picked, abs=1e-6)
    assert TokenLoss(targets)(logits).dtype == np.float32
    assert MeanLoss(targets)(logits) == pytest.approx(-picked.mean(), abs=1e-6)


@pytest.mark.slow
def test_log_probabilities_of_a_large_vocabulary_are_right_to_a_millionth(smollm2: Model) -> None:
    ids = smollm2.tokenize("The capital of France is Paris, and the capital of Italy is")
    x = smollm2.run([Request(ids, logits="all")])[0].logits
    assert x is not None
    exact = x.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    targets = np.random.default_rng(0).integers(0, smollm2.n_vocab, len(x))
    picked = exact[range(len(x)), targets]
    np.testing.assert_allclose(log_probs(x, targets), picked, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int64])
def test_logits_of_any_type_are_taken_as_float32(kind: type) -> None:
    logits = np.array([[1, 2, 12], [-5, 0, 3]])
    want = log_softmax(logits)[[0, 1], [1, 2]]
    assert log_probs(logits.astype(kind), [1, 2]) == pytest.approx(want, abs=1e-6)
    assert log_probs(cast(Any, logits.tolist()), [1, 2]) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("targets", [[], [0], [0, 1, 2]])
def test_there_is_one_target_for_each_row(targets: list[int]) -> None:
    for loss in (AnswerLogProb, TokenLoss, MeanLoss):
        with pytest.raises(UsageError, match=f"{len(targets)} targets for 2 rows of logits"):
            loss(targets)(np.zeros((2, 3), np.float32))
