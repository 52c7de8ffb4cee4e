"""What a lens reads, as lines, records and a table of any width."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from tiny import Tiny

from mia.generation import Token
from mia.lenses.table import LensRow, LensTable
from mia.methods.logit_lens import logit_lens


@pytest.fixture(scope="module")
def table(tiny: Callable[[str], Tiny]) -> LensTable:
    t = tiny("llama")
    return logit_lens(t.model, t.prompt(4), "l_out", 8, tokens="1,-1")


def _text(table: LensTable, width: int) -> str:
    screen = Console(width=width, record=True, file=io.StringIO())
    screen.print(table.table(width))
    return screen.export_text()


def test_lines_have_the_site_once(table: LensTable) -> None:
    lines = table.plain().splitlines()
    assert lines[::3] == [f"Layer #{i} l_out-{i}:" for i in range(3)]
    assert [line.split(":")[0] for line in lines if "|" in line] == ["1", "3"] * 3
    assert lines[1].endswith(f" {table.lens[0].top[-1]['prob']:.2f}") and lines[1].count("|") == 7


def test_records_are_ranked(table: LensTable) -> None:
    rows = table.rows()
    assert len(rows) == 3 * 2 * 8
    assert [r["rank"] for r in rows[:9]] == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert rows[8]["token_index"] == 3 and rows[8]["logit"] == table.lens[1].top[0]["logit"]


@pytest.mark.parametrize("width", [60, 80, 130])
def test_tables_keep_sites_and_probabilities_whatever_the_width(
    table: LensTable, width: int
) -> None:
    text = _text(table, width)
    assert "…" not in text and text.count("l_out-2") == 1
    assert f"{table.lens[0].top[0]['prob']:.2f}" in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", range(60, 130, 7))
def test_no_cell_is_cut_where_tokens_are_long(width: int) -> None:
    top = [{"id": i, "text": "x" * 30, "logit": 1.0, "prob": 0.12} for i in range(8)]
    long = LensTable(None, [Token(0, 1, "y" * 30)], [LensRow("l_out-2", 2, 0, top)], 1)
    line = _text(long, width).splitlines()[1]
    assert len(line) <= width and "…" not in line
    assert line.split() == ["l_out-2", "0", "y" * 11, *["x" * 11, "0.12"] * line.count("0.12")]


def test_a_table_says_what_does_not_fit(table: LensTable) -> None:
    assert "of 8 fit here; the document has all" in _text(table, 60)
    assert "fit here" not in _text(table, 200)


def test_a_notebook_shows_the_table(table: LensTable) -> None:
    html = table._repr_html_()
    assert html.startswith("<pre") and "l_out-2" in html and "color: #" in html
