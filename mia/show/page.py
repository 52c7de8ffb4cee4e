"""One self-contained page of a result: nothing is fetched, and it opens from a file.

    page("What the patch restores", [
        Heading("France into Japan"),
        HeatMap(title="change of logprob", values=a, rows=Axis("layer", range(30)), columns=…),
        Code("mia sweep …"),
        Manifest({"model": "smollm2", …}),
    ])

Each part is a value that knows its HTML. All text may come from outside: `mia.show.markup.text`
escapes it. The style and the script are `data/page.html`; its policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

from mia.show.markup import colour_rules, element, items, text
from mia.show.page_curves import Bar, BarList, Curve, Line
from mia.show.page_maps import Axis, Command, HeatMap, LensGrid, Of

__all__ = [
    "Axis", "Bar", "BarList", "Code", "Command", "Curve", "Heading", "HeatMap", "LensGrid", "Line",
    "Manifest", "Of", "Paragraph", "Part", "Table", "page",
]  # fmt: skip


class Part(Protocol):
    """A part of a page."""

    def html(self, n: int) -> str:
        """The part as HTML; `n` is its place on the page, for names that are there once."""


@dataclass(frozen=True)
class Heading:
    """A heading; `level` 2 begins a section, 3 a part of one."""

    words: str
    level: int = 2

    def html(self, n: int) -> str:
        return element(f"h{self.level}", text(self.words), id=f"part-{n}")


@dataclass(frozen=True)
class Paragraph:
    """Plain text; its line ends stay."""

    words: str

    def html(self, n: int) -> str:
        return element("p", text(self.words, keep="\n"), class_="words")


@dataclass(frozen=True)
class Code:
    """A command line or other text of fixed width, with a button that copies it."""

    words: str
    title: str = ""

    def html(self, n: int) -> str:
        title = element("p", text(self.title), class_="title") if self.title else ""
        code = element("code", text(self.words, keep="\n\t"))
        button = '<button type="button" class="copy">copy</button>'
        return f'{title}<div class="code"><pre tabindex="0">{code}</pre>{button}</div>'


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers, the same number in each."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self, n: int) -> str:
        head = "".join(element("th", text(c), scope="col") for c in self.columns)
        body = "\n".join(f"<tr>{''.join(map(_entry, row))}</tr>" for row in self.rows)
        return (
            f'<div class="scroll"><table class="plain"><caption>{text(self.title)}</caption>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )


@dataclass(frozen=True)
class Manifest:
    """What a result was made with, folded: names and values, which may be nested."""

    entries: Mapping[str, Any]
    title: str = "Made with"

    def html(self, n: int) -> str:
        lines = "".join(items("dt", [k]) + items("dd", [v]) for k, v in _flat(self.entries))
        return f"<details><summary>{text(self.title)}</summary><dl>{lines}</dl></details>"


def page(title: str, parts: Sequence[Part], *, about: str = "") -> str:
    """The page as text; `mia.show.html.write_page` writes it.

    Args:
        title: of the page.
        parts: from top to bottom.
        about: a line below the title.

    Raises `UsageError` for a map whose numbers are not of its axes.
    """
    body = [element("h1", text(title))]
    if about:
        body.append(element("p", text(about, keep="\n"), class_="words"))
    body.append(_contents(parts))
    body += [part.html(n) for n, part in enumerate(parts)]
    before, after = _template().split("<!--BODY-->")
    return before.replace("<!--TITLE-->", text(title), 1) + "\n".join(filter(None, body)) + after


def _contents(parts: Sequence[Part]) -> str:
    """Links to the sections, where there are several."""
    sections = [(n, p) for n, p in enumerate(parts) if isinstance(p, Heading) and p.level == 2]
    if len(sections) < 3:
        return ""
    links = "".join(f'<li><a href="#part-{n}">{text(p.words)}</a></li>' for n, p in sections)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


@cache
def _template() -> str:
    """The template with its colours, and a policy that names its script by its hash."""
    template = files("mia").joinpath("data/page.html").read_text(encoding="utf-8")
    template = template.replace("/*COLOURS*/", colour_rules(), 1)
    script = re.search(r"<script>(.*?)</script>", template, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return template.replace("SCRIPT-HASH", f"sha256-{digest}", 1)


def _entry(value: Any) -> str:
    """A cell of a table; numbers stand to the right."""
    if value is None:
        return "<td></td>"
    if isinstance(value, bool):
        return element("td", "yes" if value else "no")
    if isinstance(value, int):
        return element("td", str(value), class_="number")
    if isinstance(value, float):
        return element("td", f"{value:.5g}", class_="number")
    return element("td", text(value, keep="\n"))


def _flat(entries: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested entries as lines: `arguments.prompt`."""
    lines: list[tuple[str, str]] = []
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            lines += _flat(value, f"{name}.")
        elif value is not None and value != []:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append((name, shown))
    return lines
