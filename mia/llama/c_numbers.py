"""Numbers on their way into C, where one that does not fit is wrapped without a word."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

from mia.errors import ModelError, RangeError
from mia.notices import notice

INT32 = -(1 << 31), (1 << 31) - 1
UINT32 = 0, (1 << 32) - 1
#: GGML_MAX_N_THREADS of ggml.h, beyond which llama.cpp ends the process
MAX_THREADS = 512


def c_int(value: Any, name: str, low: int = INT32[0], high: int = INT32[1]) -> int:
    """`value` as a whole number within `low` to `high`.

    Raises:
        RangeError: it is no whole number, or outside. `name` is what the error calls it.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise RangeError(f"{name} must be a whole number, got {value!r}") from None
    if isinstance(value, bool) or not low <= number <= high:
        if not isinstance(value, bool) and abs(number) > 1 << 128:
            value = "a number of more than 128 bits"
        valid = f"at least {low}" if number < low and high == INT32[1] else f"in {low} to {high}"
        raise RangeError(f"{name} must be {valid}, got {value}")
    return number


def c_path(path: Path) -> bytes:
    """A path as C takes it. Raises `ModelError` if it holds a null byte."""
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ModelError(f"{str(path)!r} has a null byte in it")
    return raw


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def usable_threads(wish: int | None) -> int:
    """How many threads to run: all processors if nothing is wished, and never more than those.

    More only wait for each other, and thousands bring a machine down. They are cut with a notice and
    not refused, so that a script runs on a smaller machine too.

    Raises:
        RangeError: fewer than one, or no whole number.
    """
    available = min(processors(), MAX_THREADS)
    if not wish:
        return available
    try:
        more = operator.index(wish) > available
    except TypeError:
        more = False
    if more:
        notice(
            f"{wish} threads are more than the {available} processors that this process may use; "
            f"going on with {available}"
        )
        return available
    return c_int(wish, "threads", 1)
