"""Is it a number, several numbers, token indices? What a caller gave, checked where it enters.

Each function returns what it was given in a plain type, or raises a `UsageError` that names it.
Numpy's numbers are as good as Python's. True and False are no numbers: they were meant for
another argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.errors import UsageError

#: how much of a wrong value a message repeats
_SHOWN = 60


def shown(given: object) -> str:
    """A value for an error message, on one line."""
    text = " ".join(repr(given).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def whole(given: Any, what: str) -> int:
    if type(given) is int or (isinstance(given, (int, np.integer)) and not _is_flag(given)):
        return int(given)
    raise UsageError(f"{what} is a whole number, not {shown(given)}")


def number(given: Any, what: str) -> float:
    """A finite number."""
    if isinstance(given, (int, float, np.integer, np.floating)) and not _is_flag(given):
        if not np.isfinite(given):
            raise UsageError(f"{what} {given} is not a finite number")
        return float(given)
    raise UsageError(f"{what} is a number, not {shown(given)}")


def flag(given: Any, what: str) -> bool:
    if _is_flag(given):
        return bool(given)
    raise UsageError(f"{what} is True or False, not {shown(given)}")


def wholes(given: Any, what: str) -> list[int]:
    """A list, tuple, range or array of whole numbers."""
    if (
        isinstance(given, np.ndarray)
        and given.ndim == 1
        and (given.dtype.kind in "iu" or not len(given))
    ):
        return [int(x) for x in given.tolist()]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UsageError(f"{what} is a list of whole numbers, not {shown(given)}")
    return [whole(x, f"each of {what}") for x in given]


def token_indices(given: Any, what: str) -> int | slice | list[int] | None:
    """`mia.edits.Tokens`."""
    if given is None:
        return None
    if isinstance(given, slice):
        for end in (given.start, given.stop, given.step):
            if end is not None:
                whole(end, f"each end of {what}")
        if given.step == 0:
            raise UsageError(f"{what} has a step of 0")
        return given
    if isinstance(given, (Sequence, np.ndarray)) and np.ndim(given) and not isinstance(given, str):
        return wholes(given, what)
    try:
        return whole(given, what)
    except UsageError:
        raise UsageError(
            f"{what} is an index, several, a slice or None, not {shown(given)}"
        ) from None


def distinct(given: Any, what: str) -> list[int] | None:
    """Several whole numbers, each once; one by itself is a list of one. None stays None."""
    if given is None:
        return None
    several = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str)
    numbers = wholes(given, what) if several else [whole(given, what)]
    if len(set(numbers)) < len(numbers):
        twice = next(x for i, x in enumerate(numbers) if x in numbers[:i])
        raise UsageError(f"{what} has {twice} twice")
    return numbers


def real_array(given: Any, what: str) -> Array:
    """Numbers as float32, a new array; too large ones become infinite without a warning."""
    try:
        a = np.asarray(given)
        if a.dtype.kind not in "biuf":
            a = np.asarray(a, np.float64) if _is_real_object(a) else a
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise UsageError(f"{what} is no array of numbers: {shown(given)}") from None
    if a.dtype.kind == "c":
        raise UsageError(f"{what}: numbers are real here, not complex")
    if a.dtype.kind not in "biuf":
        raise UsageError(f"{what} is no array of numbers: {shown(given)}")
    with np.errstate(over="ignore"):
        return np.array(a, np.float32)


def _is_flag(given: Any) -> bool:
    return isinstance(given, (bool, np.bool_))


def _is_real_object(a: np.ndarray[Any, Any]) -> bool:
    """Whole numbers beyond 64 bits are objects, and extensions of numpy have kinds of their own."""
    if a.dtype.kind == "V":
        return True
    return a.dtype.kind == "O" and all(isinstance(x, (int, float)) for x in a.ravel())
