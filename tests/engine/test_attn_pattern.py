"""Attention scores and patterns as sites: keys by position, whatever cells they lie in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference import check
from tiny import Tiny

from mia.arrays import IntArray
from mia.edits import Edit
from mia.engine.segments import Row
from mia.errors import UsageError
from mia.methods.changes import Changes
from mia.request import Capture, Request
from mia.sites import Site

BOTH = ["attn_scores", "attn_pattern"]


def _forest(t: Tiny) -> list[Request]:
    """Prompts that share beginnings and part, so that cells and positions have nothing in common."""
    rng = np.random.default_rng(0)
    prompts = [t.prompt(n, seed) for n, seed in ((9, 1), (5, 2), (9, 3))]
    prompts += [p[:3] + rng.integers(3, 320, 4).tolist() for p in prompts]
    v = t.vector()
    requests = [Request(p, captures=[Capture(BOTH)]) for p in prompts]
    requests += [Request(p, [Edit("embed", "add", v, tokens=1)], [Capture(BOTH)]) for p in prompts]
    return requests


def test_with_others_in_the_cache_as_alone(case: Tiny) -> None:
    requests = _forest(case)
    for request, result in zip(requests, case.model.run(requests), strict=True):
        check(result, request, case.oracle)
        patterns = replace(request, captures=[Capture("attn_pattern")])
        for site, alone in case.model.run([patterns])[0].captures.items():
            np.testing.assert_allclose(result.captures[site], alone, rtol=0, atol=1e-5)


def test_rows_sum_to_one_over_the_past(case: Tiny) -> None:
    for request, result in zip(requests := _forest(case), case.model.run(requests), strict=True):
        n = len(request.tokens)
        age = np.subtract.outer(np.arange(n), np.arange(n))[:, None]  # (n_queries, 1, n_keys)
        for i in range(3):
            pattern = result[f"attn_pattern.{i}"]
            assert pattern.shape == (n, case.model.n_head, n)
            np.testing.assert_allclose(pattern.sum(-1), 1, rtol=0, atol=1e-6)
            window = 4 if case.name == "gemma2-window" and i % 2 == 0 else n
            seen = (age >= 0) & (age < window)
            assert (pattern[np.broadcast_to(~seen, pattern.shape)] == 0).all()
            assert (pattern >= 0).all()
            assert (pattern[-1, :, -min(window, n) :] > 0).all()


def test_a_later_run_finds_its_own_cells(llama: Tiny) -> None:
    """The cache keeps what earlier runs left; nothing of it may show."""
    llama.model.run([Request(llama.prompt(60, seed=9), captures=[Capture(BOTH)])])
    for request in _forest(llama):
        check(llama.model.run([request])[0], request, llama.oracle)


def _halve(h: np.ndarray) -> np.ndarray:
    return h / 2


EDITS = [
    [Edit("attn_pattern.1", "zero", heads=[2])],
    [Edit("attn_pattern.0", "zero", tokens=[3, -1], heads=[0, 3])],
    [Edit("attn_pattern.2", "scale", coeff=0.25, heads=[1, 2], tokens=-1)],
    [Edit("attn_pattern.2", _halve, heads=[1])],
    [Edit("attn_scores.1", "scale", coeff=-2.0, heads=[1], tokens=slice(2, None))],
    [Edit("attn_scores.0", "zero"), Edit("attn_pattern.0", _halve, heads=[2], tokens=4)],
    [Edit("attn_scores.2", _halve, heads=[3, 0])],
    [Edit("attn_pattern.1", "scale", heads=[3, 0], coeff=[0.5, 0.0])],
]


def test_edits_of_heads(case: Tiny) -> None:
    prompt = case.prompt(8)
    requests = [Request(prompt, e, [Capture([*BOTH, "head_out", "l_out"])], "all") for e in EDITS]
    plain = case.model.run([Request(prompt, captures=[Capture(BOTH)])])[0]
    clean = case.oracle.run(prompt)
    for request, result in zip(requests, case.model.run(requests), strict=True):
        want = check(result, request, case.oracle)
        assert np.abs(want["logits"] - clean["logits"]).max() > 1e-3  # the edit matters
        edit = request.edits[0]
        rest = [
            h for h in range(case.model.n_head) if edit.heads and h not in np.atleast_1d(edit.heads)
        ]
        site = str(edit.site)
        np.testing.assert_allclose(
            result[site][:, rest], plain[site][:, rest], rtol=0, atol=1e-5, err_msg=site
        )


def _hide(*keys: int) -> Any:
    """For the scores of one head (n, n_keys): nobody but the key itself looks at it."""

    def apply(h: np.ndarray) -> np.ndarray:
        h[:, [k for k in keys if k < h.shape[1] - 1]] = -np.inf
        return h

    return apply


def test_a_key_that_is_hidden_gets_nothing(case: Tiny) -> None:
    """Attention knockout (Geva et al. 2023): minus infinity before the softmax."""
    edit = Edit("attn_scores.1", _hide(0, 3), heads=[2], tokens=slice(1, None))
    request = Request(case.prompt(8), [edit], [Capture("attn_pattern.1")], "all", n_predict=3)
    result = case.model.run([Request(case.prompt(12, seed=4)), request])[1]
    check(result, request, case.oracle)
    pattern = result["attn_pattern.1"][:, 2]  # (n_queries, n_keys)
    assert (pattern[1:, 0] == 0).all()
    assert (pattern[4:, 3] == 0).all()
    np.testing.assert_allclose(pattern.sum(-1), 1, rtol=0, atol=1e-6)


def _plus(number: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda h: h + number


def test_a_query_needs_a_key(llama: Tiny, tiny: Any) -> None:
    def blind(h: np.ndarray) -> np.ndarray:
        return np.full_like(h, -np.inf)

    request = Request(llama.prompt(6), [Edit("attn_scores.2", blind, heads=[4], tokens=3)])
    with pytest.raises(UsageError, match="all keys of query 3 are blocked in layer 2, head 4"):
        llama.model.run([request])
    for bad in (np.inf, np.nan):
        wild = Edit("attn_scores.2", _plus(bad), tokens=-1)
        with pytest.raises(UsageError, match=r"attn_scores\.2 makes numbers that are not finite"):
            llama.model.run([Request(llama.prompt(6), [wild])])
    # what a sliding window hides is no key either

    def look_far_back(h: np.ndarray) -> np.ndarray:
        return np.where(np.arange(h.shape[1]) < 4, h, -np.inf)

    window = tiny("gemma2-window")
    far = Request(window.prompt(8), [Edit("attn_scores.0", look_far_back, heads=[1])])
    with pytest.raises(UsageError, match="all keys of query 7 are blocked in layer 0, head 1"):
        window.model.run([far])
    clean = Request(request.tokens)
    check(llama.model.run([clean])[0], clean, llama.oracle)


def test_while_generating(case: Tiny) -> None:
    """Activations of several sequences that grow side by side, some with a head turned off."""
    edits = [[], [Edit("attn_pattern.1", "zero", heads=[1])], [Edit("attn_scores.2", _halve)]]
    requests = [
        Request(
            case.prompt(n, seed=n),
            e,
            [Capture(BOTH, tokens, generated=True), Capture("head_out.1", -1, generated=True)],
            n_predict=n_predict,
            stop_at_eog=False,
        )
        for n, n_predict, tokens in ((4, 6, None), (7, 3, [2, -1]), (7, 5, []))
        for e in edits
    ]
    for request, result in zip(requests, case.model.run(requests), strict=True):
        check(result, request, case.oracle)
        for i in range(3):
            pattern = result[f"attn_pattern.{i}"]
            assert pattern.shape[2] == len(request.tokens) + request.n_predict - 1
            if request.edits != edits[1]:
                np.testing.assert_allclose(pattern.sum(-1), 1, rtol=0, atol=1e-6)
    check(case.model.run(requests[4:5])[0], requests[4], case.oracle)


def test_in_small_micro_batches(case: Tiny, reopen: Any, five_rows: None) -> None:
    t = reopen(case)
    requests = [Request(t.prompt(8), e, [Capture(BOTH)], n_predict=3) for e in EDITS]
    requests += _forest(t)
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, request, t.oracle)


def test_a_half_precision_cache_has_patterns_too(llama: Tiny, reopen: Any) -> None:
    """Where fused attention would be taken, a read of patterns turns it off for its run."""
    t = reopen(llama, kv_type="f16")
    prompt = t.prompt(8)
    plain, read = (t.model.run([Request(prompt, captures=c)])[0] for c in ([], [Capture(BOTH)]))
    want = t.oracle.run(prompt)
    for i in range(3):
        site = Site("attn_pattern", i)
        np.testing.assert_allclose(read.captures[site], want[str(site)], rtol=0, atol=0.02)
    np.testing.assert_allclose(plain.logits, read.logits, rtol=0, atol=0.1)
    assert sorted(flash for _, flash in t.model._engine.sessions.open) == [False, True]


@pytest.mark.parametrize(("a", "b", "n"), [(8, 3, 12), (3, 3, 9), (12, 4, 9)])
def test_cells_that_a_window_left_behind_are_used_again(tiny: Any, a: int, b: int, n: int) -> None:
    """For later tokens of the same sequence: what is read there is not the old key's."""
    t = tiny("gemma2-window")
    requests = [
        Request(t.prompt(a, seed=3), n_predict=3, stop_at_eog=False),
        Request(
            t.prompt(b, seed=1),
            captures=[Capture("attn_pattern", generated=True)],
            n_predict=n,
            stop_at_eog=False,
        ),
    ]
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, request, t.oracle)


