"""Perplexity by the layer of an injection, against the oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.errors import UsageError
from mia.methods.actadd import Addition, difference, front_edit
from mia.methods.perplexity_sweep import by_layer, sweep
from mia.notices import MiaWarning
from mia.vectors import Vector


def losses(t: Tiny, tokens: list[int], edits: dict[str, Any] | None = None) -> np.ndarray:
    x = t.oracle.run(tokens, edits)["logits"][:-1]
    logp = x - x.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return -logp[np.arange(len(x)), tokens[1:]]


def test_a_ratio_for_each_layer_and_text(llama: Tiny) -> None:
    texts, v = [llama.prompt(9), llama.prompt(14, seed=4), [5]], llama.vector()
    got = by_layer(
        llama.model, texts, lambda layer, n: [Edit(f"resid_post.{layer}", "add", v)], [2, 0]
    )
    assert (got.n_texts, got.skipped) == (2, 1)
    assert got.layers == [2, 0] and got.log_ratio.shape == (2, 2)  # a text of one token is left out
    for i, layer in enumerate([2, 0]):
        for j, ids in enumerate(texts[:2]):
            steered = losses(llama, ids, {f"resid_post.{layer}": lambda x: x + v})
            want = steered.mean() - losses(llama, ids).mean()
            assert got.log_ratio[i, j] == pytest.approx(want, abs=1e-4)
    np.testing.assert_allclose(got.ratio, np.exp(got.log_ratio.mean(1)), rtol=1e-6)
    low, high = got.interval(np.random.default_rng(0)).T
    assert (low <= got.ratio).all() and (got.ratio <= high).all()
    for i, e in enumerate(got.estimates(np.random.default_rng(0))):
        assert (e.value, e.low, e.high, e.n) == (got.ratio[i], low[i], high[i], 2)
    again = got.interval(np.random.default_rng(0)).T
    np.testing.assert_array_equal([low, high], again)


def test_too_little_or_too_much_text(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="no text has two tokens"):
        by_layer(llama.model, [[5]], lambda layer, n: [], [0])
    with pytest.raises(UsageError, match="text 1 has 257 tokens; the context holds 256"):
        by_layer(llama.model, [[5, 6], [5] * 257], lambda layer, n: [], [0])


@pytest.fixture
def on(tmp_path: Path) -> Path:
    (tmp_path / "on.txt").write_text("The cat is red\nsky is blue and red\n the\n")
    return tmp_path / "on.txt"


def test_a_vector_is_injected_at_each_of_its_layers(llama: Tiny, on: Path) -> None:
    m = llama.model
    v = Vector({i: llama.vector(f"resid_post.{i}", seed=i) for i in (1, 2)})
    with pytest.warns(MiaWarning, match="1 of 3 lines have no token to score"):
        report = sweep(m, {"on": on}, v, coeff=2, bos=False, seed=4)
    texts = [m.tokenize(x, bos=False) for x in on.read_text().splitlines()]
    want = by_layer(m, texts, lambda i, n: [Edit(f"resid_post.{i}", "add", 2 * v[i])], [1, 2])
    got = report.document()
    assert got["layers"] == [1, 2] and got["sweep"]["on"]["n_skipped"] == 1
    assert got["steer"] == [{"vector": "vector", "site": "resid_post", "layers": [1, 2]}]
    for row, estimate in zip(
        got["sweep"]["on"]["ratio"], want.estimates(np.random.default_rng(4)), strict=True
    ):
        assert row == pytest.approx(estimate.document(), abs=1e-5)
    assert [r["layer"] for r in report.rows()] == [1, 2]


def test_an_addition_is_cut_to_a_shorter_text(llama: Tiny, on: Path) -> None:
    m, a = llama.model, Addition("The cat sat on the mat", " ")
    on.write_text("The cat\nsky is blue and red\n")
    report = sweep(m, {"on": on}, a, coeff=3, layers="0,2")
    h = difference(m, a, [0, 2])
    texts = [m.tokenize(x) for x in on.read_text().splitlines()]
    want = by_layer(m, texts, lambda i, n: [front_edit(h[i][:n], 3, i, n)], [0, 2])
    got = report.document()
    assert (got["plus"], got["minus"], got["coeff"]) == (a.plus, " ", 3)
    ratios = [r["value"] for r in got["sweep"]["on"]["ratio"]]
    assert ratios == pytest.approx(want.ratio.tolist(), abs=1e-5)


def test_no_texts(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="no texts"):
        sweep(llama.model, {}, Addition("a", "b"))
