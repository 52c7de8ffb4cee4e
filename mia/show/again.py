"""The command line that made a result, and that of a part of it, as a page shows them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mia.show.page_maps import Command, Of
from mia.show.text import visible


@dataclass(frozen=True)
class Again:
    """The command line that made a result.

    Attributes:
        words: gives its words, without some arguments.
        options: argument -> the name of its option.
    """

    words: Callable[[Collection[str]], Sequence[str]]
    options: Mapping[str, str]

    def line(self) -> str:
        """The whole line."""
        return _joined(["mia", *self.words(())])

    def cell(self, values: Mapping[str, Any], without: Collection[str] = ()) -> Command:
        """The line with other values of some arguments; none if one of them has no option.

        Args:
            values: argument -> its value, whether a cell's row or column stands for it, or
                several such in a tuple.
            without: arguments that a cell does not have.
        """
        if any(name not in self.options for name in values):
            return ()
        words = list(self.words({*values, *without}))
        end = words.index("--") if "--" in words else len(words)
        parts: list[str | Of] = [_joined(["mia", *words[:end]])]
        for name, value in values.items():
            each = value if isinstance(value, tuple) else (value,)
            parts += [f" {self.options[name]}="]
            parts += [v if isinstance(v, Of) else _joined([str(v)]) for v in each]
        return [*parts, f" {_joined(words[end:])}"] if words[end:] else parts


def _joined(words: Sequence[str]) -> str:
    return visible(shlex.join(words))
