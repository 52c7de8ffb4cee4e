"""Vectors: one direction per layer, as values.

Files: llama.cpp's control-vector GGUF (`direction.N` float32 `(n_embd,)` is added at
the end of block N; llama.cpp's loader takes no N = 0), safetensors, and for reading
`.npy` of `(n_embd,)` or `(n_layer, n_embd)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mia.edits import Edit, Tokens
from mia.errors import FileError, UsageError
from mia.sites import Site

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Vector:
    """A direction per layer.

    Attributes:
        directions: layer -> (n_embd,) float32; layer i is the output of block i.
        site: the site it belongs to, `resid_post` unless it says otherwise.
        metadata: where it came from.
    """

    directions: Mapping[int, Array]
    site: str = "resid_post"
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted(self.directions)

    @property
    def width(self) -> int:
        return len(next(iter(self.directions.values())))

    def check(self, n_layer: int, n_embd: int, source: str) -> None:
        """Raises `UsageError` where the vector does not fit a model."""
        if self.width != n_embd:
            raise UsageError(
                f"{source} has directions of {self.width}; the model's width is {n_embd}"
            )
        if self.layers[-1] >= n_layer:
            raise UsageError(
                f"{source} has a direction for layer {self.layers[-1]}; the model has 0 to {n_layer - 1}"
            )

    def edits(
        self,
        *,
        coeff: float = 1.0,
        layers: Iterable[int] | None = None,
        op: str = "add",
        tokens: Tokens = None,
        generated: bool | None = None,
    ) -> list[Edit]:
        """One edit per layer that the vector has and `layers` allows."""
        wanted = self.layers if layers is None else [i for i in layers if i in self.directions]
        if not wanted:
            raise UsageError(f"the vector has none of these layers; it has {_ranges(self.layers)}")
        return [
            Edit(
                Site(self.site, i),
                op,
                self.directions[i],
                tokens=tokens,
                generated=generated,
                coeff=coeff,
            )
            for i in wanted
        ]


def load(path: str | Path) -> Vector:
    """Reads a vector. Raises `FileError` where the file is none, or has numbers that are not finite."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    if path.suffix == ".npy":
        vector = _load_npy(path)
    elif path.suffix == ".safetensors":
        vector = _load_safetensors(path)
    else:
        vector = _load_gguf(path)
    for layer, v in vector.directions.items():
        if not np.isfinite(v).all():
            raise FileError(
                f"{path}: the direction of layer {layer} has numbers that are not finite"
            )
    return vector


def _load_npy(path: Path) -> Vector:
    try:
        a = np.load(path, allow_pickle=False).astype(np.float32)
    except (ValueError, OSError) as err:
        raise FileError(f"{path} is not a .npy array: {err}") from err
    if a.ndim != 2:
        raise FileError(f"{path} has shape {a.shape}; a vector file is (n_layer, n_embd)")
    return Vector({i: v for i, v in enumerate(a) if v.any()})


def _load_safetensors(path: Path) -> Vector:
    from mia import captures

    found = captures.load(path)
    directions: dict[int, Array] = {}
    for name, rows in found.arrays.items():
        m = re.fullmatch(r"(?:direction|resid_post)\.(\d+)", name)
        if m is None or len(rows) != 1:
            raise FileError(
                f"{path}: {name} is not the direction of a layer (direction.N, one row)"
            )
        directions[int(m[1])] = rows[0]
    if not directions:
        raise FileError(f"{path} has no directions")
    return Vector(directions, metadata=found.metadata)


def _load_gguf(path: Path) -> Vector:
    from mia.registry import check_gguf
    from mia.weights import Weights

    check_gguf(path)
    weights = Weights(path)
    directions = {}
    for name in weights.names:
        m = re.fullmatch(r"direction\.(\d+)", name)
        if m is not None:
            directions[int(m[1])] = weights.vector(name)
    if not directions:
        raise FileError(f"{path} is not a control vector: it has no tensor direction.N")
    if len({len(v) for v in directions.values()}) > 1:
        raise FileError(f"{path}: directions of different widths")
    return Vector(directions)


def _ranges(numbers: list[int]) -> str:
    """`[1, 2, 3, 7]` as "1-3, 7"."""
    parts: list[str] = []
    start = prev = numbers[0]
    for n in [*numbers[1:], None]:
        if n is not None and n == prev + 1:
            prev = n
            continue
        parts.append(str(start) if start == prev else f"{start}-{prev}")
        if n is not None:
            start = prev = n
    return ", ".join(parts)
