"""What `mia models` reports: the names there are, a download, a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mia.errors import UsageError
from mia.models import registry
from mia.progress import progress_is_shown
from mia.show.report import Report
from mia.show.text import visible


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
