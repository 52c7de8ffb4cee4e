"""Which path steering takes, and how far it moves a model, against the oracle."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from own_functions import halfway
from reference import expected
from tiny import Tiny

from mia.errors import UsageError
from mia.methods import steering
from mia.request import Request
from mia.steering import Steering
from mia.vectors import Vector

#: which tokens, and whether the generated ones
RULES: dict[str, tuple[Any, bool | None]] = {
    "all": (None, None),
    "from -2": (slice(-2, None), True),
    "prompt only": (None, False),
    "generated only": ((), True),
}


def vector(t: Tiny, *layers: int, site: str = "resid_post") -> Vector:
    return Vector({i: t.vector(f"{site}.{i}", seed=i) for i in layers}, site)


# -- which path ------------------------------------------------------------------------------


def test_explain_says_which_path_and_why(llama: Tiny) -> None:
    def reason(s: Steering, **how: Any) -> list[tuple[str, str]]:
        return [(r["path"], r["why"]) for r in steering.explain(llama.model, s.edits(), **how)]

    v = vector(llama, 1)
    assert reason(Steering(v)) == [("control vector", "")]
    assert "all requests of a run alike" in reason(Steering(v), alone=False)[0][1]
    assert reason(Steering(v, "project_out"))[0] == ("callback", "the operator is not add")
    assert reason(Steering(v, tokens=3))[0][1] == "only some tokens are steered"
    assert reason(Steering(v, generated=False))[0][1] == "only some tokens are steered"
    assert reason(Steering(v, keep_norm=True))[0][1] == "the norm is kept"
    assert (
        reason(Steering(vector(llama, 1, site="mlp_out")))[0][1]
        == "a control vector is added at resid_post"
    )
    assert reason(Steering(vector(llama, 0, 1))) == [
        ("callback", "a control vector has no layer 0"),
        ("callback", "other edits of this run need the callback"),
    ]


# -- how much --------------------------------------------------------------------------------


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("rule", RULES)
def test_mean_kl_is_the_oracles(llama: Tiny, rule: str) -> None:
    tokens, generated = RULES[rule]
    s = Steering(vector(llama, 1), tokens=tokens, generated=generated)
    prompts, n = [llama.prompt(), llama.prompt(6, seed=3)], 4
    candidates = [replace(s, coeff=c).edits() for c in (0.5, 2.0)]
    got = steering.mean_kl(llama.model, prompts, candidates, n_predict=n)
    want = []
    for edits in candidates:
        kls = []
        for p in prompts:
            more = llama.model.run([Request(p, logits=None, n_predict=n)])[0].tokens[:-1]
            base = _log_softmax(llama.oracle.run([*p, *more])["logits"])[len(p) - 1 :]
            steered = expected(llama.oracle, Request(p, edits), more)["logits"][len(p) - 1 :]
            kls.append((np.exp(base) * (base - _log_softmax(steered))).sum(-1))
        want.append(np.concatenate(kls).mean())
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_largest_coefficient_within_the_budget(llama: Tiny) -> None:
    s, p = Steering(vector(llama, 1)), [llama.prompt()]
    choice = steering.choose_coefficient(llama.model, p, [s], 0.2, candidates=(0.1, 0.2, 0.4, 8.0))
    assert list(choice.kl) == [0.1, 0.2, 0.4, 8.0]
    assert choice.coeff == max(c for c, k in choice.kl.items() if k <= 0.2)
    assert choice.kl[8.0] > 0.2 > choice.kl[0.1]
    with pytest.raises(UsageError, match="no coefficient stays within a mean KL of 1e-06: 4 gives"):
        steering.choose_coefficient(llama.model, p, [s], 1e-6, candidates=(4.0, 8.0))
    with pytest.raises(UsageError, match="budget of 0 is not positive"):
        steering.choose_coefficient(llama.model, p, [s], 0)


def test_the_largest_size_of_negative_coefficients(llama: Tiny, monkeypatch: Any) -> None:
    s, p = Steering(vector(llama, 1)), [llama.prompt()]
    size = (-0.1, -0.2, -8.0)
    choice = steering.choose_coefficient(llama.model, p, [s], 0.2, candidates=size)
    assert choice.coeff == -0.2 and choice.kl[-8.0] > 0.2
    with pytest.raises(UsageError, match=r"within a mean KL of 1e-06: -4 gives .*, the least"):
        steering.choose_coefficient(llama.model, p, [s], 1e-6, candidates=(-8.0, -4.0))
    # each by itself: 2 is within though 1 is not; of 2 and -2 the one of less KL
    kl = {0.5: 0.1, 1.0: 0.9, 2.0: 0.2, -2.0: 0.15, 4.0: 3.0}
    monkeypatch.setattr(steering, "mean_kl", lambda *_, **__: list(kl.values()))
    choice = steering.choose_coefficient(llama.model, p, [s], 0.5, candidates=list(kl))
    assert choice == steering.CoefficientChoice(-2.0, kl)


def test_no_budget_for_an_operator_without_a_coefficient(llama: Tiny) -> None:
    s, p = Steering(vector(llama, 1), "project_out"), [llama.prompt()]
    with pytest.raises(UsageError, match="'project_out' takes no coefficient"):
        steering.choose_coefficient(llama.model, p, [s], 9, candidates=(1.0, 2.0))
    assert steering.choose_coefficient(llama.model, p, [s], 99, candidates=(1.0,)).coeff == 1


def test_a_function_is_shown_by_its_name(llama: Tiny) -> None:
    for op in (halfway, "own_functions:halfway"):
        (row,) = steering.explain(llama.model, Steering(vector(llama, 1), op).edits())
        assert row["operator"] == "own_functions:halfway"
