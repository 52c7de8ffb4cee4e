"""A page of results in a browser: what it shows by mouse and by keyboard, and that it is one file
into which no text can put a script."""

import re
from pathlib import Path

import numpy as np
import pytest
from chromium import Page

from mia.errors import UsageError
from mia.show.html import write_page
from mia.show.markup import LEVELS, _ink, colour_rules, shade
from mia.show.page import (
    Axis,
    Bar,
    BarList,
    Code,
    Curve,
    Heading,
    HeatMap,
    LensGrid,
    Line,
    Manifest,
    Of,
    Paragraph,
    Part,
    Table,
    page,
)

#: each would do something in some place of a page
EVIL = [
    "</script><script>boom()</script>",
    "<img src=x onerror=boom()>",
    '" onmouseover="boom()" x="',
    "' onfocus='boom()",
    "<!--BODY--><!--TITLE-->",
    "&lt;b&gt;\x1b]52;c;QQ==\x07\u202e",
    "\ud800 </td></table></svg>",
]
VALUES = np.array([[0.05, 2.0, -4.0], [1.0, np.nan, -0.1]])
TOKENS = Axis("token", [0, 1, 2], [" The", EVIL[0], EVIL[2]])
LAYERS = Axis("layer", [3, 4])


def _map(**more: object) -> HeatMap:
    settings: dict[str, object] = {
        "title": "effect",
        "values": VALUES,
        "low": VALUES - 0.5,
        "high": VALUES + 0.25,
        "rows": LAYERS,
        "columns": TOKENS,
        "unit": "nats",
        "floor": 0.1,
        "command": ("mia sweep -p '", EVIL[0], "' --layers ", Of.ROW, " --token-idx ", Of.COLUMN),
    }
    return HeatMap(**{**settings, **more})  # type: ignore[arg-type]


def _lens() -> LensGrid:
    best = [[[(f" {i}{k}", 0.75), (EVIL[1], 0.125)] for k in range(3)] for i in range(2)]
    p = [[0.75, 0.5, 0.25], [1.0, 0.0, 0.1]]
    return LensGrid(title="lens", top=best, values=p, rows=LAYERS, columns=TOKENS, largest=1.0)


def _curve() -> Curve:
    y = np.array([0.5, np.nan, -2.0])
    line = Line(name="effect", y=y, low=y - 1, high=y + 1)
    other = Line(name=EVIL[3], y=[1, 2, 3])
    return Curve(title="by token", x=TOKENS, lines=[line, other], y_name="nats", floor=0.1,
                 command=("mia sweep --token-idx=", Of.COLUMN))  # fmt: skip


def _every_part(text: str) -> list[Part]:
    """All parts, with a text in each place where one can be."""
    axis, cells = Axis(text, [text, text], [text, text]), [[1.0, 2.0]] * 2
    return [
        Heading(text),
        Paragraph(text),
        Code(text, title=text),
        Table(text, [text], [[text]]),
        Manifest({text: {text: [text]}}, title=text),
        HeatMap(
            title=text,
            values=cells,
            rows=axis,
            columns=axis,
            unit=text,
            note=text,
            command=(text, Of.ROW),
        ),
        LensGrid(
            title=text,
            top=[[[(text, 1.0)]] * 2] * 2,
            values=cells,
            rows=axis,
            columns=axis,
            name=text,
            unit=text,
            others=[(text, cells)],
            command=(text, Of.ROW),
        ),
        Curve(
            title=text,
            x=axis,
            lines=[Line(name=text, y=[1, 2])],
            y_name=text,
            note=text,
            command=(text, Of.COLUMN),
        ),
        BarList(title=text, bars=[Bar(label=text, value=1, command=text)], unit=text, note=text),
    ]


@pytest.fixture
def shown(chrome: Page, tmp_path: Path) -> Page:
    parts: list[Part] = [
        Heading("One"),
        _map(),
        _lens(),
        _curve(),
        BarList(title="spans", bars=[Bar(label="a", value=-1, low=-2, high=0, command="mia why")]),
        Code("mia sweep"),
        Manifest({"model": {"name": "m"}}),
    ]
    return _opened(chrome, tmp_path, page("A page", parts))


#: every element with the names of its attributes
MARKUP = "[...document.querySelectorAll('*')].map(e => [e.tagName, ...e.getAttributeNames()])"


