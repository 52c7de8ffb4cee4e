"""A model's file held open: what was opened is what is read, whatever happens to its name.

llama.cpp maps the file, mia reads weights and the hash from it. If another file takes its name in
between, all of them must still speak of the one that was opened; if the file itself is changed or
cut short, llama.cpp would compute with the new bytes, or the process would die of SIGBUS.

No ctypes and no numpy.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from mia.errors import ModelError
from mia.io.files import read_at
from mia.llama.gguf_file import FileTensor, read_header, split_parts


class OpenFile:
    """A GGUF file, or all parts of a split one, open for reading until it is closed or dropped.

    After `close()` it opens its file again when asked for something, if that is still the same one.

    Attributes:
        path: the file, or the first part.
    """

    def __init__(self, path: Path):
        """Raises `ModelError` if a part cannot be opened."""
        self.path, self._parts = path, split_parts(path)
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        self._open()
        self._stats = [os.fstat(file) for file in self._files]
        #: what `check` compares, made once as it is called for every decode
        self._expected = [(s.st_size, s.st_mtime_ns) for s in self._stats]

    def __reduce__(self) -> tuple[type[OpenFile], tuple[Path]]:
        return OpenFile, (self.path,)  # a descriptor is of this process

    def _open(self) -> None:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        for part in self._parts:
            try:
                self._files.append(os.open(part, flags))
            except (OSError, ValueError) as err:
                _close(self._files)
                reason = getattr(err, "strerror", None) or err
                raise ModelError(f"{part} cannot be read: {reason}") from err

    def close(self) -> None:
        _close(self._files)

    @property
    def stat(self) -> os.stat_result:
        """What the system said of the file, of its first part, when it was opened."""
        return self._stats[0]

    def check(self) -> None:
        """Raises `ModelError` if the file was changed or cut short since it was first opened.

        That takes a microsecond. It leaves the moment between the check and the reading.
        """
        if not self._files:
            self._open()
            for part, file, known in zip(self._parts, self._files, self._stats, strict=True):
                if not os.path.samestat(os.fstat(file), known):
                    self.close()
                    raise ModelError(
                        f"{part} was replaced since it was opened; open the model again"
                    )
        for i, file in enumerate(self._files):
            stat = os.fstat(file)
            if (stat.st_size, stat.st_mtime_ns) != self._expected[i]:
                path, size = self._parts[i], self._expected[i][0]
                how = "cut short" if stat.st_size < size else "changed"
                raise ModelError(f"{path} was {how} while it was open; open the model again")

    def check_name(self) -> None:
        """Raises `ModelError` if another file has the name now: that one may have been loaded."""
        for part, known in zip(self._parts, self._stats, strict=True):
            try:
                same = os.path.samestat(part.stat(), known)
            except OSError:
                same = False
            if not same:
                raise ModelError(f"{part} was replaced while it was being opened; try again")
        self.check()

    def tensors(self) -> list[tuple[int, FileTensor]]:
        """Each tensor, and the index of its part."""
        self.check()
        return [
            (i, tensor)
            for i, (file, part) in enumerate(zip(self._files, self._parts, strict=True))
            for tensor in read_header(file, part).tensors
        ]

    def read(self, part: int, start: int, n: int) -> bytes:
        """Bytes of a part from `start`: n, or up to its end. They are read and not mapped: pages that are
        mapped twice count twice in a process's memory."""
        self.check()
        data = read_at(self._files[part], start, n)
        while 0 < len(data) < n and (
            more := read_at(self._files[part], start + len(data), n - len(data))
        ):
            data += more  # the system reads 2 GB at a time
        return data

    def sha256(self) -> str:
        """SHA-256 of the file (of the first part), remembered as `mia.io.files.file_sha256` does."""
        from mia.io.files import open_file_sha256

        was_open = bool(self._files)
        self.check()
        try:
            return open_file_sha256(self._files[0], self._stats[0], self.path)
        finally:
            if not was_open:
                self.close()


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())
