"""Metrics of a few tokens: the model's own logits, without its unembedding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from reference import expected
from tiny import Tiny, logits

from mia import LogitDifference, LogitSum, TokenLogits
from mia.arrays import Array
from mia.edits import Edit
from mia.engine import limits
from mia.errors import EngineError, RangeError, UsageError
from mia.lenses.unembedding import Unembedding
from mia.llama import Tracer
from mia.model import Model
from mia.request import Capture, Request, TokenMetric
from mia.sites import Site

TOKENS = [3, 77, 5]


def _requests(t: Tiny, metric: TokenMetric) -> list[Request]:
    prompt, v = t.prompt(), t.vector()
    captures = [Capture("final_norm", tokens=[4, 1])]
    return [
        Request(prompt, logits="all", metric=metric),
        Request(prompt, [Edit("resid_post.1", "add", v, tokens=-1)], metric=metric),
        Request(prompt, [Edit("resid_post.1", "add", 2 * v, tokens=-1)], metric=metric),
        Request(prompt, [Edit("resid_post.0", "add", v)], metric=metric, logits=[2, -1]),
        Request(prompt, [Edit("final_norm", "scale", coeff=0.5)], captures, metric=metric),
        Request(prompt, [Edit("logits", "scale", coeff=0.5)], metric=metric),
        Request(prompt, captures=captures, metric=metric, n_predict=3, stop_at_eog=False),
    ]


def _positions(request: Request) -> Any:
    return {"all": slice(None), "last": [-1]}.get(str(request.logits), request.logits)


def test_the_logits_are_the_models_own(case: Tiny) -> None:
    requests = _requests(case, TokenLogits(TOKENS))
    for request, result in zip(requests, case.model.run(requests), strict=True):
        want = expected(case.oracle, request)
        rows = want["logits"][_positions(request)][:, TOKENS]
        np.testing.assert_allclose(result.value, rows, rtol=0, atol=1e-4)
        assert result.logits is None
        assert list(result.captures) == ([Site("final_norm")] if request.captures else [])
        for capture, arrays in result.by_capture:
            truth = want["final_norm"][capture.tokens]
            np.testing.assert_allclose(arrays[Site("final_norm")], truth, rtol=0, atol=1e-4)


def test_a_recurrent_model_has_them_too(tiny: Callable[[str], Tiny]) -> None:
    m, prompt = tiny("mamba").model, [5, 40, 77]
    plain, few = m.run([Request(prompt), Request(prompt, metric=LogitDifference(3, 77))])
    row = logits(plain)[0]
    assert few.value == pytest.approx(row[3] - row[77], abs=1e-5)


def test_what_a_metric_gives(llama: Tiny) -> None:
    prompt = llama.prompt()
    weights = {3: 2.0, 77: -0.5}
    requests = [
        Request(prompt, logits="all"),
        Request(prompt, metric=LogitDifference(3, 77)),
        Request(prompt, metric=LogitSum(weights)),
        Request(prompt, metric=LogitSum(weights), logits="all"),
    ]
    plain, difference, last, every = llama.model.run(requests)
    rows = logits(plain)
    assert isinstance(difference.value, float) and isinstance(last.value, float)
    assert difference.value == pytest.approx(rows[-1, 3] - rows[-1, 77], abs=1e-5)
    np.testing.assert_allclose(every.value, 2 * rows[:, 3] - rows[:, 77] / 2, rtol=0, atol=1e-5)
    assert last.value == pytest.approx(every.value[-1], abs=1e-5)
    for request in requests[1:]:  # called with all logits they are the same
        assert request.metric is not None
        mine = llama.model.run([request])[0].value
        given = rows if request.logits == "all" else rows[-1:]
        np.testing.assert_allclose(request.metric(given), mine, rtol=0, atol=1e-5)


def _unembeds(t: Tiny, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each decode, whether it computes the logits."""
    out: list[bool] = []
    plain = Tracer.expect
    at = t.model.topology.sites[Site("logits")].index

    def expect(self: Tracer, addrs: Any, visits: Any, skip: Any, on_data: Any) -> None:
        out.append(at not in skip)
        plain(self, addrs, visits, skip, on_data)

    with monkeypatch.context() as m:
        m.setattr(Tracer, "expect", expect)
        t.model.run(requests)
    return out


