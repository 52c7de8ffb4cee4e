"""The arithmetic of llama.cpp's KL divergence, in plain numpy beside it."""

import numpy as np
import pytest

from mia.errors import UsageError
from mia.measure.divergence import Divergence, KlTo, Positions, compare, pack


def rows(n: int, n_vocab: int = 300, seed: int = 0, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, n_vocab)) * scale).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_a_base_is_rounded_to_16_bits_and_ends_16_nats_below_its_best() -> None:
    logits = rows(5, scale=8.0)
    packed = pack(logits)
    logp = log_softmax(logits)
    kept = packed.low[:, None] + packed.scale[:, None] * packed.codes.astype(np.float64)
    deep = logits < logits.max(-1, keepdims=True) - 16
    assert deep.any() and (packed.codes[deep] == 0).all()
    step = 16 / 65535
    np.testing.assert_allclose(kept[~deep], logp[~deep], atol=0.51 * step)
    assert np.abs(kept - logp)[~deep].max() > 0.3 * step  # rounded, not kept as it was
    np.testing.assert_allclose(packed.codes.max(-1), 65535)
    flat = pack(np.full((1, 4), 2.0, np.float32))
    assert flat.scale[0] == 0 and (flat.codes == 0).all()
    assert flat.low[0] == pytest.approx(-np.log(4))


def test_each_position_beside_the_formula() -> None:
    base, other = rows(6), rows(6, seed=1)
    other[:3] = base[:3] + 0.1 * other[:3]
    targets = [5, 299, 0, 17, 2]  # of the last position the next token is not known
    got = compare(pack(base), other, targets)
    p, q = log_softmax(base), log_softmax(other)
    np.testing.assert_allclose(got.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=2e-4)
    np.testing.assert_array_equal(got.same_top, base.argmax(-1) == other.argmax(-1))
    assert got.same_top[:3].any() and not got.same_top.all()
    at = np.arange(5), targets
    np.testing.assert_allclose(got.nll, -q[at], atol=1e-5)
    np.testing.assert_allclose(got.base_nll, -p[at], atol=2e-4)
    with pytest.raises(UsageError, match=r"shape \(6, 299\) and 5 tokens"):
        compare(pack(base), other[:, :-1], targets)
    with pytest.raises(UsageError, match="7 tokens"):
        compare(pack(base), other, [0] * 7)


def test_the_exact_divergence_is_the_formula_and_zero_to_itself() -> None:
    base, other = rows(6), rows(6, seed=1)
    p, q = log_softmax(base), log_softmax(other)
    np.testing.assert_allclose(KlTo(base)(other), (np.exp(p) * (p - q)).sum(-1), rtol=1e-5)
    assert (KlTo(base)(base) == 0).all()
    small = base + np.float32(1e-3) * other
    want = (np.exp(p) * (p - log_softmax(small))).sum(-1)
    np.testing.assert_allclose(KlTo(base)(small), want, rtol=0.05)


def test_statistics_over_positions() -> None:
    rng = np.random.default_rng(3)
    kl, nll, base = (rng.exponential(size=40) for _ in range(3))
    same = rng.random(40) < 0.8
    d = Divergence(Positions(kl, same, nll, base))
    n = 40
    error = np.sqrt(((kl**2).mean() - kl.mean() ** 2) / (n - 1))
    assert d.kl.value == pytest.approx(kl.mean()) and d.kl.error == pytest.approx(error)
    assert d.largest == kl.max()
    assert d.percentiles["50"] == pytest.approx(np.median(kl))
    share = same.mean()
    assert d.same_top.value == pytest.approx(share)
    assert d.same_top.error == pytest.approx(np.sqrt(share * (1 - share) / (n - 1)))
    assert d.perplexity is not None and d.perplexity.value == pytest.approx(np.exp(nll.mean()))
    # llama.cpp's error of ln(PPL(Q)/PPL(base)): both variances less twice their covariance
    variances = [((x**2).mean() - x.mean() ** 2) / (n - 1) for x in (nll, base)]
    covariance = ((nll * base).mean() - nll.mean() * base.mean()) / (n - 1)
    assert d.log_ratio is not None
    assert d.log_ratio.error == pytest.approx(np.sqrt(sum(variances) - 2 * covariance))
    change = np.exp(-nll) - np.exp(-base)
    assert d.p_change is not None and d.p_change.value == pytest.approx(change.mean())
    assert d.p_change_rms == pytest.approx(np.sqrt((change**2).mean()))


def test_few_positions_have_no_error_and_one_no_perplexity() -> None:
    one = Positions(np.ones(1), np.ones(1, bool), np.zeros(0), np.zeros(0))
    d = Divergence(one)
    assert (d.kl.error, d.same_top.error) == (None, None)
    assert (d.perplexity, d.base_perplexity, d.log_ratio, d.p_change) == (None,) * 4
    document = d.document()
    assert document["n_positions"] == 1 and document["perplexity_a"] is None
    both = Positions.joined([one, one])
    assert len(both.kl) == 2 and len(both.nll) == 0
