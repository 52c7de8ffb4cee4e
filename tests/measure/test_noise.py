"""Changes that are too small to matter: what they move is noise of the arithmetic."""

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.measure.noise import NUDGE, nudge
from mia.model import Model
from mia.models.examination import noise_floor
from mia.request import Request


def test_a_nudge_is_small_and_the_same_again() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    one, again, other = nudge(1)(rows), nudge(1)(rows), nudge(2)(rows)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and one.dtype == np.float32
    change = (one - rows) / rows
    assert 0.9 * NUDGE < change.std() < 1.1 * NUDGE
    assert not nudge(1)(np.zeros((1, 3), np.float32)).any()
    assert nudge(1)(np.full((1, 3), -np.inf, np.float32)).max() == -np.inf


def test_it_moves_an_exact_model_by_as_much_as_it_is(case: Tiny) -> None:
    tokens = case.prompt(6)
    edits = [Edit(f"resid_post.{i}", nudge(i), tokens=2 + i) for i in range(case.model.n_layer)]
    plain, *moved = case.model.run([Request(tokens), *(Request(tokens, [e]) for e in edits)])
    assert plain.logits is not None
    for result in moved:
        assert result.logits is not None
        assert np.abs(result.logits - plain.logits).max() < 1e-3
    assert noise_floor(case.model) < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")  # a copy is made
def test_rounding_to_8_bits_makes_much_of_it(smollm2: Model) -> None:
    with Model("smollm2", as_type="f16") as half:
        assert noise_floor(smollm2) > 10 * noise_floor(half) > 1e-3
