"""Files: read whole, and written beside and renamed, so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import secrets
import stat
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import FileError
from mia.io.kinds import described, kinds_of
from mia.io.runs import reading, writes_nothing
from mia.show.streams import MAX_TEXT
from mia.show.text import as_json

if TYPE_CHECKING:
    import numpy.typing as npt

    from mia.arrays import Array


#: numpy's kinds of numbers that become float32
_REAL = "fiub"


def existing_file(path: str | Path) -> Path:
    """`path`, if it is a regular file. Raises `FileError` that says what it is instead."""
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as err:
        raise FileError(f"there is no file {path}") from err
    except (OSError, ValueError) as err:
        raise FileError(f"cannot read {path}: {_reason(err)}") from err
    if stat.S_ISDIR(mode):
        raise FileError(f"{path} is a folder; give a file")
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is not a regular file")
    return Path(path)


def read_utf8(path: str | Path, shown: str = "") -> str:
    """A text file, with or without the BOM that some editors write.

    Raises `FileError` naming `shown`, by default the path."""
    reading(path)
    try:
        with Path(path).open("rb") as f:  # of a device or a pipe there is no end
            data = f.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise FileError(
                f"cannot read {shown or path}: it has more than {MAX_TEXT} bytes of text"
            )
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as err:
        reason = _reason(err)
        if isinstance(err, UnicodeDecodeError) and (kinds := kinds_of(path)):
            reason = f"it is {described(kinds)}, not a text"
        raise FileError(f"cannot read {shown or path}: {reason}") from err


def read_safetensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a safetensors file by name, and its metadata.

    Raises `FileError` if there is no such file, or it is not safetensors of real numbers."""
    from safetensors import safe_open

    reading(path)
    existing_file(path)
    try:
        with safe_open(path, framework="numpy") as f:
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            metadata = dict(f.metadata() or {})
    except Exception as err:  # its errors share no base
        raise FileError(f"{path} is not a safetensors file: {_reason(err)}") from err
    for name, array in arrays.items():
        if array.dtype.kind not in _REAL:
            raise FileError(f"{path}: {name} has numbers of type {array.dtype}, which are not real")
    return arrays, metadata


def read_npy(path: str | Path) -> Array:
    """The array of a .npy as float32, whatever real numbers it has; what is too large for them
    is infinite.

    Raises `FileError` if there is no such file, or none of numbers that are real."""
    import numpy as np

    reading(path)
    existing_file(path)
    try:
        # numpy itself would read a zip or a pickle too, and believe a header that asks for more
        # than the file has
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a header of Python 2 is slow to read
            stored = np.lib.format.open_memmap(path, mode="r")
        if stored.dtype.kind not in _REAL:
            raise FileError(f"{path} has numbers of type {stored.dtype}, which are not real")
        with np.errstate(over="ignore", invalid="ignore"):  # the reader refuses them
            return np.array(stored, np.float32)
    except FileError:
        raise
    except Exception as err:  # numpy reads the header as Python, and lets all that can go wrong out
        raise FileError(f"{path} is not a .npy array: {_reason(err)}") from err


def check_writable(path: str | Path) -> Path:
    """Sees before any work is done that `path` can be written. Raises `FileError`."""
    path = Path(path)
    if writes_nothing():
        return path
    try:
        reason = _not_writable(path)
    except (OSError, ValueError) as err:  # a name that is too long, a null byte
        reason = _reason(err)
    if reason:
        raise FileError(f"cannot write {path}: {reason}")
    return path


def _not_writable(path: Path) -> str:
    folder, mode = path.parent, 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "it is a folder; give a file name"
    if mode and not stat.S_ISREG(mode):  # renaming would take a device's or pipe's place
        return "it is not a regular file"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if not os.access(folder, os.W_OK) or (mode and not os.access(path, os.W_OK)):
        return "permission denied"
    return ""


def write_whole(path: str | Path, write: Callable[[Path], None], *, own: bool = False) -> None:
    """Calls `write` with a temporary name beside `path`, then renames. Raises `FileError`.

    Whatever `write` raises, nothing is left behind. What a killed process has left in the same
    folder is removed (see `sweep`). A replay writes no file but what is mia's `own`: what it
    remembers.
    """
    if writes_nothing() and not own:
        return
    # a link stays, and what it leads to is written
    path = check_writable(path).resolve()
    sweep(path.parent)
    temporary = path.with_name(_temporary_name())
    try:
        temporary.touch(exist_ok=False)
        write(temporary)
        temporary.replace(path)
    except OSError as err:
        raise FileError(f"cannot write {path}: {_reason(err)}") from err
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


#: the names of temporary files: the machine, the process, and something at random
_TEMPORARY = re.compile(r"\.mia-(\w+)-(\d+)-[0-9a-f]{8}\.tmp")
#: a temporary file is left alone this long after its last change, in seconds
_GRACE, _GRACE_UNKNOWN = 60.0, 86_400.0
_swept: set[Path] = set()


