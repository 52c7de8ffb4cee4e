"""The tensors of two GGUF files side by side: types, sizes, which are the same to the bit, and how far
the weights of the others are apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.llama import type_bytes, type_name
from mia.llama.gguf_file import BLOCKS, FileTensor
from mia.llama.open_file import OpenFile
from mia.llama.weights import Weights
from mia.show.text import rounded

if TYPE_CHECKING:
    from mia.progress import Progress

#: bytes of both files together up to which tensors are read whole, to say which are the same
READ = 4 << 30
#: bytes read at a time
_BLOCK = 16 << 20
#: weights of a tensor that are compared, in whole rows spread over it
_SAMPLE = 1 << 20
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor in both files.

    Attributes:
        name, layer, role: "blk.3.attn_q.weight" is the role "attn_q.weight" of layer 3; a tensor of
            no layer has None and its whole name.
        shape: numpy's order; None where the two differ in it, or one file lacks the tensor.
        type_a, type_b: ggml's types, "" where the file lacks it.
        bytes_a, bytes_b: how long it is.
        same: whether the bytes are the same; None if that was not read.
        sha256: of the bytes, where they are the same.
        error: |B - A| / |A| of the weights, of up to a million of them; None where they are the same or
            cannot be compared.
    """

    name: str
    layer: int | None
    role: str
    shape: tuple[int, ...] | None
    type_a: str
    type_b: str
    bytes_a: int
    bytes_b: int
    same: bool | None
    sha256: str
    error: float | None

    @property
    def differs(self) -> bool:
        """In type or shape, or in its bytes where they were read."""
        return self.type_a != self.type_b or self.shape is None or self.same is False

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layer": self.layer,
            "role": self.role,
            "shape": None if self.shape is None else list(self.shape),
            "type_a": self.type_a,
            "type_b": self.type_b,
            "bytes_a": self.bytes_a,
            "bytes_b": self.bytes_b,
            "same": self.same,
            **({"sha256": self.sha256} if self.sha256 else {}),
            "error": None if self.error is None else rounded(self.error, 8),
        }


def tensor_pairs(a: Path, b: Path, *, progress: Progress | None = None) -> list[TensorPair]:
    """Every tensor of two model files, in the order of the first.

    If both files together are larger than 4 GB, their bytes are not compared: `same` is None where the
    types agree.

    Raises:
        ModelError: a file cannot be read.
    """
    files = OpenFile(a), OpenFile(b)
    try:
        return _pairs(files[0], files[1], progress)
    finally:
        for file in files:
            file.close()


def _pairs(a: OpenFile, b: OpenFile, progress: Progress | None) -> list[TensorPair]:
    tables = [{t.name: (part, t) for part, t in file.tensors()} for file in (a, b)]
    names = list(dict.fromkeys([*tables[0], *tables[1]]))
    total = sum(_n_bytes(t) for table in tables for _, t in table.values())
    weights = Weights(a), Weights(b)
    out = []
    for i, name in enumerate(names):
        where_a, where_b = (table.get(name) for table in tables)
        out.append(_pair(name, (a, b), (where_a, where_b), weights, read=total <= READ))
        if progress is not None:
            progress(i + 1, len(names))
    return out


def _pair(
    name: str,
    files: tuple[OpenFile, OpenFile],
    where: tuple[tuple[int, FileTensor] | None, tuple[int, FileTensor] | None],
    weights: tuple[Weights, Weights],
    *,
    read: bool,
) -> TensorPair:
    match = _LAYER.fullmatch(name)
    in_a, in_b = where
    a, b = (None if w is None else w[1] for w in where)
    shape, same, sha256, error = None, None, "", None
    if a is None or b is None or in_a is None or in_b is None:
        same = False
    elif a.ne == b.ne:
        shape = weights[0].shape(name)
        if a.type != b.type:
            same = False
        elif read:
            hashes = [_sha256(f, w) for f, w in zip(files, (in_a, in_b), strict=True)]
            same = hashes[0] == hashes[1]
            sha256 = hashes[0] if same else ""
        if not same and a.type in BLOCKS and b.type in BLOCKS:
            error = _error(name, weights, prod(a.ne[1:]), a.ne[0])
    return TensorPair(
        name,
        int(match[1]) if match else None,
        match[2] if match else name,
        shape,
        "" if a is None else _type(a),
        "" if b is None else _type(b),
        0 if a is None else _n_bytes(a),
        0 if b is None else _n_bytes(b),
        same,
        sha256,
        error,
    )


def _type(t: FileTensor) -> str:
    return type_name(t.type) if t.type in BLOCKS else f"type {t.type}"


def _n_bytes(t: FileTensor) -> int:
    return type_bytes(t.type, prod(t.ne)) if t.type in BLOCKS else 0


def _sha256(file: OpenFile, where: tuple[int, FileTensor]) -> str:
    part, t = where
    digest, left, start = hashlib.sha256(), _n_bytes(t), t.offset
    while left:
        data = file.read(part, start, min(_BLOCK, left))
        if not data:
            break
        digest.update(data)
        start, left = start + len(data), left - len(data)
    return digest.hexdigest()


def _error(name: str, weights: tuple[Weights, Weights], n_rows: int, n_in: int) -> float | None:
    """|B - A| / |A| over rows spread evenly."""
    n = min(n_rows, max(1, _SAMPLE // n_in))
    rows = [int((i + 0.5) * n_rows / n) for i in range(n)] if n < n_rows else []
    difference = length = 0.0
    for start, stop in _runs(rows) if rows else [(0, n_rows)]:
        a, b = (w.rows(name, start, stop).astype(np.float64) for w in weights)
        difference += float(((b - a) ** 2).sum())
        length += float((a**2).sum())
    return float(np.sqrt(difference / length)) if length else None


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive rows together, as (start, stop)."""
    out: list[tuple[int, int]] = []
    for r in rows:
        if out and out[-1][1] == r:
            out[-1] = (out[-1][0], r + 1)
        else:
            out.append((r, r + 1))
    return out
