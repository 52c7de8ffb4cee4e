"""Losses against a float64 softmax."""

import numpy as np
import pytest

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
    assert log_probs(logits, targets) == pytest.approx(picked, abs=1e-12)
    assert log_probs(logits, targets, np.float32) == pytest.approx(picked, abs=1e-4)
    assert AnswerLogProb(targets)(logits) == pytest.approx(picked.sum(), abs=1e-12)
    assert TokenLoss(targets)(logits) == pytest.approx(-picked, abs=1e-4)
    assert TokenLoss(targets)(logits).dtype == np.float32
    assert MeanLoss(targets)(logits) == pytest.approx(-picked.mean(), abs=1e-12)
