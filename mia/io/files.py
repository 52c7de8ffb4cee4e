"""Files: read whole, and written beside and renamed, so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mia.errors import FileError


def read_utf8(path: str | Path, shown: str = "") -> str:
    """A text file, with or without the BOM that some editors write.

    Raises `FileError` naming `shown`, by default the path."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise FileError(f"cannot read {shown or path}: {reason}") from err


def read_safetensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a safetensors file by name, and its metadata.

    Raises `FileError` if there is no such file, or it is not safetensors."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except Exception as err:
        raise FileError(f"{path} is not a safetensors file: {err}") from err


def check_writable(path: str | Path) -> Path:
    """Sees before any work is done that `path` can be written. Raises `FileError`."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise FileError(f"{path} is a folder; give a file name")
    if path.exists() and not path.is_file():  # renaming would take a device's or pipe's place
        raise FileError(f"cannot write {path}: it is not a regular file")
    if not folder.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise FileError(f"cannot write {path}: permission denied")
    return path


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary name beside `path`, then renames. Raises `FileError`."""
    # a link stays, and what it leads to is written
    path = check_writable(path).resolve()
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as err:
        raise FileError(f"cannot write {path}: {err.strerror or err}") from err
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as err:
        raise FileError(f"cannot write {path}: {err.strerror or err}") from err
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, document: Any) -> None:
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    write_whole(path, lambda p: _write_text(p, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Where mia remembers things that can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "mia"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mia"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mia"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered by its path, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    store = cache_folder() / "hashes.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(store.read_text(encoding="utf-8"))
    if isinstance(known.get(key), str):
        return known[key]
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    known[key] = digest.hexdigest()
    # a cache that cannot be written is no reason to stop
    with contextlib.suppress(OSError, FileError):
        store.parent.mkdir(parents=True, exist_ok=True)
        write_json(store, dict(list(known.items())[-64:]))
    return known[key]
