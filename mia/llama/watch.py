"""_watch.c from Python: the struct that it works on, and the library as setuptools has built it."""

from __future__ import annotations

import contextlib
import ctypes as C
import importlib.machinery
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mia.arrays import Array


class Watch(C.Structure):
    """What _watch.c works on."""

    _fields_ = (
        ("index", C.c_int64),
        ("n", C.c_int64),
        ("addrs", C.c_void_p),
        ("requested", C.c_void_p),
        ("python", C.c_void_p),
        ("to", C.c_void_p),
        ("bytes", C.c_void_p),
        ("is_host", C.c_void_p),
        ("changes", C.c_void_p),
        ("n_changes", C.c_void_p),
        ("old", C.c_void_p),
        ("data", C.c_int64),
    )


#: one change of consecutive numbers of a node: struct change of _watch.c
CHANGE = np.dtype(
    [
        ("operation", np.int64),
        ("first", np.int64),
        ("n", np.int64),
        ("row", np.int64),
        ("row_n", np.int64),
        ("largest", np.float64),
        ("values", np.uint64),
    ]
)
#: what a change does with its values, in the order of enum operation
OPERATIONS = ("add", "set", "multiply")


class Change(NamedTuple):
    """One of `OPERATIONS`, done to x[first : first + len(values)], where x is all numbers of a node.
    Afterwards no number of x[row : row + row_n] may be larger than `largest` or not finite."""

    operation: str
    first: int
    values: Array
    row: int
    row_n: int
    largest: float


#: in `Watch.requested`: the question goes to Python; the node's numbers are copied, or changed
ASK_PYTHON, COPY, EDIT = 2, 3, 4


@cache
def native_watch() -> C.CDLL | None:
    """_watch.c as setuptools has built it, beside this file. None if there was no compiler, and
    with MIA_NATIVE=0, which shows whether it is to blame for something."""
    if os.environ.get("MIA_NATIVE") == "0":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        built = Path(__file__).with_name(f"_watch{suffix}")
        if built.is_file():
            with contextlib.suppress(OSError, ValueError):  # not for this machine, or an old one
                watch = C.CDLL(str(built))
                if C.c_int64.in_dll(watch, "mia_watch_size").value == C.sizeof(Watch):
                    return watch
    return None
