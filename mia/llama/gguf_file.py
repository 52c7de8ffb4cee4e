"""GGUF files seen from outside: is it one, is it whole, which parts does it have.

Plain Python and a memory map: this needs neither llama.cpp nor numpy.
"""

from __future__ import annotations

import mmap
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from math import prod
from pathlib import Path
from typing import Any

from mia.errors import ModelError, did_you_mean
from mia.io.files import read_at

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_FOREIGN = {b"vers": ", a git-lfs pointer: git lfs pull", b"<!DO": ", a web page"}
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind: bytes
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
TOKENS = "tokenizer.ggml.tokens"
# ggml type: elements and bytes of a block
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 40), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a GGUF file: where its bytes begin, ggml's type, `ne` innermost first."""

    name: str
    offset: int
    type: int
    ne: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """An array of the metadata: the type of its elements, how many, and where they begin."""

    kind: int
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors' bytes.

    Attributes:
        values: the metadata; texts as bytes, arrays as `ArrayValue`. The vocabulary is a list of
            texts if the file is checked.
        needed: how long the file must be to hold its last tensor.
    """

    values: dict[str, Any]
    tensors: list[FileTensor]
    needed: int


def split_names(file: str) -> list[str]:
    match = _SPLIT.fullmatch(file)
    stem, total = (match[1], int(match[3])) if match else ("", 0)
    return [f"{stem}-{i:05d}-of-{total:05d}.gguf" for i in range(1, total + 1)] or [file]


def split_parts(path: Path) -> list[Path]:
    return [path.with_name(name) for name in split_names(path.name)]


def read_header(file: int, path: Path, *, check: Callable[[Header], None] | None = None) -> Header:
    """The header of a GGUF file.

    Args:
        file: its descriptor.
        path: what errors call it.
        check: raises `ValueError` for values that llama.cpp cannot take; it has the tokens' texts.

    Raises:
        ModelError: it is not GGUF, cut short or damaged.
    """
    magic = read_at(file, 0, 4)
    if not magic:
        raise ModelError(f"{path} is empty")
    if magic != b"GGUF":
        what = _FOREIGN.get(magic, "")
        raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}{what}")
    try:
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
            size, header = len(data), _parse(data, with_tokens=check is not None)
            if check is not None and size >= header.needed:
                check(header)
    except (struct.error, OverflowError) as error:  # the walk ran past the end
        raise ModelError(f"{path} is cut short: its header has no end, get it again") from error
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    if size < header.needed:
        lack = f"{size:,} bytes of the {header.needed:,} that its tensors need"
        raise ModelError(f"{path} is cut short: {lack}, get it again")
    return header


def kv_spans(file: int) -> list[tuple[str, int, int]]:
    """The key-value pairs of a whole GGUF file: key, and where its bytes begin and end."""
    spans = []
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
        pos = 24
        for _ in repeat(None, struct.unpack_from("<Q", data, 16)[0]):
            end = _name_end(data, pos)
            (kind,) = struct.unpack_from("<I", data, end)
            stop = _value_end(data, end + 4, kind)
            spans.append((data[pos + 8 : end].decode(errors="replace"), pos, stop))
            pos = stop
    return spans


def _parse(data: mmap.mmap, *, with_tokens: bool) -> Header:
    """`with_tokens`: the vocabulary's texts in place of its `ArrayValue`.

    Raises ValueError if it makes no sense, struct.error or OverflowError past the end."""
    u32 = struct.Struct("<I").unpack_from
    version, n_tensors, n_values = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        raise ValueError("it is big-endian" if big else f"GGUF version {version}, not 2 or 3")
    pos, alignment = 24, 32
    values: dict[str, Any] = {}
    for _ in repeat(None, n_values):
        end = _name_end(data, pos)
        (kind,) = u32(data, end)
        name = data[pos + 8 : end].decode(errors="replace")
        values[name] = _value(data, end + 4, kind)
        if with_tokens and name == TOKENS and _is_texts(values[name]):
            values[name], pos = _texts(data, values[name])
        else:
            pos = _value_end(data, end + 4, kind)
        if name == "general.alignment":
            alignment = u32(data, end + 4)[0] or 1
    rows: list[tuple[str, int, int, tuple[int, ...]]] = []
    needed = 0
    for _ in repeat(None, n_tensors):
        end = _name_end(data, pos)
        name, pos = data[pos + 8 : end].decode(errors="replace"), end
        (n_dims,) = u32(data, pos)
        if n_dims > 4:
            raise ValueError(f"it is damaged, a tensor has {n_dims} dimensions")
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, pos + 4)
        pos += 16 + 8 * n_dims
        elements, n_bytes = BLOCKS.get(kind, (1 << 64, 1))  # of a newer type: count nothing
        needed = max(needed, offset + prod(dims) // elements * n_bytes)
        rows.append((name, offset, kind, (*dims, *[1] * (4 - n_dims))))
    if not n_tensors:
        return Header(values, [], pos)
    start = -(-pos // alignment) * alignment
    tensors = [FileTensor(name, start + offset, kind, ne) for name, offset, kind, ne in rows]
    return Header(values, tensors, start + needed)


def _value(data: mmap.mmap, pos: int, kind: int) -> Any:
    if kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", data, pos)
        return ArrayValue(kind, count, pos + 12)
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, pos)
        return data[pos + 8 : pos + 8 + length]
    if kind not in _CODES:
        raise ValueError(f"it is damaged, a value has the unknown type {kind}")
    return struct.unpack_from(f"<{_CODES[kind]}", data, pos)[0]


def _is_texts(value: Any) -> bool:
    return isinstance(value, ArrayValue) and value.kind == _STRING


def _texts(data: mmap.mmap, array: ArrayValue) -> tuple[list[bytes], int]:
    """The texts of an array, and where it ends."""
    pos, length, texts = array.start, struct.Struct("<Q").unpack_from, []
    for _ in repeat(None, array.count):
        start = pos + 8
        pos = start + length(data, pos)[0]
        texts.append(data[start:pos])
    return texts, pos


def _name_end(data: mmap.mmap, pos: int) -> int:
    (length,) = struct.unpack_from("<Q", data, pos)
    if not length:  # as in the holes of a file that was allocated and never filled
        raise ValueError("it is damaged, a name is empty")
    return pos + 8 + int(length)


def _value_end(data: mmap.mmap, pos: int, kind: int) -> int:
    count = 1
    if kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", data, pos)
        pos += 12
    if kind == _STRING:
        length = struct.Struct("<Q").unpack_from
        for _ in repeat(None, count):  # 50 ns each: a vocabulary has 150,000 and as many merges
            pos += 8 + length(data, pos)[0]
        return pos
    if kind not in _SCALARS:
        raise ValueError(f"it is damaged, a value has the unknown type {kind}")
    return pos + count * _SCALARS[kind]


def existing(path: Path) -> Path:
    """`path`, if it is a regular file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = did_you_mean(path.name, (other.name for other in path.parent.glob("*.gguf")), 0.8)
        if path.suffix != ".gguf" and not path.is_absolute():
            hint = " (a repo of a hub needs an entry in models.toml, with repo and file)"
        raise ModelError(f"no such file: {path}{hint}") from error
    except (OSError, ValueError) as error:  # no permission, too long, a null byte
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ModelError(f"{path} is {kind}: give a .gguf file")
    return path


def absolute(text: str, folder: Path) -> Path:
    """`text` as a path, ~ expanded; a relative one starts in `folder`."""
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:
        raise ModelError(f"{text}: {error}") from error


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
