"""Coloured cells for a terminal."""

import io

import numpy as np
from rich.console import Console, RenderableType

from mia.show.grid import attention_map, grid, inferno, map_fits


def test_a_map_is_coloured_by_weight() -> None:
    text = attention_map(np.asarray([[1, 0], [0, 0.5]]), [" a", "\n"])
    assert text.plain.splitlines()[:2] == ["          a   0     ", "         \\n   1     "]
    styles = [str(s.style) for s in text.spans]
    assert styles.count("on rgb(252,255,164)") == 1 and styles.count("on rgb(0,0,4)") == 1


def test_a_map_fits_by_two_columns_a_token() -> None:
    assert map_fits(32, 80) and not map_fits(33, 80)
    assert len(attention_map(np.eye(32), ["x"] * 32).plain.splitlines()[0]) == 80


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
    assert bare[1:] == ["      0 1 2 3 4 5 6 7 8", "   0 " + "  " * 9]


def test_diverging_colours_are_red_above_zero_and_blue_below() -> None:
    screen = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    screen.print(grid(np.asarray([[2.0, -2.0, 0.0]]), "drop", 80, diverging=True))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for background in ("48;2;220;50;47m  2.00", "48;2;38;110;210m -2.00", "48;2;40;40;40m  0.00"):
        assert background in text
