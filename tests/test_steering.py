"""Steering: operators, position rules and the control vector against the oracle."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference import check, check_same, check_untouched, operate
from tiny import Tiny

from mia.edits import OPERATORS, Edit
from mia.errors import UsageError
from mia.methods import steering
from mia.request import Capture, Request
from mia.sites import Site
from mia.steering import Steering
from mia.vectors import Vector

C = 1.75


def vector(t: Tiny, *layers: int, site: str = "resid_post") -> Vector:
    return Vector({i: t.vector(f"{site}.{i}", seed=i) for i in layers}, site)


def capture(t: Tiny) -> list[Capture]:
    return [Capture("resid_post", generated=True), Capture("attn_out", generated=True)]


def after(op: str, h: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A row after the operator, in float64."""
    if op == "own_functions:halfway":
        return np.asarray((h + C * v) / 2)
    return operate(Edit("resid_post.1", op, v, coeff=C), h, 0)


@pytest.mark.parametrize(
    "op", [*(o.name for o in OPERATORS.values() if o.value), "own_functions:halfway"]
)
@pytest.mark.parametrize("keep_norm", [False, True])
def test_each_operator_at_every_token(case: Tiny, op: str, keep_norm: bool) -> None:
    v = vector(case, 1)
    if op == "cap":
        v = -1 * v  # so that some rows are above it
    ids = case.prompt()
    s = Steering(v, op, C, keep_norm=keep_norm)
    got = case.model.run([Request(ids, s.edits(), capture(case), "all")])[0]

    def change(x: np.ndarray) -> np.ndarray:
        for i, h in enumerate(x):
            out = after(op, h, v[1])
            x[i] = out * np.linalg.norm(h) / np.linalg.norm(out) if keep_norm else out
        return x

    want = case.oracle.run(ids, {"resid_post.1": change})
    for site, a in got.captures.items():
        np.testing.assert_allclose(a, want[str(site)], atol=1e-4, err_msg=str(site))
    assert got.logits is not None
    np.testing.assert_allclose(got.logits, want["logits"], atol=1e-4)


def test_after_project_out_add_the_projection_is_exactly_the_vectors(llama: Tiny) -> None:
    v = vector(llama, 1)
    edits = Steering(v, "project_out_add", C).edits()
    got = llama.model.run([Request(llama.prompt(), edits, [Capture("resid_post.1")])])[0]
    u = v[1] / np.linalg.norm(v[1])
    np.testing.assert_allclose(got["resid_post.1"] @ u, C * np.linalg.norm(v[1]), rtol=1e-5)


#: which tokens, and whether the generated ones
RULES: dict[str, tuple[Any, bool | None]] = {
    "all": (None, None),
    "from 5": (slice(5, None), True),
    "from -2": (slice(-2, None), True),
    "prompt only": (None, False),
    "generated only": ((), True),
    "from 5, prompt only": (slice(5, None), False),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("op", ["add", "project_out", "replace"])
def test_position_rules_reach_generated_tokens_or_not(case: Tiny, rule: str, op: str) -> None:
    tokens, generated = RULES[rule]
    s = Steering(vector(case, 0, 2), op, C, tokens=tokens, generated=generated)
    request = Request(case.prompt(), s.edits(), capture(case), "all", n_predict=6)
    clean = replace(request, edits=())
    got, plain = case.model.run([request, clean])
    want = check(got, request, case.oracle)
    if rule == "generated only":  # nothing in the prompt has changed
        same = check(plain, clean, case.oracle)
        n = len(request.tokens)
        before = {k: x[:n] for k, x in want.items()}
        assert check_untouched(
            case.oracle,
            _cut(got, n),
            _cut(plain, n),
            before,
            {k: x[:n] for k, x in same.items()},
            atol=3e-5,
        )


def _cut(result: Any, n: int) -> Any:
    return replace(result, captures={s: a[:n] for s, a in result.captures.items()})


def test_layers_are_chosen_and_missing_ones_named(llama: Tiny) -> None:
    v = vector(llama, 0, 2)
    assert [e.site for e in Steering(v, layers=[2]).edits()] == [Site("resid_post", 2)]
    with pytest.raises(UsageError, match="none of these layers; it has 0,2"):
        Steering(v, layers=[1]).edits()
    with pytest.raises(UsageError, match="unknown operator 'push'; known: replace, add, mean"):
        Steering(v, "push").edits()
    with pytest.raises(UsageError, match=r"the direction of the edit at resid_post\.0 is zero"):
        Steering(0 * v, "project_out").edits()


# -- the two paths -----------------------------------------------------------------------


def test_the_control_vector_is_the_callback_to_1e5(case: Tiny) -> None:
    s = Steering(vector(case, 1, 2), coeff=C)
    edits = s.edits()
    prompts = [case.prompt(seed=1), case.prompt(9, seed=2)]
    requests = [Request(p, edits, logits="all", n_predict=5) for p in prompts]
    assert {r["path"] for r in steering.explain(case.model, edits)} == {"control vector"}
    fast = case.model.run(requests)
    slow = case.model.run(
        [replace(r, captures=[Capture("resid_post.0", tokens=0)]) for r in requests]
    )
    for a, b, request in zip(fast, slow, requests, strict=True):
        assert a.tokens == b.tokens
        assert a.logits is not None and b.logits is not None
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5, rtol=0)
        check(a, request, case.oracle)


