"""The model's weights as float32, read from the file in blocks.

They are read from the file and not from llama.cpp's memory: on a GPU, and in the
repacked layouts of AMX and AVX512, what lies in memory cannot be read back. The
system has the file in its cache already, as llama.cpp has mapped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array
from mia.errors import ModelError, RangeError
from mia.llama.gguf_file import BLOCKS, FileTensor
from mia.llama.gguf_tensors import dequantize, type_bytes
from mia.llama.open_file import OpenFile

if TYPE_CHECKING:
    from mia.llama.adapter import AdapterFile


class Weights:
    """The tensors of a GGUF file, or of the parts of a split one, by name."""

    def __init__(self, file: Path | OpenFile, adapters: Sequence[AdapterFile] = ()):
        """`adapters`: their products are added to the rows that are read.

        Raises `ModelError` if the file cannot be read."""
        self._file = file if isinstance(file, OpenFile) else OpenFile(file)
        self._adapters = tuple(a for a in adapters if a.scale)
        #: name -> its part, and where in it
        self._where = {t.name: (part, t) for part, t in self._file.tensors()}

    @property
    def file(self) -> OpenFile:
        """The file that they are read from."""
        return self._file

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Numpy's order: a matrix is (n_out, n_in). Raises `ModelError` if there is none."""
        ne = list(self._find(name)[1].ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        return tuple(reversed(ne))

    def vector(self, name: str) -> Array:
        """A norm weight or a bias: (width,)."""
        return self.rows(name, 0, 1)[0]

    def matrix(self, name: str) -> Array:
        """A whole matrix (n_out, n_in); for the vocabulary's use `rows` in blocks."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start:stop` of a matrix, (stop - start, n_in) float32.

        Raises `RangeError` if it does not have them, `ModelError` if the file was changed."""
        part, tensor = self._find(name)
        n_in, n_rows = tensor.ne[0], prod(tensor.ne[1:])
        if not 0 <= start <= stop <= n_rows:
            raise RangeError(f"rows {start} to {stop} are not in {name}, which has {n_rows}")
        if tensor.type not in BLOCKS:
            raise ModelError(f"{name} is of a type that mia does not know: {tensor.type}")
        row = type_bytes(tensor.type, n_in)
        source = self._file.read(part, tensor.offset + start * row, (stop - start) * row)
        if len(source) < (stop - start) * row:
            raise ModelError(f"{name} does not lie within the file")
        data = np.frombuffer(source, np.uint8)
        rows = dequantize(data.ctypes.data, tensor.type, stop - start, n_in)
        for adapter in self._adapters:
            if name in adapter.pairs:
                rows += adapter.rows_added(name, start, stop)
        return rows

    def _find(self, name: str) -> tuple[int, FileTensor]:
        try:
            return self._where[name]
        except KeyError:
            raise ModelError(f"the model has no tensor {name!r}") from None
