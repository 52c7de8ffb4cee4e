"""Directions from pairs: what is read, and what is made of it, against the oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle
from own_functions import own
from tiny import Tiny

from mia.datasets.pairs import ContrastPair, select_pairs
from mia.datasets.selection import Selection
from mia.errors import FileError, RangeError, UsageError
from mia.methods import contrast
from mia.methods.contrast import PairActivations
from mia.notices import MiaWarning

PAIRS = [
    ContrastPair("The cat sat on the mat", "The dog sat on the mat"),
    ContrastPair("sky is blue", "sky is red and no"),
    ContrastPair("The capital of France is Paris", "Rome"),
    ContrastPair("yes", "no and no"),
]


def truth(t: Tiny, text: str, site: str, at: list[int]) -> np.ndarray:
    """The mean over some tokens of a text at a site, from the oracle."""
    found: np.ndarray = Oracle.run(t.oracle, t.model.tokenize(text))[site][at].mean(0)
    return found


# -- activations --------------------------------------------------------------------


@pytest.mark.parametrize("site", contrast.SITES)
def test_every_site_and_layer_of_the_last_token(case: Tiny, site: str) -> None:
    got = contrast.extract(case.model, PAIRS, site=site)
    assert list(got.positive) == list(range(case.model.n_layer)) and got.site == site
    for layer in got.positive:
        for rows, texts in (
            (got.positive[layer], [p.positive for p in PAIRS]),
            (got.negative[layer], [p.negative for p in PAIRS]),
        ):
            want = [truth(case, t, f"{site}.{layer}", [-1]) for t in texts]
            np.testing.assert_allclose(rows, want, atol=1e-4)


@pytest.mark.parametrize(
    ("read", "at"),
    [
        ("last", [-1]),
        ("2", [2]),
        ("-2", [-2]),
        ("mean", slice(1, None)),  # the BOS is left out
        ("mean:1..-2", slice(1, -1)),
        ("before: is", [3]),  # <bos> The cat sky| is
    ],
)
def test_where_a_text_is_read(llama: Tiny, read: str, at: object) -> None:
    text = "The cat sky is blue is"[:-3]
    got = contrast.extract(llama.model, [ContrastPair(text, "The cat sky is red")], read=read)
    sites = llama.oracle.run(llama.model.tokenize(text))
    for layer in got.positive:
        want = sites[f"resid_post.{layer}"][at].mean(0)  # type: ignore[call-overload]
        np.testing.assert_allclose(got.positive[layer][0], want, atol=1e-4)


def test_the_marker_meant_is_the_last_and_may_begin_inside_a_token(llama: Tiny) -> None:
    m = llama.model
    ids = m.tokenize("The cat is sky is blue")
    pieces = [m.piece(t) for t in ids]
    at = contrast.read_positions(m, ids, "before: is")
    assert pieces[at[0]] == " sky" and pieces[at[0] + 1] == " is"
    # "lue" begins inside " blue": the token before that one is the last that has ended
    assert pieces[contrast.read_positions(m, ids, "before:lue")[0]] == " is"


def test_a_pairs_own_index_comes_first(llama: Tiny) -> None:
    pair = ContrastPair("The cat sat", "The dog sat", read_positive=1, read_negative=-2)
    got = contrast.extract(llama.model, [pair])
    np.testing.assert_allclose(
        got.positive[0][0], truth(llama, "The cat sat", "resid_post.0", [1]), atol=1e-4
    )
    np.testing.assert_allclose(
        got.negative[0][0], truth(llama, "The dog sat", "resid_post.0", [-2]), atol=1e-4
    )


@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        ("first", UsageError, "'first' is not known; known: last"),
        ("99", RangeError, "99 is out of range"),
        ("before:zebra", UsageError, "'zebra' is not in"),
        ("mean:3..1", RangeError, "runs backwards"),
        ("mean:x", UsageError, "is not known"),
    ],
)
def test_a_bad_place_to_read(llama: Tiny, read: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        contrast.extract(llama.model, PAIRS[:1], read=read)


# -- aggregators ----------------------------------------------------------------------


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    positive = rng.standard_normal((9, 6)).astype(np.float32)
    return positive + np.arange(6, dtype=np.float32), rng.standard_normal((9, 6)).astype(np.float32)


def test_mean(rows: tuple[np.ndarray, np.ndarray]) -> None:
    p, n = rows
    np.testing.assert_allclose(contrast.mean(p, n), p.mean(0) - n.mean(0), atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_pca_is_the_axis_of_most_spread_and_points_to_the_positives(
    rows: tuple[np.ndarray, np.ndarray], sign: int
) -> None:
    p, n = rows if sign == 1 else rows[::-1]
    d = (p - n).astype(np.float64)
    values, vectors = np.linalg.eigh(d.T @ d)
    axis = vectors[:, values.argmax()]
    axis *= np.sign((d @ axis).mean())
    got = contrast.pca(p, n)
    np.testing.assert_allclose(got, axis, atol=1e-5)
    assert (p @ got).mean() > (n @ got).mean()


def test_logistic_is_where_the_regularized_loss_has_no_slope(
    rows: tuple[np.ndarray, np.ndarray],
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    from scipy.optimize import minimize

    p, n = (a.astype(np.float64) for a in rows)
    half = (p - n) / 2

    def loss(w: np.ndarray) -> float:
        return float(w @ w / 2 + 2 * np.logaddexp(0, -half @ w).sum())

    w = minimize(loss, np.zeros(6), tol=1e-12).x
    got = contrast.logistic(*rows)
    assert np.linalg.norm(got) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(got, w / np.linalg.norm(w), atol=2e-3)


def test_train_is_extract_and_aggregate(llama: Tiny) -> None:
    found = contrast.extract(llama.model, PAIRS)
    for method in ("mean", "pca", own):
        got = contrast.train(llama.model, PAIRS, method=method)
        want = contrast.aggregate(found, method)
        for layer in want.layers:
            np.testing.assert_allclose(got[layer], want[layer], atol=1e-6)
    m = contrast.train(llama.model, PAIRS, layers=[2], site="mlp_out", method="own_functions:own")
    assert m.layers == [2] and m.site == "mlp_out"
    assert m.metadata["aggregator"] == "own_functions:own"
    assert m.metadata["n_pairs"] == "4" and m.metadata["model_sha256"] == llama.model.file_hash


def test_aggregators_that_cannot_be(llama: Tiny) -> None:
    found = PairActivations({0: np.ones((2, 3), np.float32)}, {0: np.ones((3, 3), np.float32)})
    with pytest.raises(UsageError, match="2 positive and 3 negative"):
        contrast.aggregate(found)
    with pytest.raises(UsageError, match="unknown aggregator 'median'; known: mean, pca, logistic"):
        contrast.aggregate(found, "median")
    same = PairActivations(found.positive, found.positive)
    with pytest.raises(UsageError, match=r"own_functions:wrong made \(2, 3\)"):
        contrast.aggregate(same, "own_functions:wrong")
    for name, message in (
        ("nowhere_at_all:f", "cannot import"),
        ("own_functions:gone", "has no gone"),
        ("own_functions:PAIRS", "not a function"),
        ("own_functions:", "write module:function"),
    ):
        with pytest.raises(UsageError, match=message):
            contrast.aggregate(same, name)


@pytest.mark.parametrize("method", ["mean", "pca", "logistic"])
def test_texts_that_do_not_differ_have_no_direction(llama: Tiny, method: str) -> None:
    if method == "logistic":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    with pytest.raises(UsageError, match=r"do not differ at the token read \(0\)"):
        contrast.train(llama.model, PAIRS, read="0", method=method)
    # where they begin to differ further up, the direction below is zero
    ends_alike = [ContrastPair("The cat is", "The dog is"), ContrastPair("red is", "blue is")]
    got = contrast.train(llama.model, ends_alike, site="attn_norm", method=method)
    assert got.norms[0] == 0 and got.norms[1] > 0.1 and got.norms[2] > 0.1


def test_rounding_is_no_difference(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU gives a token's row other last digits in a batch of another length."""
    run, rng = llama.model.run, np.random.default_rng(0)

    def rounded(*args: Any, **kwargs: Any) -> Any:
        results = run(*args, **kwargs)
        for r in results:
            for rows in r.captures.values():
                rows *= np.float32(1 + 1e-3 * rng.random())
        return results

    monkeypatch.setattr(llama.model, "run", rounded)
    alike, other = (
        ContrastPair("The cat sat", "The cat on the mat"),
        ContrastPair("The cat", "The dog"),
    )
    got = contrast.extract(llama.model, [alike, other], read="2")
    for layer in got.positive:
        same, differs = np.abs(got.positive[layer] - got.negative[layer]).max(-1)
        assert same == 0 and differs > 0.1


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_activations_that_do_not_differ_have_no_direction(method: str) -> None:
    x = {0: np.arange(6, dtype=np.float32).reshape(2, 3)}
    for y in (x, {0: x[0] * np.float32(1 + 1e-7)}):  # the same, and but for rounding
        with pytest.raises(UsageError, match=r"do not differ at the token read \(last\)"):
            contrast.aggregate(PairActivations(x, y), method)
    nan = {0: np.full((2, 3), np.nan, np.float32)}
    with pytest.raises(UsageError, match="not finite"):
        contrast.aggregate(PairActivations(x, nan))


