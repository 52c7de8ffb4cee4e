"""What requests should give, worked out with the oracle: edits by their definitions, in float64.

`expected` reads a `Request` and returns every site over the whole sequence; `check` holds a
`Result` against it. The operators are written down here once more, row by row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from oracle import Oracle
from tiny import Tiny

from mia.edits import Edit
from mia.request import Request, Result
from mia.sites import Site, parse, parse_many

Array = np.ndarray
Sites = Mapping[str, Array]

TOLERANCE = 1e-4  # against the oracle
UNTOUCHED = 1e-6  # between two runs of mia that put the same rows in the same places of a batch
ELSEWHERE = 3e-5  # the same row in another place of a batch: other kernels sum in another order


def expected(oracle: Oracle, request: Request, generated: Sequence[int] = ()) -> Sites:
    """Every site of the oracle over prompt and generated tokens, under the request's edits."""
    tokens = [*map(int, request.tokens), *generated]
    by_tensor: dict[str, list[Edit]] = {}
    for edit in request.edits:
        key = _tensor(oracle, parse(edit.site, oracle.n_layer))
        by_tensor.setdefault(key, []).append(edit)
    n_prompt = len(request.tokens)

    def change(key: str) -> Any:
        def apply(x: Array) -> Array:
            for edit in by_tensor[key]:
                _edit(oracle, edit, x, key, n_prompt)
            return x

        return apply

    return oracle.run(tokens, {key: change(key) for key in by_tensor})


def check(result: Result, request: Request, oracle: Oracle, want: Sites | None = None) -> Sites:
    """Everything in a result against the oracle; returns what was expected."""
    n, fed = len(request.tokens), result.tokens[:-1]
    want = expected(oracle, request, fed) if want is None else want
    if request.logits is not None and request.metric is None:
        at: Any = request.logits
        if isinstance(at, str):
            at = n - 1 if at == "last" else None
        _close(result.logits, want["logits"][_rows(at, n)], "logits")
    for capture in request.captures:
        rows = _rows(capture.tokens, n) + (
            list(range(n, n + len(fed))) if capture.generated else []
        )
        for site in parse_many(capture.sites, oracle.n_layer):
            truth, got = want[str(site)][rows], result.of(capture)[site]
            if site.name in ("attn_pattern", "attn_scores"):
                truth = truth[..., : n + (len(fed) if capture.generated else 0)]
            _close(got, truth, str(site))
    if result.tokens:
        chosen = want["logits"][n - 1 :]  # (n_generated, n_vocab)
        if request.logprobs:
            logprobs = chosen - np.log(np.exp(chosen).sum(-1, keepdims=True))
            _close(result.logprobs, logprobs[range(len(chosen)), result.tokens], "logprobs")
        else:
            assert result.logprobs == []
        if request.sampling.plain:
            _close(chosen[range(len(chosen)), result.tokens], chosen.max(-1), "greedy")
    return want


def check_untouched(
    oracle: Oracle,
    got: Result,
    clean: Result,
    want: Sites,
    want_clean: Sites,
    *,
    atol: float = UNTOUCHED,
) -> int:
    """Where the oracle says that an edit changes nothing, nothing may have changed in captures
    of all tokens. Returns how many numbers that were."""
    n_same = 0
    for site, a in got.captures.items():
        same = want[str(site)] == want_clean[str(site)]
        moved = np.abs(a - clean.captures[site]) * same[: len(a)].reshape(a.shape)
        assert moved.max() <= atol, f"{site}: moved by {moved.max()}"
        n_same += np.count_nonzero(same)
    return n_same


def check_same(a: Result, b: Result, *, atol: float = ELSEWHERE) -> None:
    """Two runs of one request gave the same, to rounding."""
    assert a.tokens == b.tokens
    assert list(a.captures) == list(b.captures)
    pairs = [(str(s), a.captures[s], b.captures[s]) for s in a.captures]
    pairs += [
        (name, getattr(a, name), getattr(b, name)) for name in ("logits", "value", "logprobs")
    ]
    for name, x, y in pairs:
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