def test_the_control_vector_is_taken_off_again(llama: Tiny) -> None:
    request = Request(llama.prompt(), logits="all")
    before = llama.model.run([request])[0]
    llama.model.run([replace(request, edits=Steering(vector(llama, 1), coeff=9).edits())])
    check_same(llama.model.run([request])[0], before, atol=0)


def test_no_callback_runs_for_a_control_vector(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the callback's edit ran")

    monkeypatch.setattr(Edit, "apply", never)
    edits = Steering(vector(llama, 1)).edits()
    llama.model.run([Request(llama.prompt(), edits, n_predict=3)] * 2)
    with pytest.raises(AssertionError, match="callback"):
        llama.model.run([Request(llama.prompt(), edits), Request(llama.prompt())])


# -- on a model until removed --------------------------------------------------------------


def test_a_with_block_steers_every_run_in_it(llama: Tiny) -> None:
    v, w, ids = vector(llama, 1), vector(llama, 2), llama.prompt()
    own = Edit("resid_post.1", "scale", coeff=0.5, tokens=-1)
    plain = llama.model.run([Request(ids)])[0]
    with llama.model.steered(v, w, coeff=C) as handle:
        assert len(handle.edits) == 2
        got = llama.model.run([Request(ids), Request(ids, [own])])
        text = llama.model.generate(ids, 4).text
    check(got[0], Request(ids, handle.edits), llama.oracle)
    # the request's own edits come after
    check(got[1], Request(ids, [*handle.edits, own]), llama.oracle)
    check_same(llama.model.run([Request(ids)])[0], plain, atol=0)
    steered = llama.model.run([Request(ids, handle.edits, logits=None, n_predict=4)])[0]
    assert text == llama.model.text(steered.tokens)


def test_handles_are_removed_one_by_one_and_after_an_error(llama: Tiny) -> None:
    m = llama.model
    first, second = (
        m.steered(vector(llama, 1)),
        m.steered(Steering(vector(llama, 2), "project_out")),
    )
    assert m.standing_edits == [*first.edits, *second.edits]
    first.remove()
    first.remove()
    assert m.standing_edits == second.edits
    second.remove()
    with pytest.raises(ZeroDivisionError), m.steered(vector(llama, 1)):
        1 / 0  # noqa: B018
    assert m.standing_edits == []


def test_a_vector_that_does_not_fit_is_refused_before_it_is_put_on(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="directions of 3"):
        llama.model.steered(Vector({1: np.ones(3, np.float32)}))
    assert llama.model.standing_edits == []


def test_one_request_is_refused_while_steered_too(llama: Tiny) -> None:
    with llama.model.steered(vector(llama, 1)), pytest.raises(UsageError, match="list of requests"):
        llama.model.run(Request(llama.prompt()))  # type: ignore[arg-type]