def test_a_users_function_may_do_without_differences() -> None:
    same = {0: np.ones((2, 3), np.float32)}
    assert contrast.aggregate(PairActivations(same, same), own)[0].tolist() == [0, 0, 0]


# -- the experiment ------------------------------------------------------------------------


def test_no_pairs(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="no pairs"):
        contrast.train(llama.model, [])


@pytest.fixture
def sentiment(tmp_path: Path) -> Selection[ContrastPair]:
    (tmp_path / "pos.txt").write_text("The cat sat\nsky is blue\n")
    (tmp_path / "neg.txt").write_text("The dog sat\nsky is red\n")
    return select_pairs(tmp_path / "pos.txt", tmp_path / "neg.txt")


def test_a_learned_vector_has_its_name_and_data(
    llama: Tiny, sentiment: Selection[ContrastPair]
) -> None:
    report = contrast.learn(llama.model, sentiment, layers="1..2", method="pca", name="up")
    want = contrast.train(llama.model, sentiment.items, layers=[1, 2], method="pca")
    for layer in (1, 2):
        np.testing.assert_array_equal(report.vector[layer], want[layer])
    metadata = report.vector.metadata
    assert metadata["name"] == "up" and metadata["data"] == "pos.txt, neg.txt"
    assert metadata["items"] == "0..1" and report.document()["model"]["name"] == llama.model.name
    by_site = contrast.learn(llama.model, sentiment, site="l_out-2", bos=True)
    assert by_site.vector.layers == [2]


