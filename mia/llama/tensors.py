"""Tensors of a graph: what a node says of itself, and its numbers as a numpy array.

The rest of mia holds addresses, plain integers. `describe` makes a `Node` of one,
`rows_of` an array over the tensor's own memory, or over a copy of it on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes as C
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.errors import EngineError
from mia.llama.library import Tensor, library


@dataclass(frozen=True, slots=True)
class Node:
    """What a graph node or weight says of itself. `ne` and `nb` as in ggml: innermost first."""

    addr: int
    name: str
    op: str
    type: str
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    src: tuple[int, ...]
    view_src: int
    params: bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Numpy's order, outermost first, leading ones dropped."""
        ne = list(self.ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        return tuple(reversed(ne))

    def param_f32(self, index: int) -> float:
        return float(np.frombuffer(self.params, np.float32)[index])


def describe(addr: int) -> Node:
    """Reads the tensor at `addr`."""
    t = Tensor.from_address(addr)
    base = library().base
    return Node(
        addr=addr,
        name=t.name.decode(errors="replace"),
        op=base.ggml_op_desc(addr).decode(),
        type=base.ggml_type_name(t.type).decode(),
        ne=tuple(t.ne),
        nb=tuple(t.nb),
        src=tuple(s for s in t.src if s),
        view_src=t.view_src or 0,
        params=bytes(t.op_params),
    )


#: `enum ggml_tensor_flag` of ggml.h: ggml gives the memory of these to no other tensor
_FLAG_OUTPUT = 2


def is_output(addr: int) -> bool:
    """Whether what is computed at a node stays there until the next decode."""
    return bool(Tensor.from_address(addr).flags & _FLAG_OUTPUT)


class _Memory:
    """Lets numpy see foreign memory without copying it."""

    def __init__(
        self, addr: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, kind: str
    ):
        self.__array_interface__ = {
            "data": (addr, False),
            "shape": shape,
            "strides": strides,
            "typestr": kind,
            "version": 3,
        }


def array_at(
    addr: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, kind: str = "<f4"
) -> npt.NDArray[Any]:
    """An array over memory of the library's, which must outlive it."""
    return np.asarray(_Memory(addr, shape, strides, kind))


def _is_host(t: Tensor) -> bool:
    return bool(t.buffer) and bool(library().base.ggml_backend_buffer_is_host(t.buffer))


#: ggml's types that numpy has too
_KINDS = {0: "<f4", 1: "<f2", 26: "<i4", 27: "<i8"}
_HEADER = Tensor.op.offset  # type, buffer, ne and nb: what an array's shape depends on
_views: dict[int, tuple[bytes, int, npt.NDArray[Any]]] = {}


def host_array(addr: int) -> npt.NDArray[Any] | None:
    """The tensor as an array over its own memory (outermost axis first, 4 axes), or None
    if it lies on a device or is quantized.

    A graph that llama.cpp reuses has the same tensors at every token, so the arrays are kept.
    """
    header = C.string_at(addr, _HEADER)
    data = C.c_void_p.from_address(addr + Tensor.data.offset).value or 0
    known = _views.get(addr)
    if known is not None and known[0] == header and known[1] == data:
        return known[2]
    t = Tensor.from_address(addr)
    kind = _KINDS.get(t.type)
    if kind is None or not _is_host(t):
        return None
    array = array_at(data, tuple(t.ne)[::-1], tuple(t.nb)[::-1], kind)
    _views[addr] = (header, data, array)
    return array


def forget_arrays() -> None:
    """To be called when tensors are freed: their addresses will be given out again."""
    _views.clear()


def read_array(addr: int) -> npt.NDArray[Any]:
    """A copy of the tensor, wherever it lies. Raises `EngineError` for quantized tensors."""
    host = host_array(addr)
    return host.copy() if host is not None else _from_device(addr)[0].copy()


@contextlib.contextmanager
def rows_of(addr: int, *, write: bool) -> Iterator[npt.NDArray[Any]]:
    """The tensor as an array to read, or to change in place if `write`.

    On the host this is the tensor's own memory; on a device a copy, sent back
    at the end if `write`. Raises `EngineError` for quantized tensors.
    """
    host = host_array(addr)
    if host is not None:
        yield host
        return
    array, raw = _from_device(addr)
    yield array
    if write:
        library().base.ggml_backend_tensor_set(addr, raw.ctypes.data, 0, raw.nbytes)


def _from_device(addr: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """A copy of the tensor, as an array and as the bytes that the array lies in."""
    t = Tensor.from_address(addr)
    kind = _KINDS.get(t.type)
    if kind is None:
        raise EngineError(f"tensor {t.name.decode()!r} is not of a float type")
    base = library().base
    raw = np.empty(base.ggml_nbytes(addr), np.uint8)
    base.ggml_backend_tensor_get(addr, raw.ctypes.data, 0, raw.nbytes)
    ne, nb = tuple(t.ne), tuple(t.nb)
    return np.ndarray(ne[::-1], np.dtype(kind), raw, strides=nb[::-1]), raw
