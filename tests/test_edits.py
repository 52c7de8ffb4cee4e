"""Edits on a running model against the oracle: every site, every operator, every layout."""

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extended import run_extended
from reference import ELSEWHERE, UNTOUCHED, check, check_same, check_untouched, expected
from tiny import CASES, MIXTURES, Tiny, logits

from mia import edits
from mia.cli._groups import ALIASES
from mia.edits import OPERATORS, Edit, Function, Tokens
from mia.errors import EngineError, RangeError, SiteError, UsageError
from mia.request import Capture, Request, Result
from mia.sites import Site

N_TOKENS = 12
#: ways to say which tokens, and how many of N_TOKENS they are
TOKENS: tuple[tuple[Any, int], ...] = (
    (None, N_TOKENS),
    (3, 1),
    (-1, 1),
    ([2, -3], 2),
    (slice(2, None, 3), 4),
    (slice(-4, -1), 3),
    ((-2, 0, 7), 3),
)


def _everything(t: Tiny) -> Capture:
    return Capture(list(t.model.topology.sites))


def _selections(t: Tiny) -> list[dict[str, Any]]:
    """Where operators are tried: whole rows, heads, dimensions, dimensions of heads."""
    last = t.oracle.n_layer - 1
    return [
        {"site": "resid_post.1"},
        {"site": "head_out.1", "heads": [3, 1]},
        {"site": "q.0", "heads": [0, 2], "dims": [5, 1, 6]},
        {"site": f"mlp_out.{last}", "dims": [0, 40, 7]},
        {"site": "v.1", "heads": [1]},
        {"site": f"k.{last}", "dims": [3, 2]},
        {"site": "logits", "dims": [300, 4]},
    ]


def _width(t: Tiny, site: str, heads: Any = None, dims: Any = None) -> int:
    name, *layer = site.split(".")
    shape = t.model.topology.sites[Site(name, *map(int, layer))].shape
    if heads is None:
        return int(np.prod(shape)) if dims is None else len(dims)
    return len(heads) * (shape[-1] if dims is None else len(dims))


def _double_and_roll(h: np.ndarray) -> np.ndarray:
    return 2 * np.roll(h, 1, axis=-1)


def _site_requests(t: Tiny, prompt: list[int]) -> list[Request]:
    """Two rows added at each site; for scores and patterns, a head set to zero."""
    rng = np.random.default_rng(3)
    requests = []
    for site, node in t.model.topology.sites.items():
        if site.kind.read_only:
            continue
        if site.name in ("attn_pattern", "attn_scores"):
            edit = Edit(site, "zero", tokens=[5, -1], heads=[1])
        else:
            edit = Edit(site, "add", rng.standard_normal((2, np.prod(node.shape))), tokens=[5, -2])
        requests.append(Request(prompt, [edit], [_everything(t)], "all"))
    return requests


def _operator_requests(t: Tiny, prompt: list[int]) -> list[Request]:
    """Each operator at each selection, with tokens, coefficients and 1-D and 2-D values in turn."""
    rng = np.random.default_rng(4)
    requests: list[Request] = []
    ops: list[str | Function] = [*OPERATORS, _double_and_roll]
    for op in ops:
        for where in _selections(t):
            tokens, n = TOKENS[len(requests) % len(TOKENS)]
            width = _width(t, **where)
            more: dict[str, Any] = {"coeff": round(rng.uniform(-1.5, 1.5), 3)}
            row = None if callable(op) else OPERATORS[op]
            if row and row.coeff == "each" and len(requests) % 2:
                several = next(k for k in (3, 2, 7) if width % k == 0)
                more["coeff"] = rng.uniform(-1.5, 1.5, several)
            if row and row.value:
                rows = (1,) if len(requests) % 3 == 0 else (n,) if len(requests) % 3 == 1 else ()
                more["value"] = rng.standard_normal((*rows, width))
            if len(requests) % 4 == 3:
                more["keep_norm"] = op != "zero"
            edit = Edit(op=op, tokens=tokens, generated=False, **where, **more)
            captures = [Capture([where["site"], "k", "head_out", "mlp_out", "resid_post"])]
            requests.append(Request(prompt, [edit], captures, "all"))
    return requests