def test_the_unembedding_is_left_out_where_all_metrics_are_of_a_few_tokens(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, metric = llama.prompt(), LogitDifference(3, 77)
    edits = [Edit(f"head_out.{i}", "zero", tokens=-1, heads=[h]) for i in range(3) for h in (0, 1)]
    few = [Request(prompt, [e], metric=metric) for e in edits]
    llama.model.run(few)  # what is new is learned
    assert not any(_unembeds(llama, few, monkeypatch))
    full = [Request(prompt, [e]) for e in edits]
    assert any(_unembeds(llama, [*few, *full], monkeypatch))
    values = [r.value for r in llama.model.run([*few, *full])]
    rows = [logits(r)[0] for r in llama.model.run(full)]
    np.testing.assert_allclose(values[: len(few)], [r[3] - r[77] for r in rows], atol=3e-5)


def test_an_unembedding_that_mia_does_not_know_runs_whole(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    monkeypatch.setattr(Model, "_unembedding", None)
    request = Request(t.prompt(), [Edit("head_out.1", "zero")], metric=LogitDifference(3, 77))
    assert all(_unembeds(t, [request], monkeypatch))
    row = expected(t.oracle, request)["logits"][-1]
    assert t.model.run([request])[0].value == pytest.approx(row[3] - row[77], abs=1e-4)


def test_numbers_that_are_not_the_models_are_not_used(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    plain = Unembedding.__call__
    monkeypatch.setattr(
        Unembedding, "__call__", lambda self, rows, ids: 1.1 * plain(self, rows, ids)
    )
    assert t.model._unembedding is None


def test_steering_by_the_control_vector_is_measured_too(case: Tiny) -> None:
    edit = Edit("resid_post.1", "add", case.vector())
    request = Request(case.prompt(), [edit], metric=LogitDifference(3, 77))
    row = expected(case.oracle, request)["logits"][-1]
    value = case.model.run([request])[0].value
    assert value == pytest.approx(row[3] - row[77], abs=1e-4)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: TokenLogits([]), "needs at least one"),
        (lambda: LogitSum({}), "needs at least one"),
        (lambda: LogitDifference(5, 5), "of two tokens, both are 5"),
        (lambda: TokenLogits(cast(Any, "Paris")), "list of whole numbers"),
        (lambda: LogitSum({3: float("nan")}), "not a finite number"),
        (lambda: LogitSum({3: 1e39}), "not finite in float32"),
        (lambda: LogitSum(cast(Any, [3, 4])), "each token id to its weight"),
    ],
)
def test_what_is_no_metric(make: Callable[[], TokenMetric], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        make()


def test_a_token_that_there_is_not(llama: Tiny) -> None:
    for token in (-1, llama.model.n_vocab):
        with pytest.raises(RangeError, match=f"token id {token} is out of range"):
            llama.model.run([Request([5, 6], metric=TokenLogits([token]))])


def test_logits_that_are_not_finite_are_refused(llama: Tiny) -> None:
    large = Edit("final_norm", "scale", coeff=1e38)
    with pytest.raises(EngineError, match=r"the logits are (infinite|not numbers)"):
        llama.model.run([Request([1, 2], [large], metric=TokenLogits(range(50)))])
    fine = Request([1, 2], metric=TokenLogits([3]))
    assert np.isfinite(llama.model.run([fine])[0].value).all()


def test_rows_that_are_not_finite_are_refused(tiny: Callable[[str], Tiny]) -> None:
    request = Request(
        [85, 155, 198], [Edit("resid_mid.0", "zero")], metric=LogitDifference(3, 77)
    )  # each router's softmax is divided by zero
    with pytest.raises(EngineError, match="final_norm has numbers that are not finite"):
        tiny("qwen2moe").model.run([request])


def test_a_metric_of_many_tokens_reads_the_models_logits(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = Edit("head_out.1", "zero")
    few, many = (TokenLogits(range(n)) for n in (limits.METRIC_TOKENS, limits.METRIC_TOKENS + 1))
    assert not any(_unembeds(llama, [Request(llama.prompt(), [edit], metric=few)], monkeypatch))
    request = Request(llama.prompt(), [edit], metric=many)
    assert all(_unembeds(llama, [request], monkeypatch))
    rows = logits(llama.model.run([Request(llama.prompt(), [edit])])[0])
    np.testing.assert_array_equal(llama.model.run([request])[0].value, many(rows))


def test_rows_of_the_unembedding_are_kept_within_bytes(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = llama.model
    unembedding = Unembedding(m.topology, m.weights, architecture=m.architecture)
    rows = np.ones((2, m.n_embd), np.float32)
    monkeypatch.setattr("mia.lenses.unembedding._KEPT_BYTES", 10 * 4 * m.n_embd)
    for n in (4, 5, 6, 11, 3):
        assert unembedding(rows, range(n)).shape == (2, n)
        assert sum(matrix.nbytes for matrix, _ in unembedding._known.values()) <= 40 * m.n_embd
    assert list(unembedding._known) == [(0, 1, 2)]


def test_the_metrics_of_one_run_read_the_same_logits(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, metric = llama.prompt(), TokenLogits(TOKENS)
    requests = [
        Request(prompt, metric=metric),
        Request(prompt, [Edit("head_out.1", "zero")], metric=metric),
        Request(prompt, [Edit("logits", "scale", coeff=1.0)], metric=metric),
    ]
    assert any(_unembeds(llama, requests, monkeypatch))
    values = [r.value for r in llama.model.run(requests)]
    rows = [logits(r) for r in llama.model.run([replace(r, metric=None) for r in requests])]
    for value, row in zip(values, rows, strict=True):
        np.testing.assert_array_equal(value, metric(row))
    assert not any(_unembeds(llama, requests[:2], monkeypatch))


def test_steered_and_unsteered_runs_read_the_same_logits(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = LogitDifference(3, 77)
    edit = Edit("resid_post.1", "add", llama.vector())
    steered = Request(llama.prompt(), [edit], metric=metric)
    for request in (steered, replace(steered, edits=[])):
        llama.model.run([request])  # steered graphs are others: they are learned
        decodes = _unembeds(llama, [request], monkeypatch)
        assert decodes and not any(decodes)
    assert (
        llama.model.run([steered])[0].value
        != llama.model.run([replace(steered, edits=[])])[0].value
    )


class _Ids(TokenMetric):
    def __init__(self, tokens: Any):
        self.tokens = tokens

    def of(self, logits: Array) -> Any:
        return logits.shape


class _NoIds(TokenMetric):
    def of(self, logits: Array) -> Any:
        return logits.shape


@pytest.mark.parametrize("metric", [_NoIds(), *map(_Ids, [(), 7, (3.5,), "3", None])])
def test_a_metric_must_say_its_tokens(metric: TokenMetric) -> None:
    with pytest.raises(UsageError, match="tokens of a metric"):
        Request([1, 2], metric=metric)


def test_a_metrics_tokens_may_be_numbers_of_numpy(llama: Tiny) -> None:
    request = Request([1, 2], metric=_Ids(np.array([3, 77])))
    assert llama.model.run([request])[0].value == (1, 2)
