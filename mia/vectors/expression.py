"""Arithmetic with vectors as a person types it: "french - english + 0.5*formal"."""

from __future__ import annotations

import re
from collections.abc import Callable

from mia.errors import UsageError
from mia.vectors import Vector


def combine(expression: str, find: Callable[[str], Vector]) -> Vector:
    """Reads "a - b + 0.5*c": names (`find` gives their vectors), numbers, + - * / and brackets.

    Names with other characters than letters, digits and . / _ ~ stand in quotes. A slash
    before a number divides: v/2.

    Raises:
        UsageError: the expression cannot be read; the message says where.
    """
    return _Expression(expression, find).value()


class _Expression:
    """A descent over sums, products and signs."""

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
        """Kind and length of the word that `rest` begins with."""
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
        found = self._sum()
        if self.words:
            raise UsageError(f"{self.text!r}: {self.words[0][1]!r} is not expected there")
        if not isinstance(found, Vector):
            raise UsageError(f"{self.text!r} is a number, not a vector")
        return found

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
