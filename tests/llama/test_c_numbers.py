"""Whole numbers on their way into C: none is wrapped, and no machine is brought down by threads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.errors import MiaError, RangeError
from mia.llama.c_numbers import c_int, usable_threads
from mia.model import Model
from mia.notices import MiaWarning
from mia.request import Request, Sampling


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**31, "n must be in -2147483648 to 2147483647, got 2147483648"),
        (2**32 + 5, "n must be in -2147483648 to 2147483647, got 4294967301"),
        (-(2**31) - 1, "n must be at least -2147483648, got -2147483649"),
        (10**40, "n must be in -2147483648 to 2147483647, got a number of more than 128 bits"),
        (1.5, "n must be a whole number, got 1.5"),
        ("1", "n must be a whole number, got '1'"),
        (None, "n must be a whole number, got None"),
        (True, "n must be in -2147483648 to 2147483647, got True"),
    ],
)
def test_what_does_not_fit_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        c_int(value, "n")
    assert str(caught.value) == message


def test_what_fits_is_an_int() -> None:
    for value in (0, 2**31 - 1, -(2**31), np.int64(7)):
        number = c_int(value, "n")
        assert number == value and type(number) is int


@pytest.mark.parametrize("big", [2**31, 2**32, 2**32 + 1, 2**64, 2**64 + 1, -(2**32) + 1])
def test_no_number_of_the_user_is_wrapped(llama: Tiny, big: int) -> None:
    m = llama.model
    uses: dict[str, Callable[[], object]] = {
        "ctx": lambda: Model(llama.path, threads=1, ctx=big),
        "gpu_layers": lambda: Model(llama.path, threads=1, gpu_layers=big),
        "token": lambda: m.run([Request([5, big])]),
        "n_predict": lambda: m.run([Request([5, 6], n_predict=abs(big))]),
        "top_k": lambda: Sampling(temperature=1.0, top_k=abs(big)),
        "seed": lambda: Sampling(seed=big if big != 2**31 else -1),
        "piece": lambda: m.piece(big),
        "detokenize": lambda: m.detokenize([big]),
        "text": lambda: m.text([big]),
        "weights": lambda: m.weights.rows("token_embd.weight", 0, big),
    }
    for name, use in uses.items():
        with pytest.raises(MiaError):
            use()
            pytest.fail(f"{name} = {big} is taken")


def test_weights_outside_of_a_matrix_are_refused(llama: Tiny) -> None:
    n = llama.model.n_vocab
    for start, stop in ((0, n + 1), (-1, 2), (3, 2), (n, n + 5)):
        with pytest.raises(RangeError, match=f"rows {start} to {stop} .* has {n}"):
            llama.model.weights.rows("token_embd.weight", start, stop)


@pytest.mark.parametrize("wish", [3, 600, 20_000, 100_000, 2**31, 2**32 + 1])
def test_more_threads_than_processors_are_cut(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, wish: int
) -> None:
    monkeypatch.setattr("mia.llama.c_numbers.processors", lambda: 2)
    said = (
        f"{wish} threads are more than the 2 processors that this process may use; going on with 2"
    )
    with pytest.warns(MiaWarning, match=said):
        m = Model(llama.path, threads=wish)
    assert m.threads == 2
    m.close()


def test_a_machine_of_many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mia.llama.c_numbers.processors", lambda: 768)
    assert usable_threads(None) == 512  # llama.cpp's most
    assert usable_threads(3) == 3
    for wish in (-1, 1.5, "2"):
        with pytest.raises(RangeError, match="threads must be"):
            usable_threads(wish)  # type: ignore[arg-type]