def _order_requests(t: Tiny, prompt: list[int]) -> list[Request]:
    """Several edits that meet, in both orders."""
    v = t.vector("resid_post.0")
    pairs = [
        (Edit("resid_post.1", "replace", v, tokens=4), Edit("resid_post.1", "add", v[::-1])),
        (Edit("resid_post.0", "add", v, tokens=[4, 6]), Edit("resid_pre.1", "scale", coeff=0.5)),
        (Edit("embed", "add", v, tokens=-1), Edit("resid_pre.0", "scale", coeff=-2.0)),
        (
            Edit("head_out.2", "scale", heads=[0, 1], coeff=3.0),
            Edit("head_out.2", _double_and_roll, heads=[1, 2], tokens=slice(3, 5)),
        ),
        (Edit("q.1", "zero", tokens=2), Edit("mlp_out.0", "add", v, tokens=2)),
    ]
    out = [Request(prompt, list(p), [_everything(t)], "all") for p in pairs]
    return out + [Request(prompt, list(p[::-1]), [_everything(t)], "all") for p in pairs]


@pytest.fixture(scope="module", params=[*CASES, *MIXTURES])
def suite(
    request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]
) -> tuple[Tiny, list[Request], list[Any]]:
    """A model, many requests (the first without edits), and what the oracle says to each."""
    t = tiny(request.param)
    prompt = t.prompt(N_TOKENS)
    requests = [Request(prompt, captures=[_everything(t)], logits="all")]
    # hardly other than their siblings
    thin = 3 if t.name in ("llama-tied", "gemma2", *MIXTURES) else 1
    requests += _site_requests(t, prompt)
    requests += _operator_requests(t, prompt)[::thin] + _order_requests(t, prompt)[::thin]
    return t, requests, [expected(t.oracle, r) for r in requests]


def _check_all(
    t: Tiny, requests: list[Request], results: list[Result], wants: list[Any], atol: float
) -> None:
    for request, result, want in zip(requests, results, wants, strict=True):
        check(result, request, t.oracle, want)
        assert check_untouched(t.oracle, result, results[0], want, wants[0], atol=atol) > 1000


def test_all_sites_are_tried(suite: Any) -> None:
    t, requests, _ = suite
    sites = {s for s in t.model.topology.sites if not s.kind.read_only}
    assert {r.edits[0].site for r in requests[1 : 1 + len(sites)]} == sites


def test_in_one_batch(suite: Any) -> None:
    t, requests, wants = suite
    _check_all(t, requests, t.model.run(requests), wants, ELSEWHERE)


def _third(t: Tiny, *lists: list[Any]) -> list[list[Any]]:
    """The first and a third of the rest; every third is some model's."""
    start = 1 + [*CASES, *MIXTURES].index(t.name) % 3
    return [[x[0], *x[start::3]] for x in lists]


def test_one_by_one(suite: Any) -> None:
    t, requests, wants = suite
    requests, wants = _third(t, requests, wants)
    _check_all(t, requests, [t.model.run([r])[0] for r in requests], wants, UNTOUCHED)


def test_in_small_micro_batches(
    suite: Any, reopen: Callable[..., Tiny], five_rows: None, decoded: list[int]
) -> None:
    t, requests, wants = suite
    requests, wants = _third(t, requests, wants)
    t = reopen(t)
    results = [t.model.run([r])[0] for r in requests]
    assert max(decoded) == 5
    _check_all(t, requests, results, wants, UNTOUCHED)


