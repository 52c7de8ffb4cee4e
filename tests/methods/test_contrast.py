"""Directions from pairs: what is read, and what is made of it, against the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle
from own_functions import own
from tiny import Tiny

from mia.errors import FileError, MiaError, RangeError, UsageError
from mia.methods import contrast
from mia.methods.contrast import Pair, PairActivations

PAIRS = [
    Pair("The cat sat on the mat", "The dog sat on the mat"),
    Pair("sky is blue", "sky is red and no"),
    Pair("The capital of France is Paris", "Rome"),
    Pair("yes", "no and no"),
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
    got = contrast.extract(llama.model, [Pair(text, "The cat sky is red")], read=read)
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
    pair = Pair("The cat sat", "The dog sat", read_positive=1, read_negative=-2)
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
    ends_alike = [Pair("The cat is", "The dog is"), Pair("red is", "blue is")]
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
    alike, other = Pair("The cat sat", "The cat on the mat"), Pair("The cat", "The dog")
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


# -- pairs -------------------------------------------------------------------------------


def test_pairs_from_each_kind_of_file(tmp_path: Path) -> None:
    want = [Pair("a, b", "c"), Pair("d", 'e "f"')]
    (tmp_path / "p.jsonl").write_text(
        '{"positive": "a, b", "negative": "c"}\n\n{"positive": "d", "negative": "e \\"f\\""}\n'
    )
    (tmp_path / "p.csv").write_text('negative,positive\nc,"a, b"\n"e ""f""",d\n')
    (tmp_path / "pos.txt").write_text("a, b\n\nd\n\n")
    (tmp_path / "neg.txt").write_text('c\n \ne "f"\n')
    assert contrast.load_pairs(tmp_path / "p.jsonl") == want
    assert contrast.load_pairs(tmp_path / "p.csv") == want
    assert contrast.load_pairs(tmp_path / "pos.txt", tmp_path / "neg.txt") == want
    rows = [{"positive": p.positive, "negative": p.negative} for p in want]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    assert contrast.load_pairs(tmp_path / "p.json") == want
    (tmp_path / "i.jsonl").write_text('{"positive": "a", "negative": "b", "read_positive": -2}\n')
    assert contrast.load_pairs(tmp_path / "i.jsonl") == [Pair("a", "b", -2, None)]
    assert len(contrast.load_pairs("french")) >= 60


def test_marks_of_other_editors_are_read(tmp_path: Path) -> None:
    """A BOM in front, and line separators that are part of a text."""
    bom = "\ufeff"
    want = [Pair("a\u2028b", "c\x0cd"), Pair("e", "f")]
    rows = [{"positive": p.positive, "negative": p.negative} for p in want]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    for name, text in {
        "p.jsonl": "\n".join(lines),
        "p.json": f"[{','.join(lines)}]",
        "p.csv": "positive,negative\na\u2028b,c\x0cd\ne,f\n",
        "pos.txt": "a\u2028b\ne",
        "neg.txt": "c\x0cd\nf",
    }.items():
        (tmp_path / name).write_text(bom + text, encoding="utf-8")
    for name in ("p.jsonl", "p.json", "p.csv"):
        assert contrast.load_pairs(tmp_path / name) == want, name
    assert contrast.load_pairs(tmp_path / "pos.txt", tmp_path / "neg.txt") == want


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"p.jsonl": ""}, "p.jsonl is empty"),
        ({"p.csv": "positive,negative\n"}, "p.csv is empty"),
        ({"p.jsonl": '{"positive": "a"}'}, "line 1: there is no text 'negative'"),
        ({"p.csv": "positive,other\na,b\n"}, "row 1: there is no text 'negative'"),
        ({"p.jsonl": "[1"}, "line 1 is not JSON"),
        ({"p.jsonl": "1"}, "line 1: there is no text 'positive'"),
        ({"p.jsonl": "[1]"}, "item 0: there is no text 'positive'"),
        ({"p.csv": "positive,negative\na,b\nc,d,e\n"}, "row 2 has more fields than the header"),
        ({"p.csv": f"positive,negative\na,{'b' * 140000}\n"}, "is not CSV that can be read"),
        ({"a.txt": "x\n\ny\n", "b.txt": "z\nw\n"}, "a.txt, line 2 is blank, and that of .*b.txt"),
        ({"a.txt": "x\ny\nz\n", "b.txt": "z\n\nw\n"}, "b.txt, line 2 is blank"),
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
        contrast.load_pairs(*(tmp_path / name for name in files))
    assert "\n" not in str(err.value)


def test_no_file_and_no_pairs(llama: Tiny) -> None:
    with pytest.raises(FileError, match=r"no file nowhere.*shipped: .*sentiment"):
        contrast.load_pairs("nowhere")
    with pytest.raises(UsageError, match="no pairs"):
        contrast.train(llama.model, [])
