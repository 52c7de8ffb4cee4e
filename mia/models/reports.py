"""What `mia models` reports: the names there are, a download, a conversion, copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import UsageError
from mia.models import registry
from mia.notices import notice
from mia.progress import progress_is_shown
from mia.show.report import Report
from mia.show.text import visible

if TYPE_CHECKING:
    from mia.models.copies import Copy


@dataclass(frozen=True, eq=False)
class Models(Report):
    """Models that have a name: {name, present, path, bytes, source, problem} each."""

    models: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        return {"models": self.models}

    def rows(self) -> list[dict[str, Any]]:
        return self.models

    def plain(self) -> str:
        lines = []
        for m in self.models:
            size = f"{m['bytes'] / 1e6:8.0f} MB" if m["bytes"] else " " * 11
            where = m["path"] if m["present"] else m["problem"]
            lines.append(f"{visible(m['name']):<20s} {size}  {visible(where)}")
        return "\n".join(lines)


def models() -> Models:
    """Every model that has a name, and whether its file is there.

    Raises `ModelError` if a models.toml is wrong."""
    return Models(
        [
            {
                "name": s.spec.name,
                "present": s.present,
                "path": None if s.path is None else str(s.path),
                "bytes": s.size,
                "source": s.spec.source,
                "problem": s.problem,
            }
            for s in registry.list_models()
        ]
    )


@dataclass(frozen=True, eq=False)
class Download(Report):
    """A model that was downloaded, and its file."""

    name: str
    path: Path

    def document(self) -> dict[str, Any]:
        return {"name": self.name, "path": str(self.path)}

    def rows(self) -> list[dict[str, Any]]:
        return [self.document()]

    def plain(self) -> str:
        return str(self.path)


def pull(name: str) -> Download:
    """Downloads a model of models.toml. Raises `ModelError` (`registry.pull`)."""
    return Download(name, registry.pull(name, progress=progress_is_shown()))


@dataclass(frozen=True, eq=False)
class Copies(Report):
    """Copies of models in another type (`mia.models.copies`).

    Attributes:
        folder: where they are; limit: bytes that all of them may have.
        copies: those that there are, last used first.
        removed: those that were removed.
    """

    folder: Path
    limit: int
    copies: list[Copy]
    removed: list[Copy]

    def document(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "limit": self.limit,
            "bytes": sum(c.bytes for c in self.copies),
            "copies": self.rows(),
            "removed": [_row(c) for c in self.removed],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [_row(c) for c in self.copies]

    def plain(self) -> str:
        lines = [f"removed {_line(c)}" for c in self.removed] + [_line(c) for c in self.copies]
        total = sum(c.bytes for c in self.copies) / 1e9
        lines.append(f"{total:.1f} of {self.limit / 1e9:.0f} GB in {visible(str(self.folder))}")
        return "\n".join(lines)


def _row(copy: Copy) -> dict[str, Any]:
    return {
        "name": copy.name,
        "source": str(copy.source),
        "type": copy.type,
        "bytes": copy.bytes,
        "used": _time(copy),
        "current": copy.current,
        "open": copy.is_open,
        "path": str(copy.path),
    }


def _time(copy: Copy) -> str:
    return datetime.fromtimestamp(copy.used).isoformat(" ", "minutes")


def _line(copy: Copy) -> str:
    state = "open" if copy.is_open else "" if copy.current else "of another file or llama.cpp"
    text = (
        f"{copy.name:<20s} {copy.type:<4s} {copy.bytes / 1e6:8.0f} MB  {_time(copy)}  {copy.source}"
    )
    return visible(f"{text}  ({state})" if state else text)


def copies(*, remove: Sequence[str] = (), clear: bool = False) -> Copies:
    """The copies of models in another type, last used first. What is open is not removed; a notice
    says so.

    Args:
        remove: models, by their name or file, whose copies are removed first.
        clear: remove all of them.

    Raises:
        UsageError: there is no copy of a model.
    """
    from mia.models import copies as cache

    kept = cache.copies()
    chosen = kept if clear else []
    for model in remove:
        file = Path(model).resolve()
        of_model = [c for c in kept if model == c.name or file == c.source.resolve()]
        if not of_model:
            names = ", ".join(dict.fromkeys(c.name for c in kept)) or "there is none"
            raise UsageError(f"there is no copy of {model!r}; copies: {names}")
        chosen = chosen + [c for c in of_model if c not in chosen]
    removed = [c for c in chosen if cache.remove(c)]
    if clear:
        cache.forget()
    for copy in chosen:
        if copy not in removed:
            notice(f"the copy of {copy.name} as {copy.type} is open, and stays")
    folder, limit = cache.copies_folder(), cache.limit()
    return Copies(folder, limit, cache.copies() if removed else kept, removed)


@dataclass(frozen=True, eq=False)
class Conversion(Report):
    """A model that was written with its weights in another type.

    Attributes:
        bytes: the size of the file.
    """

    file: str
    kind: str
    bytes: int

    def document(self) -> dict[str, Any]:
        return {"file": self.file, "type": self.kind, "bytes": self.bytes}

    def rows(self) -> list[dict[str, Any]]:
        return [self.document()]

    def plain(self) -> str:
        return f"{visible(self.file)}  {self.bytes / 1e6:.0f} MB"


def convert(source: str, kind: str, file: str) -> Conversion:
    """Writes a model with its weights in another type, by llama.cpp's quantizer.

    Args:
        source: a .gguf file, or a name.
        kind: f32, f16, bf16, q8_0, q6_k, q4_k_m, q4_1 or q4_0. f32 is lossless.
        file: the .gguf file to write.

    Raises:
        UsageError: an unknown type, a file that does not end in .gguf, or the model itself.
        ModelError, FileError, EngineError: it cannot be read, written or converted.
    """
    from mia.io.files import check_writable, write_whole
    from mia.llama import FILE_TYPES, convert_file
    from mia.llama.c_numbers import processors

    if not file.lower().endswith(".gguf"):
        raise UsageError(f"{file}: the file's name must end in .gguf")
    if kind not in FILE_TYPES:
        raise UsageError(f"unknown type {kind!r}; known: {', '.join(FILE_TYPES)}")
    path = registry.resolve(source).path
    assert path is not None
    registry.check_gguf(path)
    target = check_writable(file)
    if target.exists() and target.samefile(path):
        raise UsageError(f"{file} is the model itself; give another name")
    write_whole(target, lambda p: convert_file(path, p, kind, processors()))
    return Conversion(file, kind, target.stat().st_size)