def test_functions_see_the_selected_rows_and_cannot_harm_them(llama: Tiny) -> None:
    prompt, seen = llama.prompt(6), []

    def spoil(h: np.ndarray) -> np.ndarray:
        seen.append(h.shape)
        h[:] = np.nan
        return np.ones((len(h), h.shape[1]))  # float64 is fine

    edit = Edit("head_out.1", spoil, tokens=[1, 4], heads=[2, 0, 5])
    result = llama.model.run([Request(prompt, [edit], [Capture("head_out.1")])])[0]
    assert seen == [(2, 24)]
    rows = result["head_out.1"].reshape(6, 6, 8)
    assert (rows[[1, 4]][:, [0, 2, 5]] == 1).all()
    assert (rows != 1).sum() == rows.size - 2 * 24


def test_an_edit_of_no_tokens_changes_nothing(llama: Tiny) -> None:
    prompt, v = llama.prompt(), llama.vector()
    nothing: list[Tokens] = [[], slice(0, 0), slice(99, None)]
    for tokens in nothing:
        edit = Edit("resid_post.1", "add", v, tokens=tokens)
        clean, result = (llama.model.run([Request(prompt, e)])[0] for e in ([], [edit]))
        np.testing.assert_array_equal(result.logits, clean.logits)


def test_the_mean_of_rows_is_taken_once() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    h = np.zeros((2, 4), np.float32)
    Edit("resid_post.0", "mean", rows).apply(h, np.array([1]), np.array([0]))
    np.testing.assert_array_equal(h, [[0, 0, 0, 0], [4, 5, 6, 7]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "ad", "value": [1.0]}, "unknown operator 'ad'; known: replace, add"),
        ({"op": "add"}, "operator 'add' needs a value"),
        ({"op": "zero", "value": [1.0]}, "operator 'zero' takes no value"),
        ({"op": 3}, "neither an operator's name nor a function: 3"),
        ({"op": "scale", "coeff": float("nan")}, "coefficient nan is not a finite number"),
        ({"op": "scale", "coeff": -np.inf}, "coefficient -inf"),
        ({"op": "scale", "coeff": [1, np.nan]}, "not a finite number"),
        ({"op": "scale", "coeff": [[1]]}, r"coefficients have 1 axis, not shape \(1, 1\)"),
        ({"op": "scale", "coeff": []}, r"coefficients have 1 axis, not shape \(0,\)"),
        (
            {"op": "replace", "value": [1.0], "coeff": [1, 2]},
            "'replace' takes one coefficient; several are for add, scale, blend",
        ),
        ({"op": "add", "value": 1.0}, r"1 or 2 axes, not shape \(\)"),
        ({"op": "add", "value": np.ones((1, 2, 3))}, r"1 or 2 axes, not shape \(1, 2, 3\)"),
        (
            {"op": "add", "value": [1.0, np.nan]},
            "value of the edit at q.1 has numbers that are not",
        ),
        ({"op": "project_out", "value": [0.0, 0.0]}, "direction of the edit at q.1 is zero"),
        ({"op": "cap", "value": [[1.0], [0.0]]}, "direction of the edit at q.1 is zero"),
    ],
)
def test_an_edit_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Edit("q.1", **options)


