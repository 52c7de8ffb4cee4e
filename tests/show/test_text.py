"""Text made safe for a terminal: what could speak to it, or hide, is spelled out."""

import json
import pickle
import sys
import unicodedata

import numpy as np
import pytest

from mia.errors import UsageError
from mia.notices import MiaWarning, notice
from mia.show.html import attention_page
from mia.show.report import Report
from mia.show.text import as_json, columns, safe, visible

#: writes the clipboard; moves the cursor; sets the title (C1); hides and turns text around
HOSTILE = "\x1b]52;c;QUFB\x07\x1b[2J\x9d0;x\x9c\u202eabc\u2066\u200b\ufeff\udcff\x00\r\x7f"

#: marks of format that are seen: signs of numbers and verses, hieroglyphs' joints
SEEN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
SEEN |= {*range(0x13430, 0x13440)}


def test_nothing_that_a_terminal_obeys_or_does_not_show_is_left() -> None:
    for n in range(sys.maxunicode + 1):
        c = chr(n)
        unsafe = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and n not in SEEN
        if unsafe:
            shown = safe(f"a{c}b")
            assert shown != f"a{c}b" and shown.isascii() and shown.isprintable(), hex(n)


def test_a_hostile_text_is_spelled_out() -> None:
    assert safe(HOSTILE) == (
        r"\x1b]52;c;QUFB\x07\x1b[2J\x9d0;x\x9c\u202eabc\u2066\u200b\ufeff\udcff\x00\r\x7f"
    )
    assert safe("a\n\tb\r\x1b", "\n\t") == "a\n\tb\\r\\x1b"
    assert safe("a\n\tb") == "a\\n\\tb"
    assert safe("tag \U000e0041, selector a\U000e0101") == r"tag \U000e0041, selector a\U000e0101"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "naïve e\u0301 ☃ 日本語 العربية עברית हिन्दी",
        "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👩🏽\u200d🚀 ❤\ufe0f 1\ufe0f\u20e3",
        "C:\\new [bold]x[/bold] {0} %s",
    ],
)
def test_letters_marks_and_emoji_stay(text: str) -> None:
    assert safe(text) == text
    assert visible(text) == text


def test_a_joiner_between_letters_is_seen() -> None:
    assert safe("a\u200db") == r"a\u200db"
    assert safe("👨\u200d") == "👨\\u200d"


def test_a_token_stands_on_one_line() -> None:
    assert visible("\n\r\t") == r"\n\r\t"
    assert visible("a\u00a0\u3000b") == r"a\xa0\u3000b"
    assert visible("\u202e\x1b") == r"\u202e\x1b"


def test_a_document_has_the_same_value_and_no_controls() -> None:
    document = {"text": HOSTILE, "astral": "\U000e0041", "é": ["☃", "a\u2028b"]}
    for indent in (None, 1):
        text = as_json(document, indent)
        assert json.loads(text) == document
        assert safe(text, "\n") == text
        assert "é" in text and "☃" in text
    assert as_json("\x1b\x9b") == r'"\u001b\u009b"'


def test_cells_of_columns_stay_in_their_line() -> None:
    assert columns(("a\nb", "n"), [["x\x1b[2Jy", "1"]]).count("\n") == 1
    assert "\x1b" not in columns(("a", "n"), [["x\x1b[2Jy", "1"]])


def test_errors_and_notices_are_one_safe_line() -> None:
    error = UsageError(f"unknown {HOSTILE}\nline")
    assert str(error) == f"unknown {safe(HOSTILE)}\\nline" == str(pickle.loads(pickle.dumps(error)))
    with pytest.warns(MiaWarning) as warned:
        notice(f"made by {HOSTILE}")
    assert str(warned[0].message) == f"made by {safe(HOSTILE)}"


class _Shown(Report):
    def plain(self) -> str:
        return f"<script>alert(1)</script> [bold]x[/bold] :cat: {HOSTILE}"


def test_a_notebook_shows_text_as_text() -> None:
    html = _Shown()._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "[bold]x[/bold]" in html and ":cat:" in html
    assert safe(html, "\n") == html


def test_a_page_shows_no_marks() -> None:
    page = attention_page(
        np.ones((1, 1, 2, 2), np.float32),
        layers=[0],
        heads=[0],
        pieces=["</script>", HOSTILE],
        title=HOSTILE,
    )
    data = json.loads(page.split("const DATA = ", 1)[1].split(";\n", 1)[0])
    assert data["title"] == safe(HOSTILE) and data["tokens"] == ["</script>", safe(HOSTILE)]
    assert page.count("</script>") == 1
