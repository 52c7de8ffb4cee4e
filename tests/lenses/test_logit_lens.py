"""The lens against the oracle's, on every architecture, and its streaming against the plain way."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.errors import ModelError, RangeError, UsageError
from mia.lenses import logit_lens
from mia.lenses.linear import Norm
from mia.lenses.logit_lens import LogitLens
from mia.lenses.walk import Product
from mia.model import Model
from mia.request import Capture, Request
from mia.sites import Site

TOKENS = [1, 40, 77, 300, 12, 260, 5]
CASES = [
    ("llama", {}),
    ("llama", {"tied": True}),
    ("qwen2", {}),
    ("gemma2", {}),
    ("gpt2", {}),
    ("gpt2", {"tied": True}),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: c[0] + ("-tied" if c[1] else ""))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, Oracle]]:
    arch, options = request.param
    path = write_tiny(tmp_path_factory.mktemp("lens") / "tiny.gguf", arch, **options)
    with Model(path, threads=1) as model:
        yield model, Oracle(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Oracle]]:
    path = write_tiny(tmp_path_factory.mktemp("lens") / "tiny.gguf", "llama")
    with Model(path, threads=1) as model:
        yield model, Oracle(path)


def test_every_layer_reads_as_the_oracle_does(pair: tuple[Model, Oracle]) -> None:
    model, oracle = pair
    sites = [
        Site(name, i)
        for i in range(model.n_layer)
        for name in ("attn_out", "mlp_out", "resid_post")
    ]
    result = model.run([Request(TOKENS, captures=[Capture(sites)], logits="all")])[0]
    for site in sites:
        expected = oracle.lens(oracle.run(TOKENS)[str(site)])
        np.testing.assert_allclose(model.lens.logits(result.captures[site]), expected, atol=1e-4)
    last = result.captures[Site("resid_post", model.n_layer - 1)]
    assert result.logits is not None
    np.testing.assert_allclose(model.lens.logits(last), result.logits, atol=1e-4)


def test_read_gives_the_best_of_all_logits(pair: tuple[Model, Oracle]) -> None:
    model, _ = pair
    h = np.random.default_rng(0).normal(size=(9, model.n_embd)).astype(np.float32)
    full = model.lens.logits(h).astype(np.float64)  # (9, n_vocab)
    read = model.lens.read(h, 7, tokens=[3, 250])
    order = np.argsort(-full, axis=1)[:, :7]
    np.testing.assert_array_equal(read.ids, order)
    np.testing.assert_allclose(read.logits, np.take_along_axis(full, order, 1), atol=1e-5)
    lse = np.log(np.exp(full).sum(1))
    np.testing.assert_allclose(read.logsumexp, lse, atol=1e-5)
    np.testing.assert_allclose(
        read.probs, np.exp(np.take_along_axis(full, order, 1) - lse[:, None]), atol=1e-5
    )
    p = np.exp(full - lse[:, None])
    np.testing.assert_allclose(read.entropy, -(p * np.log(p)).sum(1), atol=1e-5)
    np.testing.assert_allclose(read.token_logits, full[:, [3, 250]], atol=1e-5)
    np.testing.assert_allclose(read.token_logprobs, full[:, [3, 250]] - lse[:, None], atol=1e-5)


def test_blocks_of_rows_and_tokens_join_without_a_seam(
    llama: tuple[Model, Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = llama
    h = np.random.default_rng(1).normal(size=(11, model.n_embd)).astype(np.float32)
    whole = model.lens.read(h, 5, tokens=[0, 327])
    monkeypatch.setattr("mia.lenses.logit_lens._ROWS", 4)
    rows = LogitLens._blocks

    def narrow(self, x):  # type: ignore[no-untyped-def]
        for start, _, scores in rows(self, x):
            for i in range(0, scores.shape[1], 50):
                part = scores[:, i : i + 50].copy()
                yield start + i, start + i + part.shape[1], part

    monkeypatch.setattr(LogitLens, "_blocks", narrow)
    parts = model.lens.read(h, 5, tokens=[0, 327])
    np.testing.assert_array_equal(parts.ids, whole.ids)
    for name in ("logits", "probs", "logsumexp", "token_logits", "entropy"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-5)


def test_no_norm_leaves_out_the_division_alone(llama: tuple[Model, Oracle]) -> None:
    model, _ = llama
    h = np.random.default_rng(3).normal(size=(2, model.n_embd)).astype(np.float32)
    weight = model.weights.vector("output_norm.weight")
    expected = (h * weight) @ model.weights.matrix("output.weight").T
    np.testing.assert_allclose(model.lens.logits(h, norm=False), expected, atol=1e-5)
    scale = model.lens.logits(h) / expected
    rms = np.sqrt((h.astype(np.float64) ** 2).mean(1) + 1e-5)
    np.testing.assert_allclose(scale, np.broadcast_to(1 / rms[:, None], scale.shape), rtol=1e-3)


def test_a_residual_without_a_tokens_direction_has_no_logit_for_it(
    llama: tuple[Model, Oracle],
) -> None:
    model, _ = llama
    h = np.random.default_rng(4).normal(size=model.n_embd)
    d = model.lens.direction(17).astype(np.float64)
    without = h - (h @ d) / (d @ d) * d
    assert abs(model.lens.logits(h.astype(np.float32))[0, 17]) > 1e-2
    assert abs(model.lens.logits(without.astype(np.float32))[0, 17]) < 1e-5


def test_quantized_unembedding_passes_its_own_check(tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_0", "F16"):
        path = write_tiny(tmp_path / f"{kind}.gguf", "llama", qtype=kind)
        with Model(path, threads=1) as model:
            assert model.lens.read(np.ones((1, model.n_embd), np.float32), 1).ids.shape == (1, 1)


def test_a_lens_that_disagrees_with_the_model_is_refused(
    llama: tuple[Model, Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = llama
    real = type(model.weights).vector
    monkeypatch.setattr(type(model.weights), "vector", lambda self, name: real(self, name)[::-1])
    with (
        Model(model.path, threads=1) as fresh,
        pytest.raises(ModelError, match="differs from the model's own logits"),
    ):
        _ = fresh.lens


def test_an_end_of_the_graph_that_is_not_one_unembedding_is_refused(
    llama: tuple[Model, Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = llama
    product = Product(model.weights, "output.weight")
    for steps, message in (
        ([product, product], "one unembedding; new has 2 matrices"),
        ([product, Norm(1e-5, False)], "does not know the norm of logits of new"),
    ):
        monkeypatch.setattr(logit_lens, "walk", lambda *_, steps=steps, **__: steps)
        with pytest.raises(ModelError, match=message):
            LogitLens(model.topology, model.weights, architecture="new")


def test_wrong_input_is_named(llama: tuple[Model, Oracle]) -> None:
    model, _ = llama
    h = np.zeros((1, model.n_embd), np.float32)
    with pytest.raises(UsageError, match="rows of 48, not shape \\(1, 5\\)"):
        model.lens.read(np.zeros((1, 5), np.float32))
    with pytest.raises(RangeError, match="0 to 327"):
        model.lens.read(h, tokens=[328])
    with pytest.raises(RangeError, match="k must be at least 1, got 0"):
        model.lens.read(h, 0)
    with pytest.raises(RangeError, match="0 to 327"):
        model.lens.direction(-1)


def test_blocks_of_the_unembedding_are_bounded(
    pair: tuple[Model, Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows are read: sixteen thousand rows of a large model's matrix are 270 MB."""
    model, _ = pair
    h = np.random.default_rng(0).normal(size=(2, model.n_embd)).astype(np.float32)
    whole, sizes = model.lens.read(h, 3), list[int]()
    read = model.weights.rows

    def rows(name: str, start: int, stop: int) -> np.ndarray:
        sizes.append(stop - start)
        return read(name, start, stop)

    monkeypatch.setattr(logit_lens, "_MATRIX_BLOCK", 64 * model.n_embd)
    monkeypatch.setattr(model.weights, "rows", rows)
    parts = model.lens.read(h, 3)
    assert max(sizes) == 64 and sum(sizes) == model.n_vocab
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_allclose(whole.logits, parts.logits, atol=1e-5)
