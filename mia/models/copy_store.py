"""Where copies of models lie (`mia.models.copies`): what is known of each, room for new ones, and locks.

    KEY.gguf    the copy
    KEY.json    what it is a copy of; its time of change is when the copy was last opened.
                Without a .gguf beside it: why there is none of this type.

KEY stands for the model's file (path, size and times of change of each part), the type, and the version
of llama.cpp. Nothing of a model's size is hashed.

The cache may have a tenth of its disk, and 20 GB on a small one. The least recently used copies make room
for a new one. A copy that is open, in any process, is locked (flock) and stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage
from typing import Any

from mia.errors import FileError
from mia.io import files
from mia.llama.gguf_file import split_parts
from mia.progress import step

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

#: what may fill the cache: a part of its disk, and bytes that it may have in any case
_SHARE, _LEAST_LIMIT = 0.1, 20 * 10**9
#: bytes that stay free on the disk
RESERVE = 10**8
#: of the keys: another version of these rules makes copies anew
_VERSION = 1


@dataclass(frozen=True)
class Record:
    """What KEY.json says.

    Attributes:
        name, source: of the model.
        type: of the copy, f16, bf16 or f32.
        rounded: the types of the model's tensors that lost digits.
        left: other types, of matrices that llama.cpp's quantizer leaves as they are.
        bytes, mtime_ns: of the .gguf; another file is not the copy.
        refused: why there is no copy of this type, "" if there is one.
    """

    name: str
    source: str
    type: str
    rounded: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    bytes: int = 0
    mtime_ns: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Copy:
    """A copy of a model in the cache.

    Attributes:
        name, source: of the model, when the copy was made.
        type: of the weights.
        path, bytes: of the copy.
        used: when it was last opened, in seconds since 1970.
        current: whether the model's file and llama.cpp are still those that it was made of and by;
            another copy would be made otherwise.
        is_open: whether a process has it open now.
    """

    name: str
    source: Path
    type: str
    path: Path
    bytes: int
    used: float
    current: bool
    is_open: bool


class Hold:
    """An open copy, which nobody removes until this is closed or dropped."""

    def __init__(self, file: int):
        self._files = [file]
        weakref.finalize(self, _close, self._files)

    def close(self) -> None:
        _close(self._files)


def limit() -> int:
    """Bytes that all copies together may have."""
    return max(_LEAST_LIMIT, int(_SHARE * disk_of(copies_folder()).total))


def has_room(needed: int) -> bool:
    """Whether a copy of so many bytes would fit into the cache, with as much again left on the disk."""
    with contextlib.suppress(OSError):
        return needed <= limit() and 2 * needed + RESERVE <= disk_of(copies_folder()).free
    return False


def copies() -> list[Copy]:
    """The copies that there are, last used first."""
    folder = copies_folder()
    with contextlib.suppress(OSError):
        files.sweep(folder)
    found = []
    for key, record in _records(folder):
        path = folder / f"{key}.gguf"
        with contextlib.suppress(OSError):
            source, used = Path(record.source), path.with_suffix(".json").stat().st_mtime
            size, is_open, current = path.stat().st_size, _is_locked(path), False
            with contextlib.suppress(OSError, ValueError):  # the model's file is gone
                current = key_of(source, record.type) == key
            found.append(Copy(record.name, source, record.type, path, size, used, current, is_open))
    return sorted(found, key=lambda c: -c.used)


def remove(copy: Copy) -> bool:
    """Removes a copy, unless it is open. Returns whether it did."""
    return _remove(copy.path)


def _remove(path: Path) -> bool:
    with contextlib.suppress(OSError), _opened(path) as file:
        if lock(file, exclusive=True, wait=False):
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
            return True
    return False


def forget() -> None:
    """Forgets which models do not fit into a type; each is tried again."""
    folder = copies_folder()
    for key, record in _records(folder):
        if record.refused:
            (folder / f"{key}.json").unlink(missing_ok=True)


# -- one copy -------------------------------------------------------------------------------


def copies_folder() -> Path:
    """Where the copies are."""
    return files.cache_folder() / "copies"


def key_of(source: Path, kind: str) -> str:
    """The file, the type, what converts it and what runs it. The time of the file's last change
    (ctime) is of the system and cannot be set back, as the other may be by who copies a file."""
    from mia.llama import library_info

    parts: list[Any] = [_VERSION, kind, library_info()["llama_cpp_python"], platform.machine()]
    for part in split_parts(source):
        stat = part.stat()
        parts += [part.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return hashlib.sha256(files.as_utf8("\n".join(map(str, parts))).encode()).hexdigest()[:32]


def read(path: Path) -> Record | None:
    """What a file says of a copy, None if it says nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        known = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**known)
        texts = (record.name, record.source, record.type, record.refused)
        numbers = (record.bytes, record.mtime_ns)
        lists = (record.rounded, record.left)
        if (
            all(isinstance(t, str) for t in texts)
            and all(type(n) is int for n in numbers)
            and all(isinstance(x, list) and all(isinstance(t, str) for t in x) for x in lists)
        ):
            return record
    return None


def _records(folder: Path) -> list[tuple[str, Record]]:
    paths = sorted(folder.glob("*.json"))
    return [(p.stem, record) for p in paths if (record := read(p)) is not None]


# -- room -----------------------------------------------------------------------------------


def disk_of(folder: Path) -> Any:
    """How large a folder's disk is, and what of it is free, in bytes."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return disk_usage(folder)


def make_room(folder: Path, needed: int, what: str) -> None:
    """Removes copies until there is room: such as nobody will open again first, then the least
    recently used. Raises `FileError` if that is not enough.

    What is open stays, and may keep the cache above its limit."""
    most = limit()
    if needed > most:
        raise FileError(
            f"{what} needs {needed:,} bytes, and all copies may have {most:,} on this disk; "
            "mia models convert writes one elsewhere"
        )
    for path in folder.glob("*.gguf"):
        if read(path.with_suffix(".json")) is None:  # nobody would find it
            _remove(path)
    kept = copies()
    total = sum(c.bytes for c in kept)
    for copy in sorted(kept, key=lambda c: (c.current, c.used)):
        if total + needed <= most and needed + RESERVE <= disk_of(folder).free:
            return
        if remove(copy):
            total -= copy.bytes
    free = disk_of(folder).free
    if needed + RESERVE > free:
        raise FileError(f"{folder} has {free:,} bytes free, {what} needs {needed:,}")


# -- locks ----------------------------------------------------------------------------------


def lock(file: int, *, exclusive: bool, wait: bool) -> bool:
    """Locks an open file until it is closed; False if another one has it. Where files cannot be
    locked, all is as if nobody else were there."""
    if fcntl is None:
        return True
    how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks
        pass
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        yield file
    finally:
        os.close(file)


def _is_locked(path: Path) -> bool:
    with _opened(path) as file:
        return not lock(file, exclusive=True, wait=False)


@contextlib.contextmanager
def turn(folder: Path, name: str) -> Iterator[None]:
    """One process makes a copy at a time; the system ends a turn with its process."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock(file, exclusive=True, wait=False):
            with step(
                f"waiting for another process, which makes a copy of {name} or another model"
            ):
                lock(file, exclusive=True, wait=True)
        yield
    finally:
        os.close(file)


def _close(files_: list[int]) -> None:
    while files_:
        os.close(files_.pop())
