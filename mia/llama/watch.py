"""_watch.c from Python: the struct that it works on, and the library as setuptools has built it."""

from __future__ import annotations

import contextlib
import ctypes as C
import importlib.machinery
import os
from functools import cache
from pathlib import Path


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
        ("data", C.c_int64),
    )


#: in `Watch.requested`: the question goes to Python; the node's numbers are copied
ASK_PYTHON, COPY = 2, 3


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
