"""Directions from pairs: what is read, and what is made of it, against the oracle."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Tiny
from oracle import Oracle

from mia.errors import FileError, MiaError, RangeError, UsageError
from mia.methods import extract
from mia.methods.extract import Activations, Pair

PAIRS = [
    Pair("The cat sat on the mat", "The dog sat on the mat"),
    Pair("sky is blue", "sky is red and no"),
    Pair("The capital of France is Paris", "Rome"),
    Pair("yes", "no and no"),
]


def own(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """A user's aggregator."""
    return positive.max(0) - negative.min(0)


def wrong(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return positive - negative


def truth(t: Tiny, text: str, site: str, at: list[int]) -> np.ndarray:
    """The mean over some tokens of a text at a site, from the oracle."""
    found: np.ndarray = Oracle.run(t.oracle, t.model.tokenize(text))[site][at].mean(0)
    return found


# -- activations --------------------------------------------------------------------


@pytest.mark.parametrize("site", extract.SITES)
def test_every_site_and_layer_of_the_last_token(case: Tiny, site: str) -> None:
    got = extract.extract(case.model, PAIRS, site=site)
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
    got = extract.extract(llama.model, [Pair(text, "The cat sky is red")], read=read)
    sites = llama.oracle.run(llama.model.tokenize(text))
    for layer in got.positive:
        want = sites[f"resid_post.{layer}"][at].mean(0)  # type: ignore[call-overload]
        np.testing.assert_allclose(got.positive[layer][0], want, atol=1e-4)


def test_the_marker_meant_is_the_last_and_may_begin_inside_a_token(llama: Tiny) -> None:
    m = llama.model
    ids = m.tokenize("The cat is sky is blue")
    pieces = [m.piece(t) for t in ids]
    at = extract.read_positions(m, ids, "before: is")
    assert pieces[at[0]] == " sky" and pieces[at[0] + 1] == " is"
    # "lue" begins inside " blue": the token before that one is the last that has ended
    assert pieces[extract.read_positions(m, ids, "before:lue")[0]] == " is"


def test_a_pairs_own_index_comes_first(llama: Tiny) -> None:
    pair = Pair("The cat sat", "The dog sat", read_positive=1, read_negative=-2)
    got = extract.extract(llama.model, [pair])
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
        extract.extract(llama.model, PAIRS[:1], read=read)


# -- aggregators ----------------------------------------------------------------------


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    positive = rng.standard_normal((9, 6)).astype(np.float32)
    return positive + np.arange(6, dtype=np.float32), rng.standard_normal((9, 6)).astype(np.float32)


def test_mean(rows: tuple[np.ndarray, np.ndarray]) -> None:
    p, n = rows
    np.testing.assert_allclose(extract.mean(p, n), p.mean(0) - n.mean(0), atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_pca_is_the_axis_of_most_spread_and_points_to_the_positives(
    rows: tuple[np.ndarray, np.ndarray], sign: int
) -> None:
    p, n = rows if sign == 1 else rows[::-1]
    d = (p - n).astype(np.float64)
    values, vectors = np.linalg.eigh(d.T @ d)
    axis = vectors[:, values.argmax()]
    axis *= np.sign((d @ axis).mean())
    got = extract.pca(p, n)
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
    got = extract.logistic(*rows)
    assert np.linalg.norm(got) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(got, w / np.linalg.norm(w), atol=2e-3)


def test_train_is_extract_and_aggregate(llama: Tiny) -> None:
    found = extract.extract(llama.model, PAIRS)
    for method in ("mean", "pca", own):
        got = extract.train(llama.model, PAIRS, method=method)
        want = extract.aggregate(found, method)
        for layer in want.layers:
            np.testing.assert_allclose(got[layer], want[layer], atol=1e-6)
    m = extract.train(llama.model, PAIRS, layers=[2], site="mlp_out", method="test_extract:own")
    assert m.layers == [2] and m.site == "mlp_out"
    assert m.metadata["aggregator"] == "test_extract:own"
    assert m.metadata["n_pairs"] == "4" and m.metadata["model_sha256"] == llama.model.file_hash


def test_aggregators_that_cannot_be(llama: Tiny) -> None:
    found = Activations({0: np.ones((2, 3), np.float32)}, {0: np.ones((3, 3), np.float32)})
    with pytest.raises(UsageError, match="2 positive and 3 negative"):
        extract.aggregate(found)
    with pytest.raises(UsageError, match="unknown aggregator 'median'; known: mean, pca, logistic"):
        extract.aggregate(found, "median")
    same = Activations(found.positive, found.positive)
    with pytest.raises(UsageError, match=r"test_extract:wrong made \(2, 3\)"):
        extract.aggregate(same, "test_extract:wrong")
    for name, message in (
        ("nowhere_at_all:f", "cannot import"),
        ("test_extract:gone", "has no gone"),
        ("test_extract:PAIRS", "not a function"),
        ("test_extract:", "write module:function"),
    ):
        with pytest.raises(UsageError, match=message):
            extract.aggregate(same, name)


# -- pairs -------------------------------------------------------------------------------


def test_pairs_from_each_kind_of_file(tmp_path: Path) -> None:
    want = [Pair("a, b", "c"), Pair("d", 'e "f"')]
    (tmp_path / "p.jsonl").write_text(
        '{"positive": "a, b", "negative": "c"}\n\n{"positive": "d", "negative": "e \\"f\\""}\n'
    )
    (tmp_path / "p.csv").write_text('negative,positive\nc,"a, b"\n"e ""f""",d\n')
    (tmp_path / "pos.txt").write_text("a, b\n\nd\n")
    (tmp_path / "neg.txt").write_text('c\ne "f"\n')
    assert extract.load_pairs(tmp_path / "p.jsonl") == want
    assert extract.load_pairs(tmp_path / "p.csv") == want
    assert extract.load_pairs(tmp_path / "pos.txt", tmp_path / "neg.txt") == want
    (tmp_path / "i.jsonl").write_text('{"positive": "a", "negative": "b", "read_positive": -2}\n')
    assert extract.load_pairs(tmp_path / "i.jsonl") == [Pair("a", "b", -2, None)]
    assert len(extract.load_pairs("french")) >= 60


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"p.jsonl": ""}, "p.jsonl is empty"),
        ({"p.csv": "positive,negative\n"}, "p.csv is empty"),
        ({"p.jsonl": '{"positive": "a"}'}, "line 1: there is no text 'negative'"),
        ({"p.csv": "positive,other\na,b\n"}, "row 1: there is no text 'negative'"),
        ({"p.jsonl": "[1"}, "line 1 is not JSON"),
        ({"p.jsonl": "[1]"}, "line 1: there is no text 'positive'"),
        ({"a.txt": "x\ny\n", "b.txt": "z\n"}, "has 2 texts and .*b.txt has 1"),
        ({"a.txt": "x\n", "b.txt": ""}, "b.txt is empty"),
        ({"a.txt": "x", "b.txt": "y", "c.txt": "z"}, "3 files are given"),
    ],
)
def test_broken_pairs_are_one_clear_line(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(MiaError, match=message) as err:
        extract.load_pairs(*(tmp_path / name for name in files))
    assert "\n" not in str(err.value)


def test_no_file_and_no_pairs(llama: Tiny) -> None:
    with pytest.raises(FileError, match=r"no file nowhere.*shipped: .*sentiment"):
        extract.load_pairs("nowhere")
    with pytest.raises(UsageError, match="no pairs"):
        extract.train(llama.model, [])