#: what does not fit the model (llama: 3 blocks, n_embd 48, 6 heads and 2 key heads of 8; 12 tokens)
MISFITS: list[tuple[dict[str, Any], type[UsageError], str]] = [
    ({"site": "l_uot-1", "op": "zero"}, SiteError, "unknown site 'l_uot-1', did you mean l_out"),
    (
        {"site": "l_out-3", "op": "zero"},
        RangeError,
        "'l_out-3': layer 3 is out of range; .* 0 to 2",
    ),
    ({"site": "l_out", "op": "zero"}, SiteError, "'l_out' means 3 sites where one is needed"),
    (
        {"op": "add", "value": np.ones(47)},
        UsageError,
        "resid_post.1 has rows of 48 .* value has 47",
    ),
    (
        {"op": "scale", "coeff": [1.0] * 5},
        UsageError,
        r"resid_post\.1 has rows of 48 here, which 5 coefficients do not divide",
    ),
    (
        {"site": "attn_pattern.1", "op": "scale", "heads": [1, 4], "coeff": [1, 2, 3]},
        UsageError,
        "3 coefficients do not divide",
    ),
    ({"op": "zero", "tokens": 12}, RangeError, "token index 12 .* has 12 tokens, 0 to 11"),
    ({"op": "zero", "tokens": [0, -13]}, RangeError, "token index -13"),
    ({"op": "zero", "dims": [48]}, RangeError, "dimension 48 .* resid_post.1 has 0 to 47"),
    ({"op": "zero", "heads": [0]}, UsageError, "resid_post.1 has no heads; heads are at q, k, v"),
    (
        {"site": "head_out.1", "op": "zero", "heads": [6]},
        RangeError,
        "head 6 .* head_out.1 has 0 to 5",
    ),
    ({"site": "q.0", "op": "zero", "heads": [-1]}, RangeError, "head -1 .* q.0 has 0 to 5"),
    ({"site": "k.0", "op": "zero", "heads": [2]}, RangeError, "head 2 .* k.0 has 0 to 1"),
    ({"site": "v.0", "op": "zero", "heads": [0], "dims": [8]}, RangeError, "dimension 8 .* 0 to 7"),
    (
        {"site": "v.0", "op": "add", "heads": [0, 1], "value": np.ones(15)},
        UsageError,
        "v.0 has rows of 16 here, the edit's value has 15",
    ),
    (
        {"op": "add", "value": np.ones((2, 48)), "tokens": [1, 2, 3]},
        UsageError,
        "selects 3 tokens but has 2 rows of value",
    ),
    (
        {"op": "add", "value": np.ones((2, 48)), "tokens": [1, 2], "generated": True},
        UsageError,
        "an edit of generated tokens at resid_post.1 takes one row, not 2",
    ),
    (
        {"site": "attn_pattern.0", "op": "add", "value": np.ones(6)},
        UsageError,
        "attn_pattern takes zero, scale or a function, not a value",
    ),
    (
        {"site": "attn_pattern.0", "op": "zero", "dims": [0]},
        UsageError,
        "attn_pattern takes no dims",
    ),
    ({"site": "attn_pattern.0", "op": "zero", "heads": [6]}, RangeError, "head 6 .* has 0 to 5"),
    (
        {"op": lambda h: h[:, :2]},
        UsageError,
        r"function at resid_post.1 made \(12, 2\) of .*\(12, 48\)",
    ),
    ({"op": lambda h: h * np.inf}, UsageError, "resid_post.1 makes numbers that are not finite"),
    (
        {"site": "attn_pattern.2", "op": lambda h: h + np.nan},
        UsageError,
        "attn_pattern.2 makes numbers that are not finite",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), MISFITS)
def test_an_edit_that_does_not_fit_the_model(
    llama: Tiny, options: dict[str, Any], error: type[UsageError], message: str
) -> None:
    clean = Request(llama.prompt(N_TOKENS), captures=[Capture("l_out")], logits="all")
    edit = Edit(**{"site": "resid_post.1", **options})
    with pytest.raises(error, match=message) as caught:
        llama.model.run([clean, Request(clean.tokens, [edit])])
    assert type(caught.value) is error
    check(llama.model.run([clean])[0], clean, llama.oracle)  # the model works afterwards


def test_numbers_that_are_not_finite_stay_out_of_the_cache(llama: Tiny) -> None:
    """They would turn masked cells into NaN for every sequence that comes after."""
    wild = Edit("k.0", lambda h: h / 0.0)
    with pytest.raises(UsageError), np.errstate(all="ignore"):
        llama.model.run([Request(llama.prompt(40), [wild])])
    request = Request(llama.prompt(5), captures=[Capture("resid_post")])
    check(llama.model.run([request])[0], request, llama.oracle)


