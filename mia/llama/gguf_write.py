"""A writer of small GGUF files: header, key-value pairs, tensor infos, aligned data.

Enough for control vectors and for models made for tests; a plain install needs no
other package for it. Version 3 of the format, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.io.files import as_utf8, write_whole

Value = (
    str
    | bool
    | int
    | float
    | Sequence[str]
    | Sequence[int]
    | Sequence[float]
    | npt.NDArray[np.int32]
)

_ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor of any ggml type as it lies in the file.

    Attributes:
        ggml_type: the type's number (0 is F32).
        shape: numpy's order: a matrix is (n_out, n_in).
        data: its blocks, in one piece or in several.
    """

    ggml_type: int
    shape: tuple[int, ...]
    data: bytes | Sequence[bytes | memoryview]

    @property
    def pieces(self) -> Sequence[bytes | memoryview]:
        return [self.data] if isinstance(self.data, bytes) else self.data

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.pieces))


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, npt.NDArray[Any] | RawTensor],
    *,
    own: bool = False,
) -> None:
    """Writes a whole file or none. Arrays are stored as float32.

    Integers are written as uint32 if they fit, else as int32 or 64 bits wide; arrays of numpy's as
    int32. `own`: see `write_whole`.

    Raises:
        FileError: the file cannot be written.
    """
    raw = {k: t if isinstance(t, RawTensor) else _float32(t) for k, t in tensors.items()}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(raw), len(metadata))]
    for key, value in metadata.items():
        head += [text_bytes(key), value_bytes(value)]
    offset = 0
    for name, t in raw.items():
        ne = t.shape[::-1]
        head.append(text_bytes(name) + struct.pack(f"<I{len(ne)}Q", len(ne), *ne))
        head.append(struct.pack("<IQ", t.ggml_type, offset))
        offset += t.n_bytes + _padding(t.n_bytes)
    joined = b"".join(head)

    def write(p: Path) -> None:
        with p.open("wb") as f:
            f.write(joined + bytes(_padding(len(joined))))
            for t in raw.values():
                f.writelines([*t.pieces, bytes(_padding(t.n_bytes))])

    write_whole(path, write, own=own)


def _float32(a: npt.NDArray[Any]) -> RawTensor:
    return RawTensor(0, a.shape, np.ascontiguousarray(a, "<f4").tobytes())


def _padding(n: int) -> int:
    return -n % _ALIGNMENT


def text_bytes(text: str) -> bytes:
    """A text as a GGUF file has it."""
    raw = as_utf8(text).encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Value) -> bytes:
    """A value of the metadata with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + text_bytes(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _I32, len(value)) + value.astype("<i4").tobytes()
    if isinstance(value, Sequence):
        items = [value_bytes(v) for v in value]
        kinds = {i[:4] for i in items} or {struct.pack("<I", _STRING)}
        if len(kinds) > 1:
            raise TypeError(f"a GGUF array holds values of one kind, not {list(value)[:4]}")
        body = b"".join(i[4:] for i in items)
        return struct.pack("<I", _ARRAY) + kinds.pop() + struct.pack("<Q", len(items)) + body
    if isinstance(value, (bool, np.bool_)):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, (int, np.integer)):
        for kind, code, low, high in (
            (_U32, "I", 0, 1 << 32),
            (_I32, "i", -(1 << 31), 1 << 31),
            (_U64, "Q", 0, 1 << 64),
        ):
            if low <= value < high:
                return struct.pack(f"<I{code}", kind, value)
        return struct.pack("<Iq", _I64, value)
    return struct.pack("<If", _F32, value)
