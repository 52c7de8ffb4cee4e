"""Progress of long work: off by default, bars on stderr after `show_progress()`.

An experiment names its steps: `with step("reading") as bar: model.run(requests, progress=bar)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: called with how much is done, and how much there is
Progress = Callable[[int, int], None]

_bars: ContextVar[bool] = ContextVar("mia_bars", default=False)


def show_progress(on: bool = True) -> None:
    """Turns progress bars on stderr on or off."""
    _bars.set(on)


def progress_is_shown() -> bool:
    return _bars.get()


@contextmanager
def step(what: str) -> Iterator[Progress | None]:
    """A bar for one step of an experiment where bars are on, else None."""
    if not _bars.get():
        yield None
        return
    from rich.markup import escape
    from rich.progress import Progress as Bars

    from mia.show.terminal import SafeConsole
    from mia.show.text import safe

    with Bars(console=SafeConsole(stderr=True), transient=True) as bars:
        task = bars.add_task(escape(safe(what)), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
