"""The vectors that clients can name: those of one folder, and those that were uploaded."""

from __future__ import annotations

import re
import tempfile
import threading
from pathlib import Path
from typing import Any

from mia.errors import FileError, MiaError
from mia.serve.fields import Refused
from mia.serve.limits import Limits
from mia.values import shown
from mia.vectors import Vector
from mia.vectors.expression import combine
from mia.vectors.vector import load

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_SUFFIXES = (".gguf", ".safetensors")


class Vectors:
    """Vectors by name. No name is ever made a path: the folder is listed, and names are looked up."""

    def __init__(self, folder: str | Path | None, limits: Limits):
        self._limits = limits
        self._files: dict[str, Path] = {}
        self._loaded: dict[str, Vector] = {}
        self._uploaded: dict[str, Vector] = {}
        #: of those that change what there is, from several threads
        self._lock = threading.Lock()
        #: grows whenever a name may mean another vector
        self.version = 0
        if folder is not None:
            folder = Path(folder)
            if not folder.is_dir():
                raise FileError(f"{folder} is no folder of vectors")
            for path in sorted(folder.iterdir()):
                if path.suffix in _SUFFIXES and _NAME.fullmatch(path.stem) and path.is_file():
                    self._files.setdefault(path.stem, path)

    @property
    def names(self) -> list[str]:
        return sorted({*self._files, *list(self._uploaded)})

    def file_name(self, name: str) -> str:
        """What a vector's file is called; of an uploaded one, what it may be called."""
        file = None if name in self._uploaded else self._files.get(name)
        return f"{name}.safetensors" if file is None else file.name

    def get(self, name: str) -> Vector:
        """Raises `Refused` for a name that there is not."""
        if (uploaded := self._uploaded.get(name)) is not None:
            return uploaded
        if name not in self._files:
            known = ", ".join(self.names[:20]) or "none"
            raise Refused(f"there is no vector {shown(name)}; there are: {known}", param="vector")
        if name not in self._loaded:
            self._loaded[name] = load(self._files[name]).renamed(name)
        return self._loaded[name]

    def read(self, expression: str) -> Vector:
        """A name, or arithmetic with names: "french - 0.5*formal"."""
        if len(expression) > self._limits.expression:
            raise Refused(
                f"arithmetic of {len(expression)} letters; {self._limits.expression} are the most",
                param="vector",
            )
        if _NAME.fullmatch(expression):
            return self.get(expression)
        return combine(expression, self.get)

    def add(self, name: Any, vector: Vector) -> None:
        """Keeps an uploaded vector in memory, under a name that no file has."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Refused(
                f"a vector's name is a letter and up to 63 letters, digits or _, not {shown(name)}",
                param="name",
            )
        if name in self._files:
            raise Refused(f"{name} is a file of the server; choose another name", param="name")
        with self._lock:
            others = [v for n, v in self._uploaded.items() if n != name]
            if len(others) >= self._limits.vectors:
                raise Refused(
                    f"there are {len(others)} uploaded vectors, which are the most; delete one"
                )
            size = sum(d.nbytes for v in (*others, vector) for d in v.directions.values())
            if size > self._limits.vector_bytes:
                raise Refused(
                    f"uploaded vectors may take {self._limits.vector_bytes} bytes together"
                )
            self._uploaded[name] = vector.renamed(name)
            self.version += 1

    def remove(self, name: str) -> None:
        with self._lock:
            if self._uploaded.pop(name, None) is None:
                raise Refused(
                    f"there is no uploaded vector {shown(name)}", status=404, param="name"
                )
            self.version += 1

    def parse(self, data: bytes) -> Vector:
        """The vector of a .safetensors file. Raises `Refused`."""
        with tempfile.TemporaryDirectory(prefix="mia-") as folder:
            path = Path(folder) / "uploaded.safetensors"
            path.write_bytes(data)
            try:
                return load(path)
            except MiaError as err:
                raise Refused(str(err).replace(str(path), "the upload")) from None

    def document(self) -> list[dict[str, Any]]:
        rows = []
        for name in self.names:
            try:
                v = self.get(name)
            except MiaError:
                continue  # a file of the folder that is no vector
            uploaded = name in self._uploaded
            rows.append(
                {
                    "name": name,
                    "site": v.site,
                    "layers": v.layers,
                    "width": v.width,
                    "uploaded": uploaded,
                    "file": None if uploaded else self._files[name].name,
                    "norms": {str(i): round(x, 6) for i, x in v.norms.items()},
                }
            )
        return rows
