"""Edits that are one sum, product or replacement of each number: compiled code makes them, to the last bit
as Python does."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, logits

from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.llama import tracer, watch
from mia.request import Capture, Request, Result, Sampling
from mia.sites import parse

compiled = pytest.mark.skipif(
    watch.native_watch() is None or "MIA_TEST_RPC" in os.environ,
    reason="no compiled code, or memory that it cannot reach",
)


def _edits(t: Tiny) -> list[list[Edit]]:
    """For each of some requests."""
    v, rows = t.vector(), np.stack([t.vector(seed=i) for i in range(3)])
    head = t.vector("head_out.1", seed=4)
    n_head = t.model.topology.sites[
        next(s for s in t.model.topology.sites if str(s) == "head_out.1")
    ]
    size = n_head.shape[-1]
    return [
        [],
        [Edit("resid_post.0", "add", v, coeff=0.3)],
        [Edit("resid_post.0", "add", v, coeff=-0.7), Edit("resid_post.0", "scale", coeff=1.1)],
        [Edit("attn_out.1", "zero", tokens=[1, 3], generated=True)],
        [Edit("mlp_out.1", "replace", rows, tokens=[0, 2, 4]), Edit("resid_mid.0", "mean", rows)],
        [Edit("head_out.1", "zero", heads=[1]), Edit("head_out.0", "scale", heads=[0, 1], coeff=3)],
        [Edit("head_out.1", "add", head[: 2 * size], heads=[1, 0])],
        [Edit("resid_post.2", "add", v, tokens=-1, generated=True)],
        [
            Edit(
                "resid_post.1",
                "scale",
                coeff=np.linspace(0.5, 1.5, t.model.n_embd, dtype=np.float32),
            )
        ],
        [Edit("resid_post.0", "add", v, keep_norm=True), Edit("q.1", "zero", dims=[0, 3])],
        [Edit("resid_post.0", "project_out", v), Edit("resid_post.0", "add", -0.0 * v)],
    ]


def _run(t: Tiny) -> list[Result]:
    requests = [
        Request(
            t.prompt(6 + i % 3, seed=i % 2),
            edits,
            [Capture(["resid_post", "resid_mid"])] if i % 4 == 1 else [],
            logits="all",
            n_predict=4,
            stop_at_eog=False,
            sampling=Sampling(temperature=1.0, seed=i),
        )
        for i, edits in enumerate(_edits(t))
    ]
    return [*t.model.run(requests), *(t.model.run([r])[0] for r in requests)]


@compiled
def test_compiled_code_makes_the_same_numbers(
    case: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = _run(reopen(case))
    monkeypatch.setattr(tracer, "native_watch", lambda: None)
    for mine, want in zip(got, _run(reopen(case)), strict=True):
        assert mine.tokens == want.tokens
        assert mine.logits is not None and want.logits is not None
        assert mine.logits.tobytes() == want.logits.tobytes()
        for site, rows in want.captures.items():
            assert mine.captures[site].tobytes() == rows.tobytes(), site


@compiled
@pytest.mark.parametrize(
    ("edit", "in_python"),
    [
        ({"op": "add", "value": True}, False),
        ({"op": "zero"}, False),
        ({"op": "scale", "coeff": 2.0}, False),
        ({"op": "project_out", "value": True}, True),
        ({"op": "add", "value": True, "keep_norm": True}, True),
        ({"op": lambda rows: rows}, True),
    ],
)
def test_who_makes_it(
    llama: Tiny, reopen: Any, visited: list[int], edit: dict[str, Any], in_python: bool
) -> None:
    t = reopen(llama)
    more = edit | ({"value": t.vector()} if edit.get("value") else {})
    steps = [Edit("resid_mid.1", **more), Edit("mlp_out.0", "zero", tokens=-1)]
    t.model.run([Request(t.prompt(5), steps, n_predict=3, stop_at_eog=False)])
    visited.clear()
    t.model.run([Request(t.prompt(5), steps, n_predict=3, stop_at_eog=False)])
    sites = {str(site): node.index for site, node in t.model.topology.sites.items()}
    assert set(visited) == ({sites["resid_mid.1"]} if in_python else set())


@pytest.mark.parametrize(
    "made",
    [
        [("scale", None, 1e10), ("scale", None, 1e10)],  # taken back, or Python would begin at 1e20
        [("add", 1.0, 1.0), ("add", 1e30, 1e5)],
        [("add", 1e30, 1e30)],
        [("replace", -2e17, 1.0), ("add", 2e17, 1.0)],
    ],
)
def test_a_change_that_is_too_large_is_python_s_to_report(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, made: list[tuple[str, Any, float]]
) -> None:
    ones = np.ones(llama.model.n_embd, np.float32)
    edits = [
        Edit("resid_post.1", op, None if size is None else ones * np.float32(size), coeff=coeff)
        for op, size, coeff in made
    ]
    t = reopen(llama)
    good = Request(t.prompt(5), n_predict=3)
    want = t.model.run([good])[0]
    messages = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(tracer, "native_watch", lambda: None)
            t = reopen(llama)
        with pytest.raises(UsageError) as refused:
            t.model.run([Request(t.prompt(5), edits, n_predict=3)])
        messages.append(str(refused.value))
        assert t.model.run([good])[0].tokens == want.tokens
    assert messages[0] == messages[1] and "resid_post.1" in messages[0]


@pytest.mark.parametrize("site", ["k.1", "v.1"])
def test_keys_and_values_that_all_queries_share_are_one_head(
    tiny: Callable[[str], Tiny], site: str
) -> None:
    """Their node does not tell: a row of head_dim numbers. The head is all of it, and there is no other."""
    t = tiny("starcoder")
    assert t.model.topology.about("v") == "1 value heads of 8, each read by 6 query heads"
    prompt = t.prompt(8)
    request = Request(
        prompt, [Edit(site, "zero", heads=0, tokens=[2, 5])], [Capture(site)], logits="all"
    )

    def silent(rows: Any) -> Any:
        rows = rows.copy()
        rows[[2, 5]] = 0
        return rows

    want = t.oracle.run(prompt, {site: silent})
    result = t.model.run([request])[0]
    np.testing.assert_allclose(result.captures[parse(site, 3)], want[site], atol=1e-4)
    np.testing.assert_allclose(logits(result), want["logits"], atol=1e-4)
    with pytest.raises(RangeError, match=f"head 1 is out of range; {site} has 0 to 0"):
        t.model.run([Request(prompt, [Edit(site, "zero", heads=1)])])
