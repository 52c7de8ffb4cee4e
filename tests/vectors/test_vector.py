"""Vectors: arithmetic to the last digit, and what is refused."""

import functools
import json
from collections.abc import Callable

import numpy as np
import pytest
from random_vectors import WIDTH, make
from tiny import Tiny

from mia.errors import UsageError
from mia.vectors import Vector

A, B = (
    make(0, 1, 2, name="a", model="m", data="x"),
    make(1, 2, 3, seed=1, name="b", model="m", data="y"),
)


# -- arithmetic -------------------------------------------------------------------


def test_sums_are_layer_by_layer_and_keep_what_only_one_has() -> None:
    total, rest = A + B, A - B
    assert total.layers == rest.layers == [0, 1, 2, 3]
    np.testing.assert_array_equal(total[1], A[1] + B[1])
    np.testing.assert_array_equal(total[0], A[0])
    np.testing.assert_array_equal(rest[3], -B[3])
    np.testing.assert_array_equal(rest[2], A[2] - B[2])


def test_scaling() -> None:
    np.testing.assert_array_equal((2 * A)[1], 2 * A[1])
    np.testing.assert_array_equal((A * 0.5)[1], A[1] / 2)
    np.testing.assert_array_equal((A / 4)[2], A[2] / 4)
    np.testing.assert_array_equal((-A)[0], -A[0])
    with pytest.raises(UsageError, match="divided by 0"):
        A / 0


def test_what_grows_too_large_is_an_error_and_no_warning() -> None:
    big = Vector({1: np.full(WIDTH, 3e38)})
    too_large: list[Callable[[], Vector]] = [
        lambda: 10 * big,
        lambda: big + big,
        lambda: big - -big,
        lambda: big / 1e-9,
    ]
    for grow in too_large:
        with pytest.raises(UsageError, match="layer 1 has numbers that are not finite"):
            grow()
    with pytest.raises(UsageError, match="layer 1 has numbers that are not finite"):
        1e300 * big
    with pytest.raises(UsageError, match="real here, not complex"):
        Vector({1: np.ones(4, np.complex64)})


@pytest.mark.parametrize("size", [1, 1e-44, 1e-38, 1e-23, 1e19, 1e20, 1e37])
def test_very_long_and_very_short_vectors(size: float) -> None:
    """Squares of float32 above 1e19 or below 1e-22 are none."""
    a, b = (np.random.default_rng(i).standard_normal(48) for i in range(2))
    v, w = (Vector({1: x.astype(np.float32)}) for x in (a * size, b))
    x = v[1].astype(np.float64)  # what float32 leaves of it
    cosine = x @ b / np.linalg.norm(x) / np.linalg.norm(b)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(v.norms[1], np.linalg.norm(x))
    close(v.dot(w)[1], x @ w[1].astype(np.float64))
    close(v.cosine(w)[1], cosine)
    close(v.cosine(v)[1], 1)
    close(v.unit()[1], x / np.linalg.norm(x), atol=1e-7)
    close(w.onto(v)[1], cosine * np.linalg.norm(b) * x / np.linalg.norm(x), atol=1e-6)
    close(w.without(v).cosine(v)[1] + 1, 1)
    close((v * (1 / size))[1], x / size)
    np.testing.assert_array_equal(v.without(v)[1], 0)


def test_numbers_of_vectors() -> None:
    assert A.dot(B) == {i: pytest.approx(float(A[i] @ B[i])) for i in (1, 2)}
    assert A.norms == {i: pytest.approx(np.linalg.norm(A[i])) for i in (0, 1, 2)}
    cosine = A[1] @ B[1] / np.linalg.norm(A[1]) / np.linalg.norm(B[1])
    assert A.cosine(B)[1] == pytest.approx(cosine)
    assert A.cosine(A) == {i: pytest.approx(1) for i in (0, 1, 2)}
    assert A.cosine(0 * A) == {0: 0, 1: 0, 2: 0}
    assert A.unit().norms == {i: pytest.approx(1) for i in (0, 1, 2)}


def test_projection_splits_a_vector_in_two() -> None:
    along, rest = A.onto(B), A.without(B)
    assert along.layers == rest.layers == [1, 2]
    np.testing.assert_allclose((along + rest)[2], A[2], atol=1e-6)
    assert rest.dot(B)[1] == pytest.approx(0, abs=1e-5)
    assert abs(along.cosine(B)[1]) == pytest.approx(1)
    np.testing.assert_array_equal(A.onto(0 * A)[1], np.zeros(WIDTH))


def test_where_it_came_from_travels_along() -> None:
    made = 0.5 * (A - B)
    assert made.name == "0.5*(a - b)"
    assert made.metadata["model"] == "m"  # both agree
    assert "data" not in made.metadata  # they do not
    sources = json.loads(made.metadata["sources"])
    assert sources == {"a": {"model": "m", "data": "x"}, "b": {"model": "m", "data": "y"}}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Vector({1: np.ones(9, np.float32)}), "width 8, vector has 9"),
        (
            Vector({1: np.ones(8, np.float32)}, "attn_out"),
            "belongs to resid_post, vector to attn_out",
        ),
    ],
)
def test_unlike_vectors_do_not_mix(other: Vector, message: str) -> None:
    for f in (lambda: A + other, lambda: A - other, lambda: A.dot(other), lambda: A.onto(other)):
        with pytest.raises(UsageError, match=message):
            f()


def test_what_is_no_vector_is_refused() -> None:
    for directions, message in [
        ({}, "at least one layer"),
        ({1: np.ones(3), 2: np.ones(4)}, "layer 2 has shape"),
        ({1: np.array([1, np.nan])}, "layer 1 has numbers that are not finite"),
        ({1: np.ones((2, 3))}, "layer 1 has shape"),
    ]:
        with pytest.raises(UsageError, match=message):
            Vector(directions)
    with pytest.raises(UsageError, match="not 'residual'"):
        Vector({1: np.ones(3, np.float32)}, "residual")
    with pytest.raises(UsageError, match="no layer 7; it has"):
        A[7]
    with pytest.raises(UsageError, match="none of these layers; it has"):
        A.at([5])


# -- against a model ----------------------------------------------------------------


def test_a_vector_that_does_not_fit_a_model_is_named(llama: Tiny) -> None:
    n, width = llama.model.n_layer, llama.model.n_embd
    llama.model.check_vector(Vector({n - 1: np.ones(width, np.float32)}))
    with pytest.raises(
        UsageError, match=f"directions of 7; the model's width at resid_post is {width}"
    ):
        llama.model.check_vector(Vector({1: np.ones(7, np.float32)}))
    with pytest.raises(UsageError, match=f"layer {n}; the model has 0 to {n - 1}"):
        llama.model.check_vector(Vector({n: np.ones(width, np.float32)}), "f.gguf")
    heads = llama.model.n_head * llama.model.head_dim
    llama.model.check_vector(Vector({0: np.ones(heads, np.float32)}, "head_out"))
    with pytest.raises(UsageError, match="has no vectors at attn_pattern"):
        llama.model.check_vector(Vector({0: np.ones(heads, np.float32)}, "attn_pattern"))