def _temporary_name() -> str:
    return f".mia-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@cache
def _machine() -> str:
    """Tells machines apart that share a folder: a process number says nothing about another's."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def sweep(folder: Path) -> None:
    """Removes temporary files that killed processes of mia have left in a folder.

    Those of living processes and of other machines stay. A folder is looked at once in a process.
    """
    if folder in _swept:
        return
    _swept.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and match[1] == _machine():
                with contextlib.suppress(OSError):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    if age > _grace(int(match[2])):
                        Path(entry.path).unlink()


def _grace(pid: int) -> float:
    """How old a temporary file of a process must be to be swept."""
    if sys.platform == "win32":  # where os.kill ends the process that it asks about
        return _GRACE_UNKNOWN
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return _GRACE
    except (OSError, OverflowError):
        pass
    return float("inf")


def write_bytes(path: str | Path, data: bytes | memoryview, *, own: bool = False) -> None:
    """Writes a file, whole or not at all. Raises `FileError`."""
    write_whole(path, lambda p: _write(p, data), own=own)


def write_safetensors(
    path: str | Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Writes arrays as float32, whole or not at all. Raises `FileError`."""
    import numpy as np
    from safetensors.numpy import save_file

    ready = {k: np.ascontiguousarray(a, np.float32) for k, a in arrays.items()}
    facts = {as_utf8(k): as_utf8(v) for k, v in metadata.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata=facts)
        except Exception as err:  # SafetensorError is no OSError, also where the disk is full
            raise FileError(f"cannot write {path}: {_reason(err)}") from err

    write_whole(path, write)


def write_npy(path: str | Path, array: Array) -> None:
    """Writes one bare array, whole or not at all. Raises `FileError`."""
    import numpy as np

    # np.save to a file would add a suffix to a bare name, and not say that a disk is full
    held = io.BytesIO()
    np.save(held, array)
    write_bytes(path, held.getbuffer())


def write_json(path: str | Path, document: Any, *, own: bool = False) -> None:
    """Writes a JSON document, whole or not at all. Raises `FileError`."""
    write_bytes(path, (as_json(document, indent=1) + "\n").encode(), own=own)


def as_utf8(text: str) -> str:
    """A text that UTF-8 can write: lone surrogates, as of a path with other bytes, spelled out."""
    return text.encode(errors="backslashreplace").decode()


def _write(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as f:
        f.write(data)


def _reason(err: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(err, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {err.object[err.start]:#04x} at {err.start})"
    if isinstance(err, UnicodeEncodeError):
        return "its name has characters that no file name can have"
    text = getattr(err, "strerror", None) or str(err) or type(err).__name__
    return str(text).splitlines()[0]


def cache_folder() -> Path:
    """Where mia remembers things that can be made again. It may be impossible to make."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home: nothing is remembered
        home = Path(os.devnull)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home)) / "mia"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mia"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "mia"


def remember(path: Path, document: Any, *, keep: int) -> None:
    """Writes what can be made again into a folder of the cache, of which the `keep` newest files stay.
    Where nothing can be written, nothing is remembered."""
    with contextlib.suppress(OSError, FileError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document, own=True)
        for old in sorted(path.parent.glob("*.json"), key=lambda p: p.stat().st_mtime)[:-keep]:
            old.unlink(missing_ok=True)


def read_at(file: int, pos: int, n: int) -> bytes:
    """Up to `n` bytes of an open file from `pos`."""
    if hasattr(os, "pread"):
        return os.pread(file, n, pos)
    os.lseek(file, pos, os.SEEK_SET)  # Windows
    return os.read(file, n)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered by its path, size and time of change. Raises `FileError`."""
    existing_file(path)
    try:
        with path.open("rb") as f:
            return open_file_sha256(f.fileno(), os.fstat(f.fileno()), path)
    except OSError as err:
        raise FileError(f"cannot read {path}: {_reason(err)}") from err


def open_file_sha256(file: int, status: os.stat_result, path: Path) -> str:
    """SHA-256 of an open file.

    Args:
        file: its descriptor.
        status: of the file when it was opened.
        path: its name then.
    """
    import hashlib

    key = as_utf8(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
    store = cache_folder() / "hashes.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        remembered = json.loads(store.read_text(encoding="utf-8"))
        known = remembered if isinstance(remembered, dict) else {}
    if isinstance(known.get(key), str):
        return known[key]
    digest, pos = hashlib.sha256(), 0
    while block := read_at(file, pos, 1 << 20):
        digest.update(block)
        pos += len(block)
    known[key] = digest.hexdigest()
    # a cache that cannot be written is no reason to stop
    with contextlib.suppress(OSError, FileError):
        store.parent.mkdir(parents=True, exist_ok=True)
        write_json(store, dict(list(known.items())[-64:]), own=True)
    return known[key]