@pytest.mark.parametrize("n_predict", [0, 2])
def test_a_model_driven_to_nan_says_so_and_recovers(llama: Tiny, n_predict: int) -> None:
    """Each edit is finite, but the scores of such queries and keys are not."""
    wild = [Edit("q.0", "scale", coeff=1e30), Edit("k.0", "scale", coeff=1e30)]
    logits = None if n_predict else "last"
    with pytest.raises(EngineError, match="the logits are not numbers"):
        llama.model.run([Request(llama.prompt(40), wild, logits=logits, n_predict=n_predict)])
    request = Request(llama.prompt(5), captures=[Capture("resid_post")])
    check(llama.model.run([request])[0], request, llama.oracle)


@pytest.mark.parametrize("size", [1, 1e-44, 1e-38, 1e-23, 1e-20, 1e18, 1e20, 1e37])
@pytest.mark.parametrize("op", ["project_out", "project_out_add", "clamp", "cap"])
@pytest.mark.parametrize("rows", [1, 12])
def test_directions_of_any_length(llama: Tiny, size: float, op: str, rows: int) -> None:
    """Squares of float32 above 1e19 or below 1e-22 are none."""
    v = np.random.default_rng(1).standard_normal((rows, 48))
    v = (v[0] if rows == 1 else v) * size
    exact = np.asarray(v, np.float32).astype(np.float64)  # what float32 leaves of it
    length = np.linalg.norm(exact, axis=-1, keepdims=True)
    coeff = min(0.5 / length.ravel()[0], 1e38)  # c·|v| is about 0.5
    edit = Edit("l_out-1", op, v, slice(None), coeff=1.0 if op == "project_out" else coeff)
    request = Request(llama.prompt(N_TOKENS), [edit], [Capture("l_out-1")])
    got = llama.model.run([request])[0]["l_out-1"].astype(np.float64)
    h = llama.oracle.run(request.tokens)["resid_post.1"]
    unit = exact / length
    before, after = ((x * unit).sum(-1) for x in (h, got))
    goal = (np.asarray(edit.coeff, np.float32).astype(np.float64) * length).ravel()
    want = {
        "project_out": before * 0,
        "project_out_add": goal + before * 0,
        "clamp": np.maximum(before, goal),
        "cap": np.minimum(before, goal),
    }[op]
    np.testing.assert_allclose(after, want, rtol=1e-5, atol=1e-4)
    rest, rest_before = got - after[:, None] * unit, h - before[:, None] * unit
    np.testing.assert_allclose(rest, rest_before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [1e-38, 1e-23, 1e20, 1e37])
def test_keep_norm_of_any_length(llama: Tiny, size: float) -> None:
    value = np.random.default_rng(1).standard_normal(48) * size
    edit = Edit("l_out-1", "replace", value, keep_norm=True)
    request = Request(llama.prompt(N_TOKENS), [edit], [Capture("l_out-1")])
    got = llama.model.run([request])[0]["l_out-1"]
    norm = np.linalg.norm(llama.oracle.run(request.tokens)["resid_post.1"], axis=1)
    exact = np.asarray(value, np.float32).astype(np.float64)
    want = norm[:, None] * exact / np.linalg.norm(exact)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_mean_of_very_large_rows(llama: Tiny) -> None:
    edit = Edit("l_out-1", "mean", np.full((3, 48), 2e38), tokens=0)
    assert edit._value is not None
    np.testing.assert_allclose(edit._value, 2e38, rtol=1e-6)


def test_what_grows_too_large_is_an_error_and_no_warning(llama: Tiny) -> None:
    v = np.full(48, 1e30)
    for edit in (
        Edit("l_out-1", "add", v, coeff=1e30),  # the control vector
        Edit("l_out-1", "add", v, coeff=1e30, tokens=0),
        Edit("l_out-1", "replace", v, coeff=1e30, tokens=0),
        Edit("l_out-1", "scale", coeff=3e38),
        Edit("l_out-1", "project_out_add", v, coeff=1e30),
        Edit("l_out-1", "replace", v, coeff=1e30, keep_norm=True),
    ):
        for captures in ([], [Capture("l_out")]):
            with pytest.raises(UsageError, match=r"resid_post.1 makes numbers that are not finite"):
                llama.model.run([Request(llama.prompt(), [edit], captures)])


