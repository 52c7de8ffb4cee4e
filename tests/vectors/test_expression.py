"""Arithmetic with vectors as people type it."""

import numpy as np
import pytest
from random_vectors import make

from mia.errors import UsageError
from mia.vectors import Vector, combine

A, B = make(0, 1, 2), make(1, 2, 3, seed=1)


def find(name: str) -> Vector:
    return {"a": A, "b": B, "dir/a.gguf": A, "/b.gguf": B, "my a-b": A}[name]


@pytest.mark.parametrize(
    ("text", "layer", "want"),
    [
        ("a", 1, A[1]),
        ("a - b + 0.5*a", 1, A[1] - B[1] + 0.5 * A[1]),
        ("-(a + b)/2", 2, -(A[2] + B[2]) / 2),
        ("a*2*3 - 1.5e1*b", 2, 6 * A[2] - 15 * B[2]),
        ("dir/a.gguf/2 - /b.gguf", 1, A[1] / 2 - B[1]),
        ("'my a-b' - (1 + 2)*a", 0, -2 * A[0]),
        ("a/2", 1, A[1] / 2),
    ],
)
def test_expressions(text: str, layer: int, want: np.ndarray) -> None:
    np.testing.assert_allclose(combine(text, find)[layer], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a +", "ends where"),
        ("a * b", "numbers only"),
        ("a + 1", "adds a vector and a number"),
        ("2 * 3", "is a number"),
        ("(a - b", "not closed"),
        ("a b", "'b' is not expected"),
        ("a / 0", "divide"),
        ("a & b", "cannot read '& b'"),
        ("", "ends where"),
    ],
)
def test_broken_expressions_say_where(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        combine(text, find)
