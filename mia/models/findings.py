"""What an examination finds: one line each, ok, warn or fail, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: "ok": nothing to do. "warn": results are right, but there is something to know. "fail": they may
#: be wrong, or there are none.
Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of `mia doctor`.

    Attributes:
        what: what was looked at, in a word or two.
        text: what was found.
        advice: what to do about it, if anything.
        numbers: what was measured, by name.
    """

    level: Level
    what: str
    text: str
    advice: str = ""
    numbers: dict[str, float] | None = None

    def document(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "what": self.what,
            "text": self.text,
            "advice": self.advice,
            "numbers": self.numbers or {},
        }
