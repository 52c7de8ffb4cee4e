"""What belongs to the library is freed once: by `close()`, or when its owner is dropped.

`Owned` is a pointer of the library's. It keeps what it depends on (a context its model) until it
has been freed itself, in whatever order Python drops the objects around them. That includes the end
of the process, where some backends insist on it; only if another thread that has used the library
is still alive then, nothing is freed: between two calls it reads what the library has computed. Nor
does a forked child free what is its parent's.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from mia.errors import UsageError
from mia.llama.interrupts import Held

if TYPE_CHECKING:
    from mia.llama.library import Library

_exiting = False
#: seconds that the end of the process waits for threads that are inside the library
_PATIENCE = 5.0


class Owned:
    """A pointer that `free` releases when this object is closed or dropped."""

    def __init__(
        self, lib: Library, pointer: Any, free: Callable[[Any], object], *needs: object
    ) -> None:
        self._pointer = pointer
        # `needs` are arguments, so that the registry of finalizers keeps them until this one has run
        self._free = weakref.finalize(self, _free, lib, os.getpid(), free, pointer, needs)
        _notice_exit(lib)

    def get(self, what: str) -> Any:
        """The pointer. Raises `UsageError` if it has been freed."""
        if self._pointer is None:
            raise UsageError(f"this {what} is closed; open it again to use it")
        return self._pointer

    @property
    def closed(self) -> bool:
        return self._pointer is None

    def close(self) -> None:
        self._pointer = None
        self._free()


def _free(
    lib: Library, pid: int, free: Callable[[Any], object], pointer: Any, needs: object
) -> None:
    if pid == os.getpid() and not (_exiting and lib.used_by_others()):
        with Held():  # freeing logs
            free(pointer)


@cache
def _notice_exit(lib: Library) -> None:
    """Registered after weakref's own function for the end of the process, it runs before that."""
    atexit.register(_exit, lib)


def _exit(lib: Library) -> None:
    """Other threads come out of the library, and in no more: what they compute with is taken down."""
    global _exiting
    _exiting = lib.exiting = True
    end = time.monotonic() + _PATIENCE
    while lib.at_work and time.monotonic() < end:
        time.sleep(0.002)
