"""The page of attention maps, opened in a browser: what it shows, and that it asks for nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import chromium
import numpy as np
import pytest
from chromium import Page

from mia.errors import UsageError
from mia.show.html import attention_page, write_page

LAYERS, HEADS, N = 30, 9, 64
PIECES = ['<b>"bold"</b>', "</script><script>boom()", "\\n", *[f" t{i}" for i in range(N - 3)]]


def _maps(n_layer: int, n_head: int, n: int) -> np.ndarray:
    """Random patterns (n_layer, n_head, n, n): causal, rows summing to 1."""
    x = np.random.default_rng(0).random((n_layer, n_head, n, n)) * np.tri(n)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


MAPS = _maps(LAYERS, HEADS, N)


@pytest.fixture(scope="module")
def text() -> str:
    return attention_page(
        MAPS,
        layers=range(LAYERS),
        heads=range(HEADS),
        pieces=PIECES,
        title="tiny",
        about="<i>x</i>",
    )


def test_page_holds_everything_and_stays_small(text: str, tmp_path: Path) -> None:
    write_page(tmp_path / "maps.html", text)
    assert (tmp_path / "maps.html").stat().st_size < 5_000_000
    assert not re.search(r"(https?:)?//[a-z]", text.split("const DATA")[0])
    assert "boom()" not in text.replace("\\u003c/script>\\u003cscript>boom()", "")
    data = json.loads(re.search(r"const DATA = (\{.*\});\n", text)[1])  # type: ignore[index]
    assert data["tokens"] == PIECES and data["max"] == 1.0


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"maps of shape \(2, 1, 4, 4\) are not of 1 layers, 1 heads and 4"
    ):
        attention_page(_maps(2, 1, 4), layers=[0], heads=[0], pieces=["a"] * 4, title="")


@pytest.fixture(scope="module")
def page(text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if chromium.PROGRAM is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("page")
    write_page(folder / "maps.html", text)
    with chromium.browser(folder / "profile") as found:
        found.open((folder / "maps.html").as_uri())
        yield found


def _tip(page: Page) -> list[str]:
    shown = page.value("getComputedStyle(document.getElementById('tip')).display")
    return (
        page.value("document.getElementById('tip').textContent").split("\n")
        if shown != "none"
        else []
    )


def _at(page: Page, canvas: str, x: float, y: float) -> tuple[float, float]:
    box = page.value(
        f"(r => [r.x, r.y])(document.getElementById('{canvas}').getBoundingClientRect())"
    )
    return float(np.ceil(box[0] + x)), float(np.ceil(box[1] + y))  # whole pixels, as a mouse's


def _in_grid(page: Page, layer: int, head: int, query: int, key: int) -> tuple[float, float]:
    left, above, pitch, side = page.value("[left, above, pitch, side]")
    x, y = key * side / N, query * side / N
    page.value(f"scrollTo(0, {layer * pitch})")
    return _at(page, "grid", left + head * pitch + x, above + layer * pitch + y)


def test_page_asks_for_nothing_and_no_script_fails(page: Page) -> None:
    assert [r for r in page.requests if not r.startswith(("file:///", "data:"))] == []
    assert sum(r.startswith("file:///") for r in page.requests) == 1
    assert page.errors == []
    assert page.value("document.getElementById('about').textContent") == "<i>x</i>"


def test_page_draws_every_map(page: Page) -> None:
    """The pixel of each map's first cell, whose weight is 1, is inferno's last colour."""
    found = page.value(
        "DATA.layers.map((_, l) => DATA.heads.map((_, h) => [...document.getElementById('grid')"
        ".getContext('2d').getImageData(left + h * pitch, above + l * pitch, 1, 1).data]))"
    )
    assert np.array_equal(
        np.asarray(found), np.broadcast_to([252, 255, 164, 255], (LAYERS, HEADS, 4))
    )


@pytest.mark.parametrize("at", [(0, 0, 5, 0), (3, 2, 63, 1), (29, 8, 40, 39)])
def test_hovering_reads_the_weight(page: Page, at: tuple[int, int, int, int]) -> None:
    layer, head, query, key = at
    page.mouse("mouseMoved", *_in_grid(page, *at))
    assert _tip(page) == [
        f"layer {layer} · head {head}",
        f'query {query} "{PIECES[query]}"',
        f'key {key} "{PIECES[key]}"',
        f"weight {MAPS[at]:.4f}",
    ]


def test_later_keys_and_the_outside_have_no_weight(page: Page) -> None:
    page.mouse("mouseMoved", *_in_grid(page, 0, 0, 3, 9))
    assert _tip(page)[-1] == "later than the query"
    page.mouse("mouseMoved", 1, 1)
    assert _tip(page) == []


def test_clicking_a_head_enlarges_it(page: Page) -> None:
    page.click(*_in_grid(page, 4, 7, 10, 10))
    assert page.value("document.getElementById('name').textContent") == "layer 4 · head 7"
    page.value("scrollTo(0, 0)")
    cell, margin = page.value("[cell, margin]")
    page.mouse("mouseMoved", *_at(page, "map", margin + 6.5 * cell, margin + 20.5 * cell))
    assert _tip(page)[1:] == ['query 20 " t17"', 'key 6 " t3"', f"weight {MAPS[4, 7, 20, 6]:.4f}"]
