"""LoRA adapters: small matrices that llama.cpp adds to a model's products while it runs.

Hu et al. 2021 (arXiv 2106.09685): W x becomes W x + s·B(A x). A GGUF file of one has, for each changed
matrix NAME, `NAME.lora_a` (rank, n_in) and `NAME.lora_b` (n_out, rank). For the token embedding, whose rows
are looked up, A is (n_vocab, rank), and row t becomes W[t] + s·B A[t].

llama.cpp throws some errors of such a file and asserts others, which ends the process. `read_adapter`
checks all of it before llama.cpp sees the file.
"""

from __future__ import annotations

import ctypes as C
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.errors import ModelError
from mia.llama.c_numbers import c_path
from mia.llama.gguf_file import BLOCKS, FileTensor, read_header
from mia.llama.gguf_tensors import dequantize, type_bytes, value_kinds
from mia.llama.lifetime import Owned
from mia.llama.open_file import OpenFile

if TYPE_CHECKING:
    from mia.llama.model import LlamaModel

EMBEDDING = "token_embd.weight"
_A, _B = ".lora_a", ".lora_b"
#: of `enum gguf_type`, what llama.cpp asserts of each key that it reads
_KINDS = {"general.type": 8, "general.architecture": 8, "adapter.type": 8, "adapter.lora.alpha": 6}
#: ggml's types of whole numbers, which no product takes
_INTEGERS = range(24, 29)


@dataclass(frozen=True)
class Pair:
    """The two matrices for one tensor of the model, and the scale of the file."""

    a: FileTensor
    b: FileTensor
    factor: float  # alpha / rank, 1 if the file has no alpha


