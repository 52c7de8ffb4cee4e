"""The model's weights as float32, read from the file in blocks.

They are read from the file and not from llama.cpp's memory: on a GPU, and in the
repacked layouts of AMX and AVX512, what lies in memory cannot be read back. The
pages are the ones that llama.cpp has mapped already.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mia.arrays import Array
from mia.errors import ModelError
from mia.llama.gguf_file import split_parts
from mia.llama.gguf_tensors import FileTensor, dequantize, file_tensors, type_bytes


class Weights:
    """The tensors of a GGUF file, or of the parts of a split one, by name."""

    def __init__(self, path: Path):
        self._where: dict[str, tuple[Path, FileTensor]] = {}
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}
        for part in split_parts(path):
            for tensor in file_tensors(part):
                self._where[tensor.name] = (part, tensor)

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
        """Rows `start:stop` of a matrix, (stop - start, n_in) float32."""
        path, tensor = self._find(name)
        n_in = tensor.ne[0]
        row = type_bytes(tensor.type, n_in)
        source = self._mapped(path)[tensor.offset + start * row : tensor.offset + stop * row]
        return dequantize(source.ctypes.data, tensor.type, stop - start, n_in)

    def _mapped(self, path: Path) -> npt.NDArray[np.uint8]:
        """A part's bytes, mapped once: if the file is replaced later, these stay the old ones."""
        if path not in self._maps:
            self._maps[path] = np.asarray(np.memmap(path, np.uint8, mode="r"))
        return self._maps[path]

    def _find(self, name: str) -> tuple[Path, FileTensor]:
        try:
            return self._where[name]
        except KeyError:
            raise ModelError(f"the model has no tensor {name!r}") from None
