"""A GGUF file copied with some tensors changed: all else keeps its bytes.

The new numbers are quantized by ggml (`ggml_quantize_chunk`, what llama.cpp's own quantizer calls).
"""

from __future__ import annotations

import ctypes as C
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mia.arrays import Array
from mia.errors import EngineError, ModelError
from mia.llama.gguf_file import FileTensor, kv_spans, read_header, split_parts
from mia.llama.gguf_tensors import type_bytes, type_name
from mia.llama.gguf_write import Value, text_bytes, value_bytes
from mia.llama.library import library
from mia.llama.open_file import OpenFile

_ALIGNMENT = 32
_COPIED = 1 << 24


@dataclass(frozen=True)
class NewRows:
    """A tensor's new numbers.

    Attributes:
        blocks: gives them from the start, a few rows at a time, (n, n_in).
        ggml_type: the type to store them as; None for the tensor's own.
    """

    blocks: Callable[[], Iterable[Array]]
    ggml_type: int | None = None


def copy_gguf(
    source: OpenFile,
    target: Path,
    metadata: Mapping[str, Value],
    changed: Mapping[str, NewRows],
    duplicated: Mapping[str, str] | None = None,
) -> None:
    """Writes `source` to `target` with other tensors.

    Args:
        metadata: keys that are added, or take the place of others.
        changed: new numbers, by the tensor's name.
        duplicated: tensors that are added: the new name of an old one, unchanged.

    Raises:
        ModelError: the file is one of several parts, or a type that ggml cannot quantize to.
    """
    if len(split_parts(source.path)) > 1:
        raise ModelError(f"{source.path} is one of several parts; merge them into one file first")
    with source.path.open("rb") as f:
        header = read_header(f.fileno(), source.path)
        spans = kv_spans(f.fileno())
        kept = [
            b for key, start, end in spans if key not in metadata for b in [_read(f, start, end)]
        ]
    new = [text_bytes(key) + value_bytes(value) for key, value in metadata.items()]
    alignment = int(header.values.get("general.alignment", _ALIGNMENT))
    tensors = [(t.name, t) for t in header.tensors]
    by_name = dict(tensors)
    tensors += [(name, by_name[old]) for name, old in (duplicated or {}).items()]
    types = {name: _type(name, t, changed) for name, t in tensors}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(kept) + len(new)), *kept, *new]
    offset = 0
    for name, t in tensors:
        ne = t.ne[: max(i + 1 for i, n in enumerate(t.ne) if n > 1 or i == 0)]
        head.append(text_bytes(name) + struct.pack(f"<I{len(ne)}Q", len(ne), *ne))
        head.append(struct.pack("<IQ", types[name], offset))
        offset += _padded(type_bytes(types[name], prod(t.ne)), alignment)
    joined = b"".join(head)
    with target.open("wb") as f:
        f.write(joined + bytes(-len(joined) % alignment))
        for name, t in tensors:
            n = type_bytes(types[name], prod(t.ne))
            if name in changed:
                for rows in changed[name].blocks():
                    f.write(quantized(rows, types[name]))
            else:
                for start in range(0, n, _COPIED):
                    f.write(source.read(0, t.offset + start, min(_COPIED, n - start)))
            f.write(bytes(_padded(n, alignment) - n))


def _type(name: str, t: FileTensor, changed: Mapping[str, NewRows]) -> int:
    wish = changed[name].ggml_type if name in changed else None
    kind = t.type if wish is None else wish
    if name in changed and library().base.ggml_quantize_requires_imatrix(kind):
        raise ModelError(
            f"{name} is of type {type_name(kind)}, which cannot be made without an importance matrix"
        )
    return kind


def quantized(rows: Array, ggml_type: int) -> bytes:
    """Rows (n, n_in) float32 as ggml stores them in a type. Raises `EngineError` if it cannot."""
    data = np.ascontiguousarray(rows, np.float32)
    n, n_in = data.shape
    if ggml_type == 0:
        return data.tobytes()
    out = np.empty(type_bytes(ggml_type, n_in) * n, np.uint8)
    source = data.ctypes.data_as(C.POINTER(C.c_float))
    written = library().base.ggml_quantize_chunk(
        ggml_type, source, C.c_void_p(out.ctypes.data), 0, n, n_in, None
    )
    if written != out.nbytes:
        raise EngineError(f"ggml cannot quantize to {type_name(ggml_type)}")
    return out.tobytes()


def _read(f: object, start: int, end: int) -> bytes:
    from mia.io.files import read_at

    return read_at(f.fileno(), start, end - start)  # type: ignore[attr-defined]


def _padded(n: int, alignment: int) -> int:
    return n + -n % alignment