class AdapterFile:
    """An adapter's file, checked against a model, and how much of it is added.

    Attributes:
        path, scale: as they were given.
        pairs: its matrices, by the name of the model's tensor.
    """

    def __init__(self, path: Path, scale: float, file: OpenFile, pairs: Mapping[str, Pair]):
        self.path, self.scale, self.file, self.pairs = path, scale, file, dict(pairs)
        self._last: tuple[str, tuple[Array, Array]] | None = None

    def sha256(self) -> str:
        return self.file.sha256()

    def matrices(self, name: str) -> tuple[Array, Array]:
        """B, scaled, and A of a tensor: their product is what is added to it, (n_out, n_in); of
        experts each with an axis in front. Of the embedding the product is B Aᵀ's transpose."""
        last = self._last  # several threads may read at a time
        if last is None or last[0] != name:  # a large matrix is read in blocks
            pair = self.pairs[name]
            factor = np.float32(self.scale * pair.factor)
            last = self._last = name, (self._read(pair.b) * factor, self._read(pair.a))
        return last[1]

    def _read(self, t: FileTensor) -> Array:
        n_rows = math.prod(t.ne[1:])
        raw = self.file.read(0, t.offset, type_bytes(t.type, t.ne[0]) * n_rows)
        data = np.frombuffer(raw, np.uint8)
        rows = dequantize(data.ctypes.data, t.type, n_rows, t.ne[0])
        return rows.reshape(t.ne[2], t.ne[1], t.ne[0]) if t.ne[2] > 1 else rows

    def rows_added(self, name: str, start: int, stop: int) -> Array:
        """What is added to rows of a tensor, counted as `Weights.rows` does: (stop - start, n_in)."""
        b, a = self.matrices(name)
        if name == EMBEDDING:
            return np.asarray(a[start:stop] @ b.T, np.float32)
        if b.ndim == 2:
            return np.asarray(b[start:stop] @ a, np.float32)
        n_out = b.shape[1]
        parts = [
            b[e, max(start - e * n_out, 0) : stop - e * n_out] @ a[e]
            for e in range(start // n_out, -(-stop // n_out))
        ]
        return np.concatenate(parts).astype(np.float32)


def read_adapter(path: Path, scale: float, model: OpenFile, *, as_name: str) -> AdapterFile:
    """Checks an adapter's file against a model's.

    Args:
        model: the file that is run.
        as_name: what errors call the model.

    Raises:
        ModelError: it is damaged, no LoRA adapter, or none of this model.
    """
    file = OpenFile(path)
    try:
        with path.open("rb") as f:
            header = read_header(f.fileno(), path)
        with model.path.open("rb") as f:
            own = read_header(f.fileno(), model.path).values.get("general.architecture", b"")
    except OSError as err:
        raise ModelError(f"{path} cannot be read: {err.strerror or err}") from err
    _check_values(path, header.values, own, as_name)
    tensors = {t.name: t for _, t in model.tensors()}
    pairs = _pairs(path, header.tensors, _alpha(path, header.values))
    tied = "output.weight" not in tensors
    for name, pair in pairs.items():
        _check_pair(path, name, pair, tensors.get(name), as_name, tied=tied)
    return AdapterFile(path, scale, file, pairs)


def _check_values(path: Path, values: Mapping[str, Any], own: bytes, model: str) -> None:
    kinds = value_kinds(path)
    for key, kind in _KINDS.items():
        if kinds.get(key, kind) != kind:
            raise ModelError(f"{path} is damaged: its {key} is of another type")
    for key, needed in (("general.type", b"adapter"), ("adapter.type", b"lora")):
        if values.get(key) != needed:
            got = values.get(key, b"missing").decode(errors="replace")
            raise ModelError(f"{path} is no LoRA adapter: its {key} is {got!r}")
    if values.get("general.architecture") != own:
        other = values.get("general.architecture", b"").decode(errors="replace")
        raise ModelError(
            f"{path} is an adapter for {other or 'no'} models, and {model} is a {own.decode(errors='replace')}"
        )
    if "adapter.alora.invocation_tokens" in values:
        raise ModelError(
            f"{path} is an activated LoRA, which acts behind certain tokens only; mia would add it "
            "at all of them"
        )


def _alpha(path: Path, values: Mapping[str, Any]) -> float:
    alpha = float(values.get("adapter.lora.alpha", 0.0))
    if not math.isfinite(alpha):
        raise ModelError(f"{path} is damaged: its adapter.lora.alpha is {alpha}")
    return alpha


def _pairs(path: Path, tensors: Sequence[FileTensor], alpha: float) -> dict[str, Pair]:
    by_name = {t.name: t for t in tensors}
    names: dict[str, None] = {}
    for name in by_name:
        if name.endswith((_A, _B)):
            names[name[: -len(_A)]] = None
        elif not name.endswith("_norm.weight"):  # llama.cpp leaves those out
            raise ModelError(f"{path} is no LoRA adapter: it has a tensor {name}")
    if not names:
        raise ModelError(f"{path} is no LoRA adapter: it has no tensors")
    out = {}
    for name in names:
        a, b = by_name.get(name + _A), by_name.get(name + _B)
        if a is None or b is None:
            raise ModelError(f"{path} is damaged: {name}{_B if a else _A} is missing")
        rank = b.ne[0]
        out[name] = Pair(a, b, alpha / rank if alpha and rank else 1.0)
    return out


def _check_pair(
    path: Path, name: str, pair: Pair, tensor: FileTensor | None, model: str, *, tied: bool
) -> None:
    if tensor is None:
        raise ModelError(f"{path} is an adapter of another model: {model} has no tensor {name}")
    for t in (pair.a, pair.b):
        if t.type not in BLOCKS or t.type in _INTEGERS:
            raise ModelError(f"{path}: {t.name} is of a type that no product takes: {t.type}")
        if min(t.ne) < 1 or t.ne[0] % BLOCKS[t.type][0]:
            raise ModelError(f"{path} is damaged: {t.name} has the shape {_shape(t)}")
    a, b, w = pair.a.ne, pair.b.ne, tensor.ne
    if name == EMBEDDING:
        if tied:
            raise ModelError(
                f"{path} changes {name}, which {model} uses as its unembedding as well: llama.cpp "
                "cannot add an adapter to both"
            )
        fits = (a[1], b[1], a[0], a[2:], b[2:]) == (w[1], w[0], b[0], w[2:], w[2:])
    else:
        fits = (a[0], b[1], a[1], a[2:], b[2:]) == (w[0], w[1], b[0], w[2:], w[2:])
    if not fits:
        raise ModelError(
            f"{path} is an adapter of another model: for {name} of {_shape(tensor)} it has "
            f"{_shape(pair.a)} and {_shape(pair.b)}"
        )


def _shape(t: FileTensor) -> str:
    return " x ".join(map(str, reversed(t.ne[: 3 if t.ne[2] > 1 else 2])))


# -- in llama.cpp --------------------------------------------------------------------------


class Adapter:
    """An adapter that llama.cpp has loaded, freed before its model."""

    def __init__(self, model: LlamaModel, file: AdapterFile):
        """Raises `ModelError` if llama.cpp refuses it."""
        lib, L = model.lib, model.lib.L
        self.file = file
        self.owned: Owned | None = lib.call(
            L.llama_adapter_lora_init,
            model.handle,
            c_path(file.path),
            wrap=lambda p: Owned(lib, p, L.llama_adapter_lora_free, model.owned) if p else None,
        )
        if self.owned is None:
            raise ModelError(f"llama.cpp cannot use {file.path}: {lib.last_error()}")
        file.file.check_name()


def set_adapters(lib: Any, context: Any, adapters: Sequence[Adapter]) -> None:
    """Makes a context add exactly these adapters."""
    used = [a for a in adapters if a.owned is not None]
    n = len(used)
    handles = (C.c_void_p * max(n, 1))()
    scales = (C.c_float * max(n, 1))()
    for i, a in enumerate(used):
        assert a.owned is not None
        handles[i] = C.cast(a.owned.get("adapter"), C.c_void_p).value
        scales[i] = a.file.scale
    pointer = C.cast(handles, C.POINTER(C.POINTER(C.c_void_p)))
    lib.call(lib.L.llama_set_adapters_lora, context, pointer, n, scales)
