"""Arithmetic with vectors as people type it: "french - english + 0.5*formal"."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mia.errors import UsageError
from mia.io.provenance import ModelFacts, warn_of_other_model
from mia.vectors.vector import Vector, load


def read(text: str, facts: ModelFacts | None = None) -> Vector:
    """A vector file, or arithmetic with several: "french.gguf - 0.5*formal.gguf".

    Args:
        facts: of the model it is for; a notice says where it was made with another one.
    """
    if _exists(text) or not any(c in text for c in "+-*/() "):
        vector = load(text)
    else:
        vector = combine(text, lambda name: load(name).renamed(Path(name).stem))
    if facts is not None:
        warn_of_other_model(vector.sources, text, facts)
    return vector


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, as arithmetic may be
        return False


def named(vector: Vector | str, facts: ModelFacts) -> tuple[Vector, str]:
    """A vector as an experiment takes it (a `Vector`, a file, or arithmetic), and what messages
    call it. A notice says if it was made with another model than the one of `facts`."""
    if isinstance(vector, str):
        return read(vector, facts), vector
    warn_of_other_model(vector.sources, vector.name, facts)
    return vector, vector.name


def combine(expression: str, find: Callable[[str], Vector]) -> Vector:
    """Reads "a - b + 0.5*c": names (`find` gives their vectors), numbers, + - * / and brackets.

    Names with characters other than letters, digits and . / _ ~ need quotes. A slash before a
    number divides: v/2.

    Raises:
        UsageError: the expression cannot be read; the message says where.
    """
    return _Expression(expression, find).value()


class _Expression:
    """A recursive descent parser: sums of products of factors."""

    _NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?(?![\w/.~])")
    _QUOTED = re.compile(r"'([^']+)'|\"([^\"]+)\"")
    # a slash before a number divides: v/2
    _NAME = re.compile(r"[A-Za-z_.~][\w.~]*(/(?![\d.]+([-+*/()\s]|$))[\w.~]+)*")

    def __init__(self, text: str, find: Callable[[str], Vector]):
        self.text, self.find = text, find
        self.words: list[tuple[str, str]] = []
        rest = text.strip()
        while rest:
            kind, length = self._word(rest)
            word = rest[:length]
            if kind == "quoted":
                kind, word = "name", word[1:-1]
            self.words.append((kind, word))
            rest = rest[length:].lstrip()

    def _word(self, rest: str) -> tuple[str, int]:
        """Kind and length of the first word of `rest`."""
        after_value = bool(self.words) and (self.words[-1][0] != "sign" or self.words[-1][1] == ")")
        if m := self._NUMBER.match(rest):
            return "number", m.end()
        if m := self._QUOTED.match(rest):
            return "quoted", m.end()
        if m := self._NAME.match(rest):
            return "name", m.end()
        if rest[0] == "/" and not after_value and (m := self._NAME.match(rest, 1)):
            return "name", m.end()
        if rest[0] in "-+*/()":
            return "sign", 1
        raise UsageError(f"{self.text!r}: cannot read {rest!r}")

    def value(self) -> Vector:
        try:
            result = self._sum()
        except RecursionError as err:
            raise UsageError("the arithmetic with vectors is nested too deep") from err
        if self.words:
            raise UsageError(f"{self.text!r}: {self.words[0][1]!r} is not expected there")
        if not isinstance(result, Vector):
            raise UsageError(f"{self.text!r} is a number, not a vector")
        return result

    def _sum(self) -> Vector | float:
        total = self._product()
        while self._next() in ("+", "-"):
            sign, term = self.words.pop(0)[1], self._product()
            if isinstance(total, Vector) and isinstance(term, Vector):
                total = total + term if sign == "+" else total - term
            elif isinstance(total, Vector) or isinstance(term, Vector):
                raise UsageError(f"{self.text!r} adds a vector and a number")
            else:
                total = total + term if sign == "+" else total - term
        return total

    def _product(self) -> Vector | float:
        total = self._factor()
        while self._next() in ("*", "/"):
            sign, factor = self.words.pop(0)[1], self._factor()
            if isinstance(factor, Vector):
                if sign == "/" or isinstance(total, Vector):
                    raise UsageError(f"{self.text!r}: a vector takes * and / with numbers only")
                total = factor * total
            elif sign == "*":
                total = total * factor
            elif factor == 0:
                raise UsageError(f"{self.text!r} divides by 0")
            else:
                total = total / factor
        return total

    def _factor(self) -> Vector | float:
        if not self.words:
            raise UsageError(f"{self.text!r} ends where a vector or a number is expected")
        kind, word = self.words.pop(0)
        if kind == "number":
            return float(word)
        if kind == "name":
            return self.find(word)
        if word in ("-", "+"):
            inner = self._factor()
            return -inner if word == "-" else inner
        if word == "(":
            inner = self._sum()
            if self._next() != ")":
                raise UsageError(f"{self.text!r}: a bracket is not closed")
            self.words.pop(0)
            return inner
        raise UsageError(f"{self.text!r}: {word!r} is not expected there")

    def _next(self) -> str | None:
        return self.words[0][1] if self.words and self.words[0][0] == "sign" else None