def _past_the_window(t: Tiny, edits: list[Edit], n: int) -> list[Request]:
    """Prompts much longer than the window, so many that they use each other's cells again."""
    rng = np.random.default_rng(5)
    draw = [rng.integers(3, t.model.n_vocab, 60).tolist() for _ in range(n)]
    return [Request(p, edits, [Capture([*BOTH, "head_out"])], n_predict=3) for p in draw]


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize(
    "edits",
    [
        [],
        [Edit("attn_scores.0", "scale", coeff=-2.0, heads=[1])],
        [Edit("attn_scores", _plus(1.5), heads=[0, 2], tokens=slice(30, None), generated=True)],
        [Edit("attn_pattern.2", _halve)],
    ],
    ids=["plain", "scaled", "moved", "halved"],
)
def test_keys_behind_a_window_have_no_score(tiny: Any, n: int, edits: list[Edit]) -> None:
    """They have 0, like the future, whoever uses their cells; and edits change nothing of others."""
    t = tiny("gemma2-window")
    if edits and edits[0].site == "attn_scores":
        edits = [
            Edit(
                f"attn_scores.{i}", _plus(1.5), heads=[0, 2], tokens=slice(30, None), generated=True
            )
            for i in range(3)
        ]
    requests = _past_the_window(t, edits, n)
    results = t.model.run(requests)
    for request, result in list(zip(requests, results, strict=True))[-3:]:
        check(result, request, t.oracle)
        age = np.subtract.outer(np.arange(60), np.arange(60))
        hidden = np.broadcast_to(((age < 0) | (age > 3))[:, None], result["attn_scores.0"].shape)
        assert (result["attn_scores.0"][hidden] == 0).all()
        assert (result["attn_pattern.0"][hidden] == 0).all()
        check(t.model.run([request])[0], request, t.oracle)


