"""Coloured cells for a terminal."""

import io
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from mia.show.grid import attention_map, digit, grid, inferno, map_fits, token_cells


def _coloured(cells: RenderableType, *, no_color: bool = False) -> str:
    screen = Console(
        width=80,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        no_color=no_color,
    )
    screen.print(cells)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_map_is_coloured_by_weight() -> None:
    text = _coloured(attention_map(np.asarray([[1, 0], [0, 0.5]]), [" a", "\n"]))
    assert text.count("48;2;252;255;164m  ") == 1 and text.count("48;2;0;0;4m  ") == 1
    assert text.count("48;2;") == 3  # a key after its query has no colour
    assert "digits" not in text


@pytest.mark.parametrize("no_color", [True, False])
def test_a_map_without_colour_has_digits(no_color: bool) -> None:
    cells = attention_map(np.asarray([[0.8, 0], [0.04, 0.62]]), [" a", "\n"])
    text = _coloured(cells, no_color=True) if no_color else "\n".join(_lines(cells, 80))
    assert [line.rstrip() for line in _without_codes(text).splitlines()] == [
        "          a   0  #",
        "         \\n   1  . 8",
        "                0",
        "digits: tenths of 0.8, # for ten",
    ]


def _without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_digits_are_rounded_tenths() -> None:
    assert [digit(x) for x in (0, 0.04, 0.06, 0.74, 0.94, 0.96, 1)] == [
        " .", " .", " 1", " 7", " 9", " #", " #",
    ]  # fmt: skip
    assert [digit(x, signed=True) for x in (0.7, -0.7, -1, 0)] == ["+7", "-7", "-#", " ."]


def test_tokens_stand_in_cells_the_last_row_on_top_and_go_on_below() -> None:
    texts = [[f" t{i}{k}" for k in range(8)] for i in range(2)]
    texts[1][0] = "日本語の長い単語です"  # twice as wide as it has letters
    shares = np.linspace(0, 1, 16).reshape(2, 8)
    names = [f"token {k}" for k in range(8)]
    cells = token_cells(texts, shares, 50, title="lens", rows=["l_out-0", "l_out-1"], columns=names)
    lines = _lines(cells, 50)
    assert lines[0] == "lens" and lines[-1] == "digits: tenths of that number, # for ten"
    rows = ["l_out-1", "l_out-0"]
    assert [line[:7] for line in lines[2:-1]] == [*rows, " " * 7, *rows]
    assert " t17" in lines[-3] and lines[-3].split()[-1] == "#"
    assert max(cell_len(line) for line in lines) <= 50
    # columns lie below each other, whatever the letters
    assert {cell_len(line) for line in lines[2:4]} == {cell_len(lines[2])}
    coloured = _coloured(cells)
    assert "48;2;252;255;164m t17" in coloured and "digits" not in coloured


def test_a_map_fits_by_two_columns_a_token() -> None:
    assert map_fits(32, 80) and not map_fits(33, 80)
    assert len(_lines(attention_map(np.eye(32), ["x"] * 32), 200)[0]) == 80


def test_inferno_runs_from_black_to_yellow() -> None:
    assert inferno(-1) == inferno(0) == "on rgb(0,0,4)"
    assert inferno(1) == inferno(2) == "on rgb(252,255,164)"
    assert inferno(1.5 / 9) == "on rgb(50,12,86)"  # halfway between two of the ten colours


def _lines(cells: RenderableType, width: int) -> list[str]:
    screen = Console(width=width, file=io.StringIO(), highlight=False)
    screen.print(cells)
    return screen.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_grid_has_numbers_where_they_fit() -> None:
    a = np.asarray([[0.5, np.nan], [-2.0, 1.25]])
    lines = _lines(grid(a, "drop", 20), 20)
    assert lines[0].startswith("drop (layers down,")
    assert lines[-3:] == [
        "          0     1",
        "   0   0.50      ",
        "   1  -2.00  1.25",
    ]
    bare = _lines(grid(np.zeros((1, 9)), "x", 59), 59)
    assert bare[1:] == [
        "      0 1 2 3 4 5 6 7 8",
        "   0 " + " ." * 9,
        "digits: tenths of 1, # for ten",
    ]
    signed = _lines(grid(np.asarray([[1.0, -0.5, np.nan] * 4]), "x", 59, diverging=True), 59)
    assert signed[2] == "   0 " + "+#-5  " * 4
    assert "+#" not in _coloured(grid(np.ones((1, 30)), "x", 80, diverging=True))


def test_diverging_colours_are_red_above_zero_and_blue_below() -> None:
    screen = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    screen.print(grid(np.asarray([[2.0, -2.0, 0.0]]), "drop", 80, diverging=True))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for background in ("48;2;220;50;47m  2.00", "48;2;38;110;210m -2.00", "48;2;40;40;40m  0.00"):
        assert background in text