@pytest.fixture(scope="module")
def plain_markup(chrome: Page, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Of a page of all parts whose texts are harmless; long, as the other texts."""
    text = "a long harmless text"
    folder = tmp_path_factory.mktemp("plain")
    tab = _opened(chrome, folder, page(text, _every_part(text), about=text))
    markup: list[list[str]] = tab.value(MARKUP)
    return markup


def _opened(chrome: Page, folder: Path, text: str) -> Page:
    write_page(folder / "page.html", text)
    chrome.errors.clear()
    chrome.requests.clear()
    chrome.open((folder / "page.html").as_uri())
    return chrome


def _press(tab: Page, key: str) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


def _hover(tab: Page, selector: str) -> list[str]:
    """The lines of the tip over the middle of an element."""
    x, y = tab.value(
        f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
        f"return [r.x + r.width / 2, r.y + r.height / 2] }})(document.querySelector('{selector}'))"
    )
    tab.mouse("mouseMoved", x, y)
    if tab.value("getComputedStyle(document.getElementById('tip')).display") == "none":
        return []
    lines: list[str] = tab.value("document.getElementById('tip').textContent").split("\n")
    return lines


def _chosen(tab: Page) -> str:
    panel = "document.activeElement.closest('figure').querySelector('.chosen.open')"
    text: str = tab.value(f"{panel}.innerText")
    return text


@pytest.mark.parametrize("text", EVIL)
def test_no_text_of_any_part_becomes_markup(
    chrome: Page, tmp_path: Path, plain_markup: list[list[str]], text: str
) -> None:
    tab = _opened(chrome, tmp_path, page(text, _every_part(text), about=text))
    assert tab.errors == [] and len(tab.requests) == 1
    assert tab.value(MARKUP) == plain_markup


def test_no_other_script_may_run(shown: Page) -> None:
    """Even one that got into the page: the policy names the page's own by its hash."""
    shown.value(
        "const s = document.createElement('script'); s.textContent = 'globalThis.boom = 1'; "
        "document.body.append(s); const i = document.createElement('b'); "
        "i.setAttribute('onclick', 'globalThis.boom = 2'); document.body.append(i); i.click()"
    )
    assert shown.value("globalThis.boom ?? null") is None
    assert shown.errors == [] and [r.partition(":")[0] for r in shown.requests] == ["file"]


def test_hovering_a_map_says_the_cell_its_number_and_its_command(shown: Page) -> None:
    assert _hover(shown, ".map tbody tr:nth-child(1) td:nth-child(4)") == [
        f'layer 3, token 2 "{EVIL[2]}"',
        "-4 nats [-4.5, -3.75]",
        f"$ mia sweep -p '{EVIL[0]}' --layers 3 --token-idx 2",
    ]
    assert (
        _hover(shown, ".map tbody tr:nth-child(1) td:nth-child(2)")[2] == "within the noise floor"
    )
    assert _hover(shown, ".map tbody tr:nth-child(2) td:nth-child(3)")[1] == "no number nats"


def test_the_arrow_keys_walk_over_a_map(shown: Page) -> None:
    _press(shown, "Tab")  # to the map: its first cell is the only stop
    assert _chosen(shown).splitlines()[0] == 'layer 3, token 0 " The"'
    for key in ("ArrowRight", "ArrowDown", "End", "ArrowDown"):
        _press(shown, key)
    assert _chosen(shown).splitlines()[:3] == [
        f'layer 4, token 2 "{EVIL[2]}"',
        "-0.1 nats [-0.6, +0.15]",
        "within the noise floor",
    ]
    assert "--layers 4 --token-idx 2" in _chosen(shown)
    _press(shown, "Escape")
    assert shown.value("document.querySelectorAll('.chosen.open').length") == 0
    assert shown.value("document.querySelectorAll('.map [tabindex=\"0\"]').length") == 1


def test_a_lens_shows_the_best_tokens_the_last_layer_on_top(shown: Page) -> None:
    assert shown.value("document.querySelector('.lens tbody th').textContent") == "4"
    assert _hover(shown, ".lens tbody tr:nth-child(2) td") == [
        'layer 3, token 0 " The"',
        "probability 0.75",
        '0.750  " 00"',
        f'0.125  "{EVIL[1]}"',
    ]
    classes = "[...document.querySelectorAll('.lens td')].map(t => t.className)"
    assert shown.value(classes) == ["s20", "s0", "s2", "s15", "s10", "s5"]


def test_a_curve_says_its_numbers_to_the_mouse_the_keyboard_and_in_a_table(shown: Page) -> None:
    assert _hover(shown, "circle.dot.l0") == [
        "effect",
        'token 0 " The"',
        "nats 0.5 [-0.5, 1.5]",
        "$ mia sweep --token-idx=0",
    ]
    shown.value("document.querySelector('circle.dot').focus()")
    _press(shown, "ArrowRight")  # over the token without a number
    assert _chosen(shown).splitlines()[2] == "nats -2 [-3, -1]"
    _press(shown, "ArrowDown")
    assert _chosen(shown).splitlines()[:3:2] == [EVIL[3], "nats 3"]
    assert "--token-idx=2" in _chosen(shown)
    cells = "[...document.querySelectorAll('details td.number')].map(t => t.textContent)"
    assert shown.value(cells) == ["0.5 [-0.5, 1.5]", "1", "no number", "2", "-2 [-3, -1]", "3"]
    # a line is broken where there is no number, so the first is two stretches with a band each
    assert shown.value("document.querySelectorAll('polyline.l0, polygon.l0').length") == 4


def test_dots_lie_where_their_numbers_are(shown: Page) -> None:
    at = "[...document.querySelectorAll('circle.l1')].map(c => [+c.getAttribute('cx'), +c.getAttribute('cy')])"
    x, y = np.array(shown.value(at)).T
    assert np.allclose(np.diff(x), np.diff(x)[0]) and np.allclose(
        np.diff(y), np.diff(y)[0], atol=0.02
    )
    (tick,) = shown.value(
        "[...document.querySelectorAll('svg text')].filter(t => t.textContent === '2')"
        ".map(t => +t.getAttribute('y'))"
    )
    assert abs(y[1] - (tick - 4)) < 0.02  # the line's number 2 lies at the axis's 2


def test_a_bar_says_its_command(shown: Page) -> None:
    assert _hover(shown, ".bars td[data-tip]") == [
        "a",
        "-1  [-2, +0]",
        "$ mia why",
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1400])
def test_it_fits_a_narrow_screen_in_light_and_dark(shown: Page, theme: str, width: int) -> None:
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    shown.call("Emulation.setDeviceMetricsOverride", **size)
    feature = {"name": "prefers-color-scheme", "value": theme}
    shown.call("Emulation.setEmulatedMedia", features=[feature])
    try:
        assert shown.value("document.documentElement.scrollWidth") <= width
        paper = shown.value("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if theme == "light" else "rgb(20, 20, 22)")
    finally:
        shown.call("Emulation.clearDeviceMetricsOverride")
        shown.call("Emulation.setEmulatedMedia", features=[])


def test_a_screen_reader_gets_names_rows_and_columns(shown: Page) -> None:
    tree = shown.call("Accessibility.getFullAXTree")["nodes"]
    of = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if "role" in n]
    assert ("grid", "effect") in of and ("grid", "lens") in of and ("grid", "spans") in of
    assert ("rowheader", "3") in of and ("columnheader", " The") in of
    assert ("gridcell", "-4.00") in of
    assert any(role == "heading" and name == "One" for role, name in of)
    assert any(role == "image" and name.startswith("effect, token 0") for role, name in of)


