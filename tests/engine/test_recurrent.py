"""A memory that cannot be shared or cut back (mamba): each request alone, and all the same."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from oracle import rms_norm, silu
from reference import check_same
from tiny import Tiny
from tiny_gguf import D_STATE, DT_RANK

from mia.edits import Edit
from mia.errors import SiteError, UsageError
from mia.llama import Context
from mia.request import Capture, Request, Result, Sampling
from mia.sites import Site

Array = np.ndarray
PROMPT = [5, 40, 77, 300, 12, 260, 5, 8, 91]


def forward(
    w: dict[str, Array], tokens: Sequence[int], add: dict[tuple[int, int], Array] | None = None
) -> list[Array]:
    """Every block's output and then the logits, in float64 (Gu & Dao 2023, algorithm 2 and
    section 3.4). `add`: (block, token) -> what is added to that output."""
    x, out = w["token_embd.weight"][list(tokens)], []  # (T, n_embd)
    for i in range(3):

        def weight(name: str, i: int = i) -> Array:
            return w[f"blk.{i}.{name}"]

        a = rms_norm(x, 1e-5) * weight("attn_norm.weight")
        u, z = np.split(a @ weight("ssm_in.weight").T, 2, axis=1)  # (T, d_inner)
        kernel = weight("ssm_conv1d.weight")  # (d_inner, d_conv)
        padded = np.vstack([np.zeros((kernel.shape[1] - 1, u.shape[1])), u])
        u = sum(padded[j : j + len(u)] * kernel[:, j] for j in range(kernel.shape[1]))
        u = silu(u + weight("ssm_conv1d.bias"))
        low, b, c = np.split(u @ weight("ssm_x.weight").T, [DT_RANK, DT_RANK + D_STATE], axis=1)
        dt = np.logaddexp(
            0, low @ weight("ssm_dt.weight").T + weight("ssm_dt.bias")
        )  # (T, d_inner)
        state, y = np.zeros(weight("ssm_a").shape), np.empty_like(u)  # (d_inner, d_state)
        for t in range(len(u)):
            state = np.exp(dt[t, :, None] * weight("ssm_a")) * state
            state += (dt[t] * u[t])[:, None] * b[t]
            y[t] = state @ c[t]
        y += weight("ssm_d") * u
        x = x + (y * silu(z)) @ weight("ssm_out.weight").T
        for (block, t), v in (add or {}).items():
            if block == i:
                x[t] += v
        out.append(x.copy())
    out.append(rms_norm(x, 1e-5) * w["output_norm.weight"] @ w["output.weight"].T)
    return out


@pytest.fixture(scope="module")
def mamba(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("mamba")


def _weights(t: Tiny) -> dict[str, Array]:
    read = t.model.weights
    out = {}
    for name in read.names:
        vector = len(read.shape(name)) == 1
        a = read.vector(name) if vector else read.matrix(name)
        out[name] = a.astype(np.float64)
    return out


def _check(result: Result, want: list[Array]) -> None:
    for i in range(3):
        np.testing.assert_allclose(result[f"l_out-{i}"], want[i], rtol=0, atol=1e-4)
    assert result.logits is not None
    n = len(result.logits)
    np.testing.assert_allclose(result.logits, want[3][:n], rtol=0, atol=1e-4)


def test_captures_and_edits(mamba: Tiny) -> None:
    w, v = _weights(mamba), np.random.default_rng(0).standard_normal(48)
    plain = Request(PROMPT, captures=[Capture("l_out")], logits="all")
    at = [("resid_post.1", 1), ("resid_pre.2", 1), ("resid_post.2", 2), ("l_out-0", 0)]
    edits = [Edit(site, "add", v, tokens=[2, -1]) for site, _ in at]
    requests = [plain] + [Request(PROMPT, [e], plain.captures, "all") for e in edits]
    results = mamba.model.run(requests)
    _check(results[0], forward(w, PROMPT))
    for (_, block), result in zip(at, results[1:], strict=True):
        _check(result, forward(w, PROMPT, {(block, 2): v, (block, 8): v}))


def test_several_requests_are_as_one_by_one(mamba: Tiny) -> None:
    v = np.random.default_rng(1).standard_normal(48)
    edit = Edit("l_out-1", "add", v, tokens=0, generated=True)
    requests = [
        Request(
            PROMPT, captures=[Capture("l_out", generated=True)], n_predict=5, stop_at_eog=False
        ),
        Request(PROMPT[:3], logits="all"),
        Request(PROMPT, n_predict=4, sampling=Sampling(temperature=1, seed=2), stop_at_eog=False),
        Request([7], captures=[Capture("attn_norm.2")]),
        Request(PROMPT, [edit], [Capture("l_out", -1, generated=True)], n_predict=3),
        Request(PROMPT[:3], logits="all"),
    ]
    together = mamba.model.run(requests)
    for request, result in zip(requests, together, strict=True):
        check_same(mamba.model.run([request])[0], result)
    generated = together[0]
    full = [*PROMPT, *generated.tokens[:-1]]
    want = forward(_weights(mamba), full)
    for i in range(3):
        np.testing.assert_allclose(generated[f"l_out-{i}"], want[i], rtol=0, atol=1e-4)
    assert generated.tokens == want[3][len(PROMPT) - 1 :].argmax(1).tolist()


def test_the_state_is_carried_over_micro_batches(
    mamba: Tiny, reopen: Any, five_rows: None, decoded: list[int]
) -> None:
    t = reopen(mamba)
    result = t.model.run([Request(PROMPT, captures=[Capture("l_out")], logits="all")])[0]
    assert decoded == [5, 4]
    _check(result, forward(_weights(t), PROMPT))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_unexpected_graph_starts_the_request_again(
    mamba: Tiny, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The state cannot be taken back by one token, so from the second decode on all is run anew."""
    captures = [Capture("l_out", generated=True)]
    request = Request(PROMPT, captures=captures, n_predict=3, stop_at_eog=False)
    want = mamba.model.run([request])[0]
    sizes: list[int] = []
    plain = Context.decode

    def decode(self: Context, tokens: Any, *rest: Any) -> bool:
        if len(sizes) == at:
            t = self.tracer
            assert t is not None and isinstance(t.requested, Mapping)
            t.expect([0, *t.addrs[1:]], t.requested, t.skip, t.on_data)
        sizes.append(len(tokens))
        return plain(self, tokens, *rest)

    monkeypatch.setattr(Context, "decode", decode)
    check_same(mamba.model.run([request])[0], want)
    assert sizes == [[9, 9, 1, 1], [9, 1, 9, 1, 1], [9, 1, 1, 9, 1, 1]][at]


def test_what_mamba_has_not(mamba: Tiny) -> None:
    assert Site("head_out", 0) not in mamba.model.topology.sites
    with pytest.raises(
        SiteError,
        match=r"no site head_out\.0 \(this block has no softmax attention\); it has embed",
    ):
        mamba.model.run([Request(PROMPT, captures=[Capture("head_out.0")])])
    with pytest.raises(UsageError, match=r"resid_post\.0 has no heads"):
        mamba.model.run([Request(PROMPT, [Edit("l_out-0", "zero", heads=[0])])])
    result = mamba.model.run([Request(PROMPT, captures=[Capture("l_out")], logits="all")])[0]
    _check(result, forward(_weights(mamba), PROMPT))
