"""Tensors of a GGUF file: the table of them, the texts beside it, and rows as float32."""

from __future__ import annotations

import contextlib
import ctypes as C
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mia.arrays import Array
from mia.errors import EngineError, ModelError
from mia.llama.c_numbers import c_path
from mia.llama.gguf_file import FileTensor
from mia.llama.library import GgufParams, library
from mia.llama.open_file import OpenFile

_TO_FLOAT = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_int64)
_GGUF_STRING = 8


def file_tensors(path: Path) -> list[FileTensor]:
    """The tensor table of a GGUF file. Raises `ModelError` if it cannot be read."""
    return [tensor for _, tensor in OpenFile(path).tensors()]


def file_strings(path: Path) -> dict[str, str]:
    """The key-value pairs of a GGUF file whose value is a text. Raises `ModelError` if it cannot
    be read."""
    base = library().base
    with _opened(path) as file:
        return {
            base.gguf_get_key(file, i).decode(errors="replace"): base.gguf_get_val_str(
                file, i
            ).decode(errors="replace")
            for i in range(base.gguf_get_n_kv(file))
            if base.gguf_get_kv_type(file, i) == _GGUF_STRING
        }


def value_kinds(path: Path) -> dict[str, int]:
    """The type of each value of a GGUF file, `enum gguf_type` of gguf.h, by its key. Raises
    `ModelError` if the file cannot be read."""
    base = library().base
    with _opened(path) as file:
        return {
            base.gguf_get_key(file, i).decode(errors="replace"): int(base.gguf_get_kv_type(file, i))
            for i in range(base.gguf_get_n_kv(file))
        }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    base = library().base
    file = library().call(base.gguf_init_from_file, c_path(path), GgufParams(True, None))
    if not file:
        raise ModelError(f"{path} cannot be read as GGUF: {library().last_error()}")
    try:
        yield file
    finally:
        base.gguf_free(file)


def dequantize(source: int, ggml_type: int, n_rows: int, n_in: int) -> Array:
    """`n_rows` rows of `n_in` values stored at address `source` as `ggml_type`, as float32."""
    out = np.empty((n_rows, n_in), np.float32)
    if ggml_type == 0:
        C.memmove(out.ctypes.data, source, out.nbytes)
        return out
    traits = library().base.ggml_get_type_traits(ggml_type).contents
    if not traits.to_float:
        raise EngineError(f"ggml type {traits.type_name.decode()} cannot be converted to float")
    _TO_FLOAT(traits.to_float)(source, out.ctypes.data, n_rows * n_in)
    return out


def type_name(ggml_type: int) -> str:
    """What a ggml type is called: "f16", "q4_1"."""
    return str(library().base.ggml_get_type_traits(ggml_type).contents.type_name.decode())


def type_bytes(ggml_type: int, n: int) -> int:
    """Bytes that `n` values of a ggml type take."""
    traits = library().base.ggml_get_type_traits(ggml_type).contents
    return int(n // traits.blck_size * traits.type_size)