def test_the_colours_of_cells() -> None:
    assert [shade(x, 4, diverging=True) for x in (0, 4, -4, 1, -1, 9, np.nan, np.inf)] == [
        "p0", "p20", "n20", "p5", "n5", "p20", "x", "x",
    ]  # fmt: skip
    assert [shade(x, 1, diverging=False) for x in (0, 0.5, 1, 2, -1)] == [
        "s0", "s10", "s20", "s20", "s0",
    ]  # fmt: skip
    assert shade(0.0, 0.0, diverging=True) == "p0"


def test_the_text_of_a_cell_is_read_on_every_colour() -> None:
    """A contrast of 4.5 : 1 at least, as WCAG 2.1 asks for."""

    def luminance(colour: str) -> float:
        if len(colour) == 4:
            colour = "#" + "".join(2 * c for c in colour[1:])
        x = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    rules = re.findall(r"\.[pns]\d+\{background:(#\w+);color:(#\w+)\}", colour_rules())
    assert len(rules) == 2 * 3 * (LEVELS + 1)
    for back, ink in rules:
        dark, light = sorted([luminance(back), luminance(ink)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, back
    assert _ink((0, 0, 0)) == "#fff" and _ink((255, 255, 255)) == "#000"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (_map(values=np.zeros((2, 2))), r"effect: an array of shape \(2, 2\) is not of \(2, 3\)"),
        (_map(low=np.zeros(3)), r"effect: an array of shape \(3,\)"),
        (_map(columns=Axis("token", [0, 1, 2], ["a"])), "effect: 1 labels for 3 tokens"),
        (
            HeatMap(
                title="big",
                values=np.zeros((300, 300)),
                rows=Axis("a", range(300)),
                columns=Axis("b", range(300)),
            ),
            "big: 90000 cells; a page has 50000 at most",
        ),
        (
            Curve(title="c", x=LAYERS, lines=[Line(name="l", y=[1])]),
            r"c: line 'l' has shape \(1,\), the axis layer 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(part: Part, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        page("", [part])


def test_links_lead_to_sections_where_there_are_several() -> None:
    sections: list[Part] = [Heading(f"s{i}") for i in range(3)]
    assert page("", sections).count('<li><a href="#part-') == 3
    assert "<nav" not in page("", sections[:2])