def test_what_a_learned_vector_cannot_be(llama: Tiny, sentiment: Selection[ContrastPair]) -> None:
    with pytest.raises(UsageError, match="'logits': a vector belongs to a site with layers"):
        contrast.learn(llama.model, sentiment, site="logits")
    with pytest.raises(UsageError, match="'l_out-2' already names layers"):
        contrast.learn(llama.model, sentiment, site="l_out-2", layers="1")
    with pytest.raises(RangeError, match="layer 9 is out of range; there are 0 to 2"):
        contrast.learn(llama.model, sentiment, layers="9")


def test_texts_without_a_bos_are_noticed(llama: Tiny, sentiment: Selection[ContrastPair]) -> None:
    with pytest.warns(MiaWarning, match="read without a BOS"):
        contrast.learn(llama.model, sentiment, bos=False)


def test_pairs_may_be_the_name_of_data(llama: Tiny) -> None:
    report = contrast.learn(llama.model, "sentiment", layers=[1], read="last")
    assert report.vector.layers == [1] and report.vector.metadata["data"] == "sentiment.jsonl"
    by_hand = contrast.train(llama.model, "sentiment", layers=[1])
    np.testing.assert_array_equal(report.vector[1], by_hand[1])
    with pytest.raises(FileError, match="there is no file sentimentt"):
        contrast.train(llama.model, "sentimentt")
