"""GGUF files seen from outside: is it one, is it whole, which parts does it have.

Plain Python and a memory map: this needs neither llama.cpp nor numpy.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from collections.abc import Iterable
from itertools import repeat
from math import prod
from pathlib import Path

from mia.errors import ModelError

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_FOREIGN = {b"vers": ", a git-lfs pointer: git lfs pull", b"<!DO": ", a web page"}
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind: bytes
_STRING, _ARRAY = 8, 9
# ggml type: elements and bytes of a block
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 40), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip


def check_gguf(path: str | os.PathLike[str]) -> None:
    """Checks that a GGUF file, or each part of a split one, is as long as its tensor table says.

    Only the header is read, which takes milliseconds. llama.cpp itself crashes on a file that
    is cut short, or gives an error that does not say so.

    Raises:
        ModelError: missing, unreadable, empty, not GGUF, of another version, cut
            short, damaged, or a split model without all its parts.
    """
    first = Path(path)
    parts = split_parts(first)
    if first.name != parts[0].name:
        raise ModelError(f"{first} is a later part of a split model: give {parts[0].name}")
    existing(first)
    for part in filter(is_file, parts):
        _check_part(part)
    if missing := [part.name for part in parts if not is_file(part)]:
        raise ModelError(f"{first} is one of {len(parts)} parts; missing: {', '.join(missing)}")


def split_names(file: str) -> list[str]:
    match = _SPLIT.fullmatch(file)
    stem, total = (match[1], int(match[3])) if match else ("", 0)
    return [f"{stem}-{i:05d}-of-{total:05d}.gguf" for i in range(1, total + 1)] or [file]


def split_parts(path: Path) -> list[Path]:
    return [path.with_name(name) for name in split_names(path.name)]


def _check_part(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if not magic:
                raise ModelError(f"{path} is empty")
            if magic != b"GGUF":
                what = _FOREIGN.get(magic, "")
                raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}{what}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                size, needed = len(data), _needed_bytes(data)
    except (struct.error, OverflowError) as error:  # the walk ran past the end
        raise ModelError(f"{path} is cut short: its header has no end, get it again") from error
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if size < needed:
        lack = f"{size:,} bytes of the {needed:,} that its tensors need"
        raise ModelError(f"{path} is cut short: {lack}, get it again")


def _needed_bytes(data: mmap.mmap) -> int:
    """How long the file must be to hold its last tensor. Raises ValueError if it makes no sense."""
    u32 = struct.Struct("<I").unpack_from
    version, n_tensors, n_values = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        raise ValueError("it is big-endian" if big else f"GGUF version {version}, not 2 or 3")
    pos, alignment = 24, 32
    for _ in repeat(None, n_values):
        end = _name_end(data, pos)
        (kind,) = u32(data, end)
        if data[pos + 8 : end] == b"general.alignment":
            alignment = u32(data, end + 4)[0] or 1
        pos = _value_end(data, end + 4, kind)
    needed = 0
    for _ in repeat(None, n_tensors):
        pos = _name_end(data, pos)
        (n_dims,) = u32(data, pos)
        if n_dims > 4:
            raise ValueError(f"it is damaged, a tensor has {n_dims} dimensions")
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, pos + 4)
        pos += 16 + 8 * n_dims
        elements, n_bytes = _BLOCKS.get(kind, (1 << 64, 1))  # of a newer type: count nothing
        needed = max(needed, offset + prod(dims) // elements * n_bytes)
    return -(-pos // alignment) * alignment + needed if n_tensors else pos


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
        hint = near(path.name, (other.name for other in path.parent.glob("*.gguf")), 0.8)
        if path.suffix != ".gguf" and not path.is_absolute():
            hint = " (a repo of a hub needs an entry in models.toml, with repo and file)"
        raise ModelError(f"no such file: {path}{hint}") from error
    except (OSError, ValueError) as error:  # no permission, too long, a null byte
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ModelError(f"{path} is {kind}: give a .gguf file")
    return path


def near(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, list(choices), cutoff=cutoff)
    return f", did you mean {' or '.join(near)}?" if near else ""


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
