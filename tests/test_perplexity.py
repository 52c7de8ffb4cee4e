"""Perplexity against the oracle: windows, edits, and the sweep over layers."""

import numpy as np
import pytest
from conftest import Tiny

from mia.edits import Edit
from mia.errors import UsageError
from mia.methods import perplexity as method
from mia.methods.perplexity import by_layer, perplexity


def losses(t: Tiny, tokens: list[int], edits: dict | None = None) -> np.ndarray:
    x = t.oracle.run(tokens, edits)["logits"][:-1]
    logp = x - x.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return -logp[np.arange(len(x)), tokens[1:]]


def test_every_token_but_the_first_is_scored(case: Tiny) -> None:
    ids = case.prompt(40)
    got = perplexity(case.model, ids)
    np.testing.assert_allclose(got.nll, losses(case, ids), atol=1e-4)
    assert got.value == pytest.approx(np.exp(losses(case, ids).mean()), rel=1e-4)


@pytest.mark.parametrize("bos", [False, True])
def test_windows_do_not_overlap_and_begin_alike(
    llama: Tiny, bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "_BLOCK", 4)  # logits come in blocks within a window
    body = llama.prompt(37)
    ids = [llama.model.bos_token, *body] if bos else body
    got = perplexity(llama.model, ids, window=10)
    size = 9 if bos else 10
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    windows = [[llama.model.bos_token, *p] if bos else p for p in parts]
    want = np.concatenate([losses(llama, w) for w in windows if len(w) > 1])
    np.testing.assert_allclose(got.nll, want, atol=1e-4)


@pytest.mark.parametrize("tokens", [None, [0, 3]])
def test_edits_act_in_every_window(
    llama: Tiny, tokens: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "_BLOCK", 4)
    ids, v = llama.prompt(24), llama.vector("resid_post.1")
    got = perplexity(llama.model, ids, edits=[Edit("resid_post.1", "add", v, tokens)], window=12)

    def add(x: np.ndarray) -> np.ndarray:
        x[slice(None) if tokens is None else tokens] += v
        return x

    want = np.concatenate([losses(llama, w, {"resid_post.1": add}) for w in (ids[:12], ids[12:])])
    np.testing.assert_allclose(got.nll, want, atol=1e-4)


def test_a_ratio_for_each_layer_and_text(llama: Tiny) -> None:
    texts, v = [llama.prompt(9), llama.prompt(14, seed=4), [5]], llama.vector()
    got = by_layer(
        llama.model, texts, lambda layer, n: [Edit(f"resid_post.{layer}", "add", v)], [2, 0]
    )
    assert got.layers == [2, 0] and got.log_ratio.shape == (2, 2)  # a text of one token is left out
    for i, layer in enumerate([2, 0]):
        for j, ids in enumerate(texts[:2]):
            steered = losses(llama, ids, {f"resid_post.{layer}": lambda x: x + v})
            want = steered.mean() - losses(llama, ids).mean()
            assert got.log_ratio[i, j] == pytest.approx(want, abs=1e-4)
    np.testing.assert_allclose(got.ratio, np.exp(got.log_ratio.mean(1)), rtol=1e-6)
    low, high = got.interval(np.random.default_rng(0)).T
    assert (low <= got.ratio).all() and (got.ratio <= high).all()
    again = got.interval(np.random.default_rng(0)).T
    np.testing.assert_array_equal([low, high], again)


def test_too_little_text(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="needs two tokens; there are 1"):
        perplexity(llama.model, [5])
    with pytest.raises(UsageError, match="no text has two tokens"):
        by_layer(llama.model, [[5]], lambda layer, n: [], [0])