def _close(got: Any, want: Any, what: str) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: {got.shape} instead of {want.shape}"
    # -inf is equal to itself
    error = np.abs(np.subtract(got, want, out=np.zeros(got.shape), where=got != want)).max(
        initial=0
    )
    assert error <= TOLERANCE, f"{what}: off by {error}"


def _rows(tokens: Any, n: int) -> list[int]:
    if tokens is None:
        return list(range(n))
    if not isinstance(tokens, slice):
        tokens = np.asarray(tokens, int)
    return np.atleast_1d(np.arange(n)[tokens]).tolist()


def _tensor(oracle: Oracle, site: Site) -> str:
    """The first name of the tensor that a site is, so that edits at two names keep their order."""
    if site.name == "resid_pre" and site.layer:
        return f"resid_post.{site.layer - 1}"
    plain = not oracle.spec.scale_embed and "position_embd.weight" not in oracle.weights
    return "embed" if site == Site("resid_pre", 0) and plain else str(site)


def _edit(oracle: Oracle, edit: Edit, x: Array, key: str, n_prompt: int) -> None:
    """Changes the selected rows of a site's array x (n_tokens, ...) in place."""
    prompt = _rows(edit.tokens, n_prompt)
    later = edit.tokens is None if edit.generated is None else edit.generated
    picks = {p: i for i, p in enumerate(prompt)}
    for p in [*prompt, *(range(n_prompt, len(x)) if later else ())]:
        if key.startswith(("attn_pattern", "attn_scores")):
            row = x[p, :, : p + 1]  # (n_head, n_keys): a query sees no later keys
        elif edit.heads is not None:
            row = x[p].reshape(-1, oracle.head_dim)
        else:
            row = x[p]
        index: Any = np.s_[:]
        if edit.heads is not None:
            heads = np.atleast_1d(edit.heads)
            index = (heads,) if edit.dims is None else np.ix_(heads, np.atleast_1d(edit.dims))
        elif edit.dims is not None:
            index = (np.atleast_1d(edit.dims),)
        h = row[index]
        out = operate(edit, h.reshape(-1), picks.get(p, 0)).reshape(h.shape)
        if edit.keep_norm:
            out = out * np.sqrt((h * h).sum() / (out * out).sum())
        row[index] = out
        if key.startswith("attn_scores"):  # keys that the mask hides have none
            x[p, :, ~oracle._visible(int(key.split(".")[1]), len(x))[p]] = 0


def operate(edit: Edit, h: Array, pick: int) -> Array:
    """One row h (width,) after the operator."""
    if callable(edit.op):
        return np.asarray(edit.op(h[None]))[0]
    c: Any = np.asarray(edit.coeff, np.float32).astype(np.float64)
    if c.ndim:
        c = np.repeat(c, len(h) // len(c))
    if edit.op == "scale":
        return c * h
    if edit.op == "zero":
        return 0 * h
    v = np.asarray(edit.value, np.float32).astype(np.float64)
    if edit.op == "mean":
        return v.mean(0) if v.ndim == 2 else v
    if v.ndim == 2:
        v = v[pick if len(v) > 1 else 0]
    if edit.op == "replace":
        return c * v
    if edit.op == "add":
        return h + c * v
    if edit.op == "blend":
        return h * (1 - c) + v * c
    share = (h @ v) / (v @ v)  # h has share * v along v
    along = share * v
    if edit.op == "clamp":
        return h if share >= c else h - along + c * v
    if edit.op == "cap":
        return h if share <= c else h - along + c * v
    if edit.op == "project_out":
        return h - along
    assert edit.op == "project_out_add"
    return h - along + c * v


def check_edits(
    t: Tiny, tokens: list[int], edits: list[Edit], truth: dict[str, Callable[[Array], Array]]
) -> None:
    """Logits at all tokens under edits are the oracle's under functions, which change them."""
    result = t.model.run([Request(tokens, edits, logits="all")])[0]
    changed = t.oracle.run(tokens, truth)["logits"]
    assert result.logits is not None
    assert np.abs(result.logits - changed).max() < TOLERANCE
    assert np.abs(changed - t.oracle.run(tokens)["logits"]).max() > 1e-3
