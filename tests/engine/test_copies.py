"""Nodes that are only read, and small: compiled code copies them, Python takes them behind the decode."""

import os
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.engine import limits
from mia.llama import tracer, watch
from mia.request import Capture, Request, Result

SITES = ["resid_post", "resid_mid", "attn_out", "head_out", "q", "k", "v", "mlp_norm", "mlp_out"]
compiled = pytest.mark.skipif(watch.native_watch() is None, reason="no compiled code")


def _requests(t: Tiny) -> list[Request]:
    v, prompt = t.vector(), t.prompt(9)
    sites = {site.name for site in t.model.topology.sites}
    more = [f"{s}.2" for s in ("router", "experts", "expert_weights") if s in sites]
    reads = [
        Capture([*SITES, *more], generated=True),
        Capture(["attn_out.1", "final_norm", "logits"], tokens=[-1, 0], generated=True),
        Capture("attn_pattern.1", generated=True),
    ]
    edits: list[list[Edit]] = [
        [],
        [Edit("attn_out.1", "zero"), Edit("head_out.0", "scale", heads=[1], coeff=2.0)],
        [Edit("resid_post.0", "add", v, tokens=-1, generated=True)],
    ]
    long = [Request(prompt, e, reads, n_predict=4, stop_at_eog=False) for e in edits]
    return [*long, Request(t.prompt(4, seed=5), [], reads, n_predict=3, stop_at_eog=False)]


def _run(t: Tiny) -> list[Result]:
    requests = _requests(t)
    return [*t.model.run(requests), *(t.model.run([r])[0] for r in requests)]


def _equal(t: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(limits, "COPIED_BYTES", -1)
        plain = _run(reopen(t))
    for got, want in zip(_run(reopen(t)), plain, strict=True):
        assert got.tokens == want.tokens
        for site, rows in want.captures.items():
            np.testing.assert_array_equal(got.captures[site], rows, err_msg=str(site))


def test_copies_are_what_python_would_read(
    case: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _equal(case, reopen, monkeypatch)


def test_copies_in_mixtures(mixture: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _equal(mixture, reopen, monkeypatch)


@compiled
@pytest.mark.skipif("MIA_TEST_RPC" in os.environ, reason="copies are of the host's memory")
def test_python_is_called_for_edits_only(llama: Tiny, reopen: Any, visited: list[int]) -> None:
    t = reopen(llama)
    assert t.model.topology
    read = Capture(["resid_mid", "attn_out", "head_out", "mlp_out"], generated=True)
    request = Request(t.prompt(5), [], [read], n_predict=4, stop_at_eog=False)
    t.model.run([request])
    visited.clear()
    t.model.run([request])
    assert visited == []
    edit = Edit("attn_out.1", "zero")
    t.model.run([Request(t.prompt(5), [edit], [read], n_predict=4, stop_at_eog=False)])
    sites = t.model.topology.sites
    (index,) = {node.index for site, node in sites.items() if str(site) == "attn_out.1"}
    assert set(visited) == {index}


def test_large_nodes_are_not_copied_twice(
    llama: Tiny, reopen: Any, visited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 20
    monkeypatch.setattr(limits, "COPIED_BYTES", 4 * llama.model.n_embd * (n - 1))
    t = reopen(llama)
    t.model.run([Request(t.prompt(n), [], [Capture("attn_out")])])
    assert len(set(visited)) == t.model.n_layer


def test_without_compiled_code_python_reads_them(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = _run(reopen(llama))
    monkeypatch.setattr(tracer, "native_watch", lambda: None)
    for got, result in zip(_run(reopen(llama)), want, strict=True):
        for site, rows in result.captures.items():
            np.testing.assert_array_equal(got.captures[site], rows, err_msg=str(site))