def test_a_key_behind_a_window_gets_no_weight(tiny: Any) -> None:
    t = tiny("gemma2-window")
    uniform = Edit("attn_pattern.0", lambda h: np.full_like(h, 0.125), tokens=-1, heads=[1])
    with pytest.raises(UsageError, match=r"weight to key 0, .* window hides from query 7"):
        t.model.run([Request(t.prompt(8), [uniform])])
    elsewhere = Edit("attn_pattern.1", uniform.op, tokens=-1, heads=[1])
    request = Request(t.prompt(8), [elsewhere], [Capture(BOTH)])
    check(t.model.run([request])[0], request, t.oracle)


def test_cells_are_looked_up_once_for_all_layers_and_edits(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Row] = []
    plain = Row.path_cells

    def path_cells(self: Row, group: int) -> IntArray:
        calls.append(self)
        return plain(self, group)

    monkeypatch.setattr(Row, "path_cells", path_cells)
    t = tiny("llama")
    ids = t.prompt(9, 1)
    blocks = ["2..->0", "3..->1", "4..->2,3"]
    edits = Changes(block=blocks, ablate="1.1", ablate_attention=True).edits(t.model, ids)
    t.model.run([Request(ids, edits, [Capture("attn_pattern")])])
    assert 0 < len(calls) <= len(ids)
