"""What each part is asked, and what it gives."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Options:
    """What was asked.

    Attributes:
        n: how many, in the part's own unit.
        models: a folder of further GGUF files.
        faults: the folder for what can be run again; made when there is something.
        minutes: after so long no more work is begun.
        workers: child processes at a time.
    """

    n: int
    seed: int = 0
    models: Path | None = None
    faults: Path = Path("soak-faults")
    minutes: float | None = None
    workers: int = 2
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def is_over(self) -> bool:
        return self.minutes is not None and self.seconds > 60 * self.minutes

    def keep(self, name: str, content: Mapping[str, Any] | bytes) -> Path:
        """Writes what shows a fault, to be run again."""
        self.faults.mkdir(parents=True, exist_ok=True)
        path = self.faults / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path


@dataclass
class Part:
    """What a part gave.

    Attributes:
        figures: what was counted or measured, in the order of the table.
        faults: what is wrong, a line each.
    """

    name: str
    figures: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def wrong(self, fault: str) -> None:
        """Notes a fault and says so at once."""
        self.faults.append(fault)
        print(f"{self.name}: WRONG: {fault}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def table(self) -> str:
        """Markdown rows."""
        rows = [f"| {self.name} | {what} | {figure} |" for what, figure in self.figures.items()]
        return "\n".join([*rows, f"| {self.name} | **faults** | **{len(self.faults)}** |"])


def count(n: int) -> str:
    """1234567 as "1,234,567"."""
    return f"{n:,}"
