"""One grammar of ranges."""

from typing import Any

import numpy as np
import pytest

from mia.errors import MiaError, RangeError, UsageError
from mia.ranges import (
    Head,
    by_layer,
    check_n_heads,
    compact,
    indices,
    other_heads,
    parse_counts,
    parse_heads,
    parse_items,
    parse_layers,
    parse_numbers,
    parse_token,
    parse_tokens,
    top_heads,
)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("3", [3]),
        ("-1", [9]),
        ("3..5", [3, 4, 5]),
        ("3-5", [3, 4, 5]),
        ("3:5", [3, 4, 5]),
        ("-3..-1", [7, 8, 9]),
        ("3--5", [3, 4, 5]),
        ("8..", [8, 9]),
        ("..2", [0, 1, 2]),
        ("4, 1,4", [4, 1, 4]),
        ("*", list(range(10))),
        ("all", list(range(10))),
    ],
)
def test_indices(text: str, meant: list[int]) -> None:
    assert indices(text, 10) == meant
    assert indices(compact(meant), 10) == meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "layers 'x': 'x' is not a layer, a range like 3..7 or a list like 1,4"),
        ("", "'' is not a layer"),
        ("..", r"'\.\.' is not a layer"),
        ("1,,2", "'' is not a layer"),
        ("3-", "'3-' is half a range; write 3.. or ..7"),
        ("10", "layers '10': layer 10 is out of range; there are 0 to 9"),
        ("2..-11", "layer -11 is out of range"),
        ("5..3", r"the range 5\.\.3 runs backwards"),
    ],
)
def test_what_is_no_range_is_said(text: str, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        parse_layers(text, 10)


def test_layers_and_items_come_once() -> None:
    assert parse_layers("4,1,4", 10) == parse_items("4,1,4", 10) == [4, 1]
    assert parse_items(None, 3) == [0, 1, 2]


def test_one_token() -> None:
    assert parse_token("-1", 10) == 9 and parse_token("*", 1) == 0
    with pytest.raises(UsageError, match=r"token '1\.\.3' is 3 tokens, not one"):
        parse_token("1..3", 10)


def test_compact_is_read_back() -> None:
    assert compact([1, 2, 3, 7]) == "1..3,7" and compact([5]) == "5" and compact([]) == ""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("3.5", ["3.5"]),
        ("1.1,0.0-1", ["0.0", "0.1", "1.1"]),
        ("0..1.2", ["0.2", "1.2"]),
        ("2.*", [f"2.{h}" for h in range(6)]),
        ("2..3.1-2,2.1", ["2.1", "2.2", "3.1", "3.2"]),
        ("-1.0", ["3.0"]),
        ("*.5", ["0.5", "1.5", "2.5", "3.5"]),
        ("3.0..2", ["3.0", "3.1", "3.2"]),
        ("3.-1", ["3.5"]),
        ("2..3.0..1", ["2.0", "2.1", "3.0", "3.1"]),
        ("2.4..", ["2.4", "2.5"]),
        ("..1.2", ["0.2", "1.2"]),
        ("2...3", ["2.3", "3.3"]),
        ("1:2.1", ["1.1", "2.1"]),
        ("3.all", [f"3.{h}" for h in range(6)]),
        ("3.1:2", ["3.1", "3.2"]),
    ],
)
def test_heads(text: str, meant: list[str]) -> None:
    assert [str(h) for h in parse_heads(text, 4, 6)] == meant


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("3", UsageError, "heads '3': '3' is not LAYER.HEAD"),
        ("3.", UsageError, "is not LAYER.HEAD"),
        ("3.x", UsageError, "'3.x' is not LAYER.HEAD"),
        ("", UsageError, "'' is not LAYER.HEAD"),
        ("3.6", RangeError, "heads '3.6': head 6 is out of range; there are 0 to 5"),
        ("3.4-6", RangeError, "head 6 is out of range; there are 0 to 5"),
        ("3.5-2", RangeError, "the range 5-2 runs backwards"),
        ("3.5..2", RangeError, r"the range 5\.\.2 runs backwards"),
        ("3..", UsageError, r"'3\.\.' is not LAYER.HEAD"),
        ("3..4", UsageError, "is not LAYER.HEAD"),
        ("3.1-", RangeError, "'1-' is half a range"),
        ("4.0", RangeError, "layer 4 is out of range; there are 0 to 3"),
    ],
)
def test_what_is_no_head_is_said(text: str, error: type[MiaError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_heads(text, 4, 6)


def test_numbers_and_heads_of_python_are_ranges() -> None:
    assert parse_layers(3, 10) == parse_layers([3], 10) == parse_layers([np.int64(3)], 10) == [3]
    assert parse_layers(range(2, 5), 10) == parse_layers((2, 3, 4), 10) == [2, 3, 4]
    assert parse_tokens(-1, 10) == parse_tokens([-1], 10) == [9] and parse_token(-1, 10) == 9
    assert parse_items([4, 1, 4], 10) == [4, 1]
    heads = [Head(3, 1), Head(0, 2)]
    assert parse_heads(heads, 4, 6) == parse_heads([Head(3, 1), "0.2"], 4, 6) == sorted(heads)
    assert parse_heads(Head(-1, -1), 4, 6) == [Head(3, 5)]
    pairs: Any = [(3, 1)]
    assert parse_heads(pairs, 4, 6) == [Head(3, 1)]
    array: Any = np.array([3, 4])
    assert parse_layers(array, 10) == [3, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (10, "layers '10': layer 10 is out of range; there are 0 to 9"),
        ([1, -11], "layers '1,-11': layer -11 is out of range"),
        ([], "layers '': '' is not a layer"),
        (1.5, "'1.5' is not a layer"),
        ([True], "'True' is not a layer"),
    ],
)
def test_numbers_that_are_no_layers_are_said(given: Any, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        parse_layers(given, 10)
    with pytest.raises(RangeError, match="layer 4 is out of range"):
        parse_heads([Head(4, 0)], 4, 6)
    with pytest.raises(UsageError, match=r"'3' is not LAYER\.HEAD"):
        parse_heads(3, 4, 6)  # type: ignore[arg-type]


def test_a_head_is_one_thing() -> None:
    head = Head(3, 5)
    assert str(head) == "3.5" and head == (3, 5)
    assert head.document(value=1.0) == {"layer": 3, "head": 5, "value": 1.0}
    assert by_layer([Head(1, 2), Head(0, 1), Head(1, 0)]) == {1: [2, 0], 0: [1]}
    assert other_heads([Head(1, 0), Head(1, 2)], 4) == [Head(1, 1), Head(1, 3)]


def test_top_heads_are_largest_first_and_never_nan() -> None:
    a = np.array([[0.5, np.nan, -2.0], [0.5, 1.0, 0.0]])
    assert top_heads(a, 3) == [(1, 1), (0, 0), (1, 0)]
    assert top_heads(a, 2, by_size=True) == [(0, 2), (1, 1)]
    assert len(top_heads(a, 99)) == 5
    with pytest.raises(RangeError, match="at least 1"):
        top_heads(a, 0)
    with pytest.raises(RangeError, match="n_heads must be 1 to 6, got 7"):
        check_n_heads(7, 2, 3)


def test_numbers() -> None:
    assert parse_numbers("0.5,-1,0.5", "coeff") == [0.5, -1]
    assert parse_counts("5,10", "heads", 10) == [5, 10]
    for text in ("x", "1,", "inf", "nan"):
        with pytest.raises(UsageError, match="coeff"):
            parse_numbers(text, "coeff")
    for text in ("0", "11", "x", "1,"):
        with pytest.raises(UsageError, match="not a whole number from 1 to 10"):
            parse_counts(text, "heads", 10)
