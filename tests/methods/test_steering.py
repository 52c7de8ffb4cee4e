"""Steering: operators, position rules and paths against the oracle."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from own_functions import halfway
from reference import check, check_same, check_untouched, expected
from tiny import Tiny

from mia.edits import Edit
from mia.errors import UsageError
from mia.methods import steering
from mia.methods.steering import Steering
from mia.request import Capture, Request
from mia.sites import Site
from mia.vectors import Vector

C = 1.75


def vector(t: Tiny, *layers: int, site: str = "resid_post") -> Vector:
    return Vector({i: t.vector(f"{site}.{i}", seed=i) for i in layers}, site)


def capture(t: Tiny) -> list[Capture]:
    return [Capture("resid_post", generated=True), Capture("attn_out", generated=True)]


# what each operator is, once more, for a row h
TRUTH = {
    "add": lambda h, v, u: h + C * v,
    "ablate": lambda h, v, u: h - (h @ u) * u,
    "ablate-add": lambda h, v, u: h - (h @ u) * u + C * v,
    "replace": lambda h, v, u: C * v,
    "clamp": lambda h, v, u: h + max(0, C * np.linalg.norm(v) - h @ u) * u,
    "cap": lambda h, v, u: h - max(0, h @ u - C * np.linalg.norm(v)) * u,
    "own_functions:halfway": lambda h, v, u: (h + C * v) / 2,
}


@pytest.mark.parametrize("op", TRUTH)
@pytest.mark.parametrize("keep_norm", [False, True])
def test_each_operator_at_every_token(case: Tiny, op: str, keep_norm: bool) -> None:
    v = vector(case, 1)
    if op == "cap":
        v = -1 * v  # so that some rows are above it
    ids = case.prompt()
    s = Steering(v, op, C, keep_norm=keep_norm)
    got = case.model.run([Request(ids, s.edits(), capture(case), "all")])[0]
    u = v[1] / np.linalg.norm(v[1])

    def change(x: np.ndarray) -> np.ndarray:
        for i, h in enumerate(x):
            out = TRUTH[op](h, v[1].astype(np.float64), u.astype(np.float64))
            x[i] = out * np.linalg.norm(h) / np.linalg.norm(out) if keep_norm else out
        return x

    want = case.oracle.run(ids, {"resid_post.1": change})
    for site, a in got.captures.items():
        np.testing.assert_allclose(a, want[str(site)], atol=1e-4, err_msg=str(site))
    np.testing.assert_allclose(got.logits, want["logits"], atol=1e-4)


def test_after_ablate_add_the_projection_is_exactly_the_vectors(llama: Tiny) -> None:
    v = vector(llama, 1)
    edits = Steering(v, "ablate-add", C).edits()
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
@pytest.mark.parametrize("op", ["add", "ablate", "replace"])
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
    with pytest.raises(UsageError, match="none of these layers; it has 0, 2"):
        Steering(v, layers=[1]).edits()
    with pytest.raises(UsageError, match="unknown operator 'push'; known: add, ablate"):
        Steering(v, "push").edits()
    with pytest.raises(UsageError, match=r"the direction of the edit at resid_post\.0 is zero"):
        Steering(0 * v, "ablate").edits()


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


def test_explain_says_which_path_and_why(llama: Tiny) -> None:
    def reason(s: Steering, **how: Any) -> list[tuple[str, str]]:
        return [(r["path"], r["why"]) for r in steering.explain(llama.model, s.edits(), **how)]

    v = vector(llama, 1)
    assert reason(Steering(v)) == [("control vector", "")]
    assert "all requests of a run alike" in reason(Steering(v), alone=False)[0][1]
    assert reason(Steering(v, "ablate"))[0] == ("callback", "the operator is not add")
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


# -- on a model until removed --------------------------------------------------------------


def test_a_with_block_steers_every_run_in_it(llama: Tiny) -> None:
    v, w, ids = vector(llama, 1), vector(llama, 2), llama.prompt()
    own = Edit("resid_post.1", "scale", coeff=0.5, tokens=-1)
    plain = llama.model.run([Request(ids)])[0]
    with llama.model.steered(v, w, coeff=C) as handle:
        assert len(handle.edits) == 2
        got = llama.model.run([Request(ids), Request(ids, [own])])
        text = llama.model.generate(ids, 4)
    check(got[0], Request(ids, handle.edits), llama.oracle)
    # the request's own edits come after
    check(got[1], Request(ids, [*handle.edits, own]), llama.oracle)
    check_same(llama.model.run([Request(ids)])[0], plain, atol=0)
    steered = llama.model.run([Request(ids, handle.edits, logits=None, n_predict=4)])[0]
    assert text == llama.model.text(steered.tokens)


def test_handles_are_removed_one_by_one_and_after_an_error(llama: Tiny) -> None:
    m = llama.model
    first, second = m.steered(vector(llama, 1)), m.steered(Steering(vector(llama, 2), "ablate"))
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
        llama.model.steered(Vector({1: np.ones(3)}))
    assert llama.model.standing_edits == []


# -- how much --------------------------------------------------------------------------------


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("rule", ["all", "prompt only", "from -2", "generated only"])
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
    assert choice == steering.Choice(-2.0, kl)


def test_no_budget_for_an_operator_without_a_coefficient(llama: Tiny) -> None:
    s, p = Steering(vector(llama, 1), "ablate"), [llama.prompt()]
    with pytest.raises(UsageError, match="'ablate' has no coefficient"):
        steering.choose_coefficient(llama.model, p, [s], 9, candidates=(1.0, 2.0))
    assert steering.choose_coefficient(llama.model, p, [s], 99, candidates=(1.0,)).coeff == 1


def test_a_function_is_shown_by_its_name(llama: Tiny) -> None:
    for op in (halfway, "own_functions:halfway"):
        (row,) = steering.explain(llama.model, Steering(vector(llama, 1), op).edits())
        assert row["operator"] == "own_functions:halfway"