@pytest.mark.parametrize("site", ["resid_post.1", "resid_mid.0", "attn_out.2", "mlp_norm.1", "v.0"])
@pytest.mark.parametrize("size", [1e7, 1e16, 1e19, 1e24])
def test_numbers_whose_norm_overflows_are_refused(case: Tiny, site: str, size: float) -> None:
    """llama.cpp's norms would make zeros of them: logits that look like any others."""
    request = Request(case.prompt(), [Edit(site, "scale", coeff=size)])
    if size < (1e8 if "norm" in site else 1e17):
        with np.errstate(over="ignore"):  # of silu's exp
            want = case.oracle.run(request.tokens, {site: lambda x: x * size})["logits"][-1]
        got = logits(case.model.run([request])[0])[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
        return
    with pytest.raises(UsageError, match="norms overflow, and zeros come out"):
        case.model.run([request])
    huge = Edit("resid_post.1", "add", np.full(48, 1e20))  # a control vector
    with pytest.raises(UsageError, match=r"resid_post.1 makes numbers of 1e.20; above 1e.17"):
        case.model.run([Request(case.prompt(), [huge])])


@pytest.mark.parametrize("n_predict", [0, 2])
@pytest.mark.parametrize("value", [np.inf, -np.inf, 0.9, -0.9])
def test_infinite_logits_are_refused(case: Tiny, n_predict: int, value: float) -> None:
    """Only the final norm times the unembedding is too large: every hidden state is finite."""
    rows = case.oracle.weights.get("output.weight", case.oracle.weights["token_embd.weight"])
    row = np.sign(rows[5]).astype(np.float32) * np.sign(value)
    size = 3e38 if np.isinf(value) else 3e38 * abs(value)
    edit = Edit("final_norm", "replace", row, coeff=size)
    request = Request(case.prompt(), [edit], logits=None if n_predict else "all")
    with pytest.raises(EngineError, match=r"the logits are (infinite|not numbers)"):
        case.model.run([replace(request, n_predict=n_predict)])
    clean = Request(case.prompt(5))
    check(case.model.run([clean])[0], clean, case.oracle)


def test_an_edit_of_the_logits_leaves_a_token(llama: Tiny) -> None:
    for wild in (lambda h: h * 0 - np.inf, lambda h: h * 0 + np.inf, lambda h: h * np.nan):
        with pytest.raises(UsageError, match=r"no token to choose|at logits makes numbers"):
            llama.model.run([Request(llama.prompt(), [Edit("logits", wild)], n_predict=2)])


def test_a_capture_of_what_is_not_finite_is_refused(llama: Tiny, reopen: Any) -> None:
    """Also if no logits are asked for; and nothing of it stays in the cache."""
    half = reopen(llama, kv_type="f16")
    wild = Edit("v.1", "scale", coeff=1e8)
    request = Request(llama.prompt(40), [wild], [Capture("l_out-2")], logits=None)
    with pytest.raises(EngineError, match=r"resid_post.2 has numbers .* f16 cache \(65504"):
        half.model.run([request])
    with pytest.raises(EngineError, match=r"not numbers \(NaN\): .* f16 cache \(65504"):
        half.model.run([replace(request, captures=(), logits="last")])
    # nobody looks at what came of it
    half.model.run([replace(request, captures=[Capture("l_out-0")])])
    result = half.model.run([Request(llama.prompt(5), captures=[Capture("l_out-0")])])[0]
    want = llama.oracle.run(llama.prompt(5))["logits"][-1:]
    np.testing.assert_allclose(logits(result), want, rtol=0, atol=0.1)


def test_the_logits_may_be_minus_infinity(llama: Tiny) -> None:
    def ban(h: np.ndarray) -> np.ndarray:
        h[:, 40:] = -np.inf
        return h

    request = Request(llama.prompt(), [Edit("logits", ban)], n_predict=3, stop_at_eog=False)
    result = llama.model.run([request])[0]
    assert max(result.tokens) < 40
    assert result.logits is not None and np.isneginf(result.logits[:, 40:]).all()


@pytest.mark.parametrize("error", [ZeroDivisionError("of mine"), KeyError("x"), SystemExit(3)])
def test_what_a_function_raises_comes_out_as_it_is(llama: Tiny, error: BaseException) -> None:
    def fail(h: np.ndarray) -> np.ndarray:
        raise error

    clean = Request(llama.prompt(), captures=[Capture("l_out")], n_predict=3)
    failing = Request(clean.tokens, [Edit("mlp_out.1", fail, tokens=-1)])
    with pytest.raises(type(error)) as caught:
        llama.model.run([clean, failing])
    assert caught.value is error
    check(llama.model.run([clean])[0], clean, llama.oracle)


@pytest.mark.parametrize("site", ["embed", "q.1", "logits"])
def test_ctrl_c_ends_the_run(llama: Tiny, site: str) -> None:
    calls = []

    def interrupted(h: np.ndarray) -> np.ndarray:
        calls.append(len(h))
        signal.raise_signal(signal.SIGINT)
        return h

    clean = Request(llama.prompt(), captures=[Capture("l_out")])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llama.model.run([Request(clean.tokens, [Edit(site, interrupted)], n_predict=5)])
    assert len(calls) == 1
    assert signal.getsignal(signal.SIGINT) is before
    check(llama.model.run([clean])[0], clean, llama.oracle)


def test_a_function_need_not_be_hashable(llama: Tiny) -> None:
    @dataclass
    class Scaled:
        by: float

        def __call__(self, h: np.ndarray) -> np.ndarray:
            return h * self.by

    request = Request(llama.prompt(), [Edit("resid_post.1", Scaled(2.0))])
    same = Request(llama.prompt(), [Edit("resid_post.1", "scale", coeff=2.0)])
    check_same(llama.model.run([request])[0], llama.model.run([same])[0])


# -- the table of operators ----------------------------------------------------------------


def test_the_module_has_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` +\| (.*?) +\|$", edits.__doc__ or "", re.MULTILINE)
    assert rows == [(o.name, o.formula) for o in OPERATORS.values()]


def test_other_names_of_operators() -> None:
    assert set(ALIASES.values()) < set(OPERATORS) and not set(ALIASES) & set(OPERATORS)


def test_replace_puts_c_times_v_and_copies_nothing_at_1() -> None:
    h, v = np.ones((2, 3), np.float32), np.array([0.1, -2, 3], np.float32)
    apply = OPERATORS["replace"].apply
    np.testing.assert_array_equal(apply(h, v, np.float32(-0.7)), [np.float32(-0.7) * v] * 2)
    assert np.shares_memory(apply(h, v, np.float32(1)), v)
    rows = np.zeros((2, 3), np.float32)
    Edit("resid_post.0", "replace", [v, 2 * v], coeff=3).apply(rows, np.arange(2), np.arange(2))
    np.testing.assert_array_equal(rows, [3 * v, 3 * (2 * v)])


ADDED = """
import sys
import numpy as np
from mia import Capture, Edit, Model, Request, Steering, UsageError, Vector

def refused(make):
    try:
        make()
    except UsageError as err:
        return str(err)

v = np.random.default_rng(0).standard_normal(48).astype(np.float32)
vector = Vector({1: v})
print(refused(lambda: Edit("l_out-1", "push", v)))
print(refused(lambda: Steering(vector, "push").edits()))
print(refused(lambda: Edit("l_out-1", "added", 0 * v)))
print(refused(lambda: Edit("l_out-1", "added", v, coeff=[1, 2])))
with Model(sys.argv[1], threads=1) as model:
    def run(edits):
        return model.run([Request([5, 6, 7], edits, [Capture("l_out-1")])])[0]["l_out-1"]
    plain = run([])
    for edits in ([Edit("l_out-1", "added", v, tokens=1, coeff=2)],
                  Steering(vector, "added", 2, tokens=1).edits()):
        rows = run(edits)
        np.testing.assert_array_equal(rows[::2], plain[::2])
        h = plain[1].astype(np.float64)
        np.testing.assert_allclose(rows[1], h - 2 * (h @ v) / (v @ v) * v, atol=1e-4)
"""


def test_an_operator_is_added_by_its_row_alone(tmp_path: Path, llama: Tiny) -> None:
    row = """    Operator("added", "h - 2(h·v̂)v̂", lambda h, v, c: h - 2 * _projection(h, v) * v,
             direction=True, coeff="none"),"""
    printed = run_extended(tmp_path, "edits.py", "_TABLE = (", row, ADDED, str(llama.path))
    edit, steering, zero, several = printed.splitlines()
    assert edit == f"unknown operator 'push'; known: added, {', '.join(OPERATORS)}"
    assert steering.startswith("unknown operator 'push'; known: added, replace, add, mean")
    assert zero == "the direction of the edit at l_out-1 is zero"
    assert several.startswith("operator 'added' takes one coefficient; several are for add")


def test_several_coefficients_stand_for_equal_parts_of_the_row() -> None:
    rows = np.ones((1, 6), np.float32)
    at = np.zeros(1, np.intp)
    Edit("head_out.0", "blend", np.full(6, 3), coeff=[0, 1, 0.5]).apply(rows, at, at)
    np.testing.assert_array_equal(rows, [[1, 1, 3, 3, 2, 2]])
    Edit("head_out.0", "scale", coeff=np.array([2, 0])).apply(rows, at, at)
    np.testing.assert_array_equal(rows, [[2, 2, 6, 0, 0, 0]])
    Edit("resid_post.0", "add", np.ones(2), dims=[0, 5], coeff=[1, -1]).apply(rows, at, at)
    np.testing.assert_array_equal(rows, [[3, 2, 6, 0, 0, -1]])
    with pytest.raises(UsageError, match="rows of 6 here, which 4 coefficients do not divide"):
        Edit("mlp_out.0", "scale", coeff=[1, 2, 3, 4]).check(Site("mlp_out", 0), (6,), 1)
    with pytest.raises(UsageError, match="'clamp' takes one coefficient"):
        Edit("mlp_out.0", "clamp", np.ones(6), coeff=[1, 2])
    with pytest.raises(UsageError, match="not a finite number"):
        Edit("mlp_out.0", "scale", coeff=[1, np.nan])


def test_an_edit_of_a_prompt_for_a_text_that_was_generated() -> None:
    every = Edit("l_out-1", "zero")
    assert every.on_text(5, 9) is every  # at all tokens, and at all that are generated
    prompt = Edit("l_out-1", "zero", generated=False).on_text(5, 9)
    assert prompt.positions(9) == [0, 1, 2, 3, 4] and not prompt.on_generated
    later = Edit("l_out-1", "add", [1.0, 2.0], tokens=[-1, 0], generated=True).on_text(5, 8)
    assert later.positions(8) == [4, 0, 5, 6, 7] and later.on_generated
    short = later.origin.on_text(5, 3)
    assert short.positions(3) == [0] and short.origin is later.origin is not later
    rows = Edit("l_out-1", "replace", [[1.0], [2.0], [3.0]], tokens=[3, 1, -1])
    whole = rows.on_text(5, 9)
    assert whole.positions(9) == [3, 1, 4] and whole.on_text(5, 7) is whole
    cut = rows.on_text(5, 4)
    assert cut.positions(4) == [3, 1] and cut.origin is cut
    assert cut.value.tolist() == [[1.0], [2.0]]
    assert rows.on_text(5, 1).positions(1) == []
    wrong = Edit("l_out-1", "replace", [[1.0], [2.0]], tokens=[3, 1, -1])
    with pytest.raises(UsageError, match="selects 3 tokens but has 2 rows"):
        wrong.on_text(5, 4)
