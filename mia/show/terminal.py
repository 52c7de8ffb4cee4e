"""The console of tables and bars: text that comes from outside cannot speak to the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mia.show.text import safe


class SafeConsole(Console):
    """rich's console without markup and emoji names, where every text is `safe`; only the styles
    that mia sets become control sequences."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                # a tab would be as wide as the terminal pleases, but rich has made it spaces
                yield Segment(safe(segment.text, "\n"), segment.style)
