"""Spans: a prompt cut into sentences, lines, clauses, words or runs of tokens.

| how            | a span ends                                                                  |
|----------------|------------------------------------------------------------------------------|
| `sentences`    | after `.` `!` `?` `…` and their kin, with closing quotes and brackets, before a space; after a line end; not after a title (`Dr.`) or one capital letter |
| `lines`        | after a line end                                                             |
| `clauses`      | where a sentence does, and after `,` `;` `:` or a dash before a space        |
| `words`        | before a space                                                               |
| `tokens`       | after each token                                                             |
| a number n     | after each n tokens                                                          |
| `1..7,8..12`   | ranges of tokens, a span each                                                |
| `auto`         | `sentences`; of a prompt of one sentence `clauses`, of one clause `words`    |

A token belongs to the span of its first character that is no space. A last sentence or line of one
or two words, such as `Answer:`, joins the one before: it asks nothing by itself.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mia.errors import UsageError
from mia.ranges import parse_tokens

if TYPE_CHECKING:
    from mia.model import Model

_CLOSING = "[\"'”’»)\\]}*_]*"
_LINE_END = "\n+"
_SENTENCE_END = re.compile(rf"[.!?…]+{_CLOSING}(?=\s)|[。！？]+{_CLOSING}|{_LINE_END}")
_CLAUSE_END = re.compile(
    rf"[.!?…,;:—–]+{_CLOSING}(?=\s)|[。！？、，；：]+{_CLOSING}|\s-(?=\s)|{_LINE_END}"
)
#: a full stop behind one of these ends no sentence
_TITLE = re.compile(r"(?:^|[\s(])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|e\.g|i\.e|No)\.$")
#: letters that are written without spaces count as words
_WORD = re.compile(r"[\u2e80-\uffff]|[^\s\u2e80-\uffff]+")
#: a last sentence or line of fewer words joins the one before
_FEWEST_WORDS = 3


@dataclass(frozen=True, slots=True)
class Span:
    """Some tokens of a prompt that follow each other: `first` to `end` - 1."""

    first: int
    end: int
    text: str

    @property
    def positions(self) -> range:
        return range(self.first, self.end)


def spans_of(model: Model, tokens: Sequence[int], how: str = "auto") -> tuple[str, list[Span]]:
    """The spans of a prompt in their order, and how they were cut.

    A BOS token is in no span of words or sentences.

    Raises:
        UsageError: `how` is none of the module's table, or ranges overlap.
        RangeError: no such token.
    """
    start = 1 if model.has_bos(tokens) else 0
    if how == "auto":
        for name in ("sentences", "clauses", "words"):
            if len(spans := _by_text(model, tokens, start, name)) > 1:
                return name, spans
        return "words", spans
    if how in _CUTS:
        return how, _by_text(model, tokens, start, how)
    if how == "tokens" or re.fullmatch("[0-9]+", how):
        step = 1 if how == "tokens" else int(how)
        if step < 1:
            raise UsageError("spans of 0 tokens; at least 1")
        ends = [*range(start + step, len(tokens), step), len(tokens)]
        return how, _between(model, tokens, [start, *ends])
    if ".." in how:
        return "ranges", _ranges(model, tokens, how)
    raise UsageError(
        f"unknown spans {how!r}; known: auto, {', '.join(_CUTS)}, tokens, a number of tokens, or "
        "ranges of tokens like 1..7,8..12"
    )


def _ranges(model: Model, tokens: Sequence[int], text: str) -> list[Span]:
    out: list[Span] = []
    for part in text.split(","):
        positions = parse_tokens(part.strip(), len(tokens), "spans")
        span = _span(model, tokens, positions[0], positions[-1] + 1)
        if out and span.first < out[-1].end:
            raise UsageError(
                f"spans {text!r}: {part.strip()} begins before the span before it ends"
            )
        out.append(span)
    return out


def _by_text(model: Model, tokens: Sequence[int], start: int, how: str) -> list[Span]:
    """Spans that end where the text says."""
    pieces = [model.token_bytes(t) for t in tokens[start:]]
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    # places between characters -> between bytes, which is how tokens lie
    cuts = [len(text[:i].encode("utf-8", "surrogateescape")) for i in _CUTS[how](text)]
    begins, offset, before = [start], 0, 0
    for i, piece in enumerate(pieces, start):
        if body := piece.lstrip():
            passed = bisect_right(cuts, offset + len(piece) - len(body))
            if passed > before and any(p.strip() for p in pieces[begins[-1] - start : i - start]):
                begins.append(i)
            before = passed
        offset += len(piece)
    spans = _between(model, tokens, [*begins, len(tokens)])
    short = how in ("sentences", "lines") and len(_WORD.findall(spans[-1].text)) < _FEWEST_WORDS
    if short and len(spans) > 1:
        spans[-2:] = [_span(model, tokens, spans[-2].first, spans[-1].end)]
    return spans


def _between(model: Model, tokens: Sequence[int], bounds: Sequence[int]) -> list[Span]:
    return [_span(model, tokens, a, b) for a, b in pairwise(bounds) if a < b]


def _span(model: Model, tokens: Sequence[int], first: int, end: int) -> Span:
    return Span(first, end, model.detokenize(tokens[first:end]))


def _sentence_ends(text: str) -> Iterator[int]:
    for m in _SENTENCE_END.finditer(text):
        if not _TITLE.search(text[max(m.start() - 6, 0) : m.end()]):
            yield m.end()


def _ends(pattern: str | re.Pattern[str]) -> Callable[[str], Iterator[int]]:
    return lambda text: (m.end() for m in re.finditer(pattern, text))


_CUTS: dict[str, Callable[[str], Iterator[int]]] = {
    "sentences": _sentence_ends,
    "lines": _ends(_LINE_END),
    "clauses": _ends(_CLAUSE_END),
    "words": _ends(r"\s+"),
}
