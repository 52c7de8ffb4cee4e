"""What a lens reads, as lines, records and a table of any width."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console
from tiny import Tiny

from mia.errors import UsageError
from mia.generation import Token
from mia.lenses.table import LensRow, LensTable
from mia.methods.logit_lens import logit_lens
from mia.show.text import visible


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
    # in the cells, and in the list of the last token
    assert "…" not in text and text.count("l_out-2") == 2
    assert f"{table.lens[1].top[0]['prob']:.2f}" in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", range(60, 130, 7))
def test_no_cell_is_cut_where_tokens_are_long(width: int) -> None:
    top = [{"id": i, "text": "x" * 30, "logit": 1.0, "prob": 0.12} for i in range(8)]
    long = LensTable(None, [Token(0, 1, "y" * 30)], [LensRow("l_out-2", 2, 0, top)], 1)
    line = _text(long, width).splitlines()[1]
    assert len(line) <= width and "…" not in line
    assert line.split() == ["l_out-2", "0", "y" * 11, *["x" * 11, "0.12"] * line.count("0.12")]


def test_cells_have_the_best_token_of_each_layer(table: LensTable) -> None:
    text = _text(table, 130).splitlines()
    assert text[0] == "the best token of each layer; colour: probability, up to 1"
    assert [line.split()[0] for line in text[2:5]] == ["l_out-2", "l_out-1", "l_out-0"]
    for line, (first, last) in zip(
        text[4:1:-1], zip(*[iter(table.lens)] * 2, strict=True), strict=True
    ):
        for row in (first, last):
            assert visible(row.top[0]["text"])[:7].rstrip() in line
    assert "the last token:" in text


@pytest.mark.parametrize("chosen", ["-1", "0"])
def test_one_token_or_one_site_is_a_list(tiny: Callable[[str], Tiny], chosen: str) -> None:
    t = tiny("llama")
    table = logit_lens(t.model, t.prompt(4), "l_out" if chosen == "-1" else "l_out-0", 2,
                       tokens=chosen if chosen == "-1" else "*")  # fmt: skip
    assert _text(table, 100).splitlines()[0].split() == ["site", "at", "token", "1", "2"]


def test_colours_may_say_the_entropy(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("llama")
    table = logit_lens(t.model, t.prompt(4), "l_out", 2, colour_by="entropy")
    oracle = t.oracle.lens(t.oracle.run(t.prompt(4))["resid_post.1"])  # (4, n_vocab)
    p = np.exp(oracle - oracle.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    expected = -(p * np.log(p)).sum(1)
    assert [r["entropy"] for r in table.document()["lens"][4:8]] == pytest.approx(
        expected, abs=1e-4
    )
    shades, top = table._shades()
    np.testing.assert_allclose(shades[1], expected, atol=1e-4)
    assert top == pytest.approx(shades.max()) and "entropy, up to" in _text(table, 100)
    with pytest.raises(UsageError, match="colours by 'rank'; known: probability, entropy"):
        logit_lens(t.model, t.prompt(4), "l_out", colour_by="rank")  # type: ignore[arg-type]


def test_a_table_says_what_does_not_fit(table: LensTable) -> None:
    assert "of 8 fit here; the document has all" in _text(table, 60)
    assert "fit here" not in _text(table, 200)


def test_a_notebook_shows_the_table(table: LensTable) -> None:
    html = table._repr_html_()
    assert html.startswith("<pre") and "l_out-2" in html and "color: #" in html
