"""Vector files: control-vector GGUF, safetensors, and for reading `.npy`.

Functions of plain data, directions by layer; `mia.vectors.vector` makes a `Vector` of them.

llama.cpp's format: a tensor `direction.N` float32 `(n_embd,)` is added at the end of block N;
its loader refuses a file with N = 0. llama.cpp's own cvector-generator computes direction.N
from the output of block N-1; its files are read as they are. Safetensors name their tensors
alike and hold the site in the metadata. A `.npy` has the shape `(n_layer, n_embd)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mia.arrays import Array
from mia.errors import FileError, UsageError
from mia.io import files
from mia.io.files import check_writable, existing_file, read_npy, read_safetensors
from mia.io.kinds import refuse_other_kind
from mia.io.runs import reading
from mia.sites import LAYERED

#: directions by layer, their site, metadata
Parts = tuple[dict[int, Array], str, dict[str, str]]

_PREFIX = "mia."  # of our metadata in a GGUF
_LAYER = "0|[1-9][0-9]{0,5}"


def check_suffix(path: str | Path, site: str) -> None:
    """Raises `UsageError` if no vector file ends so, or none that can hold the site."""
    suffix = Path(path).suffix
    if suffix not in (".gguf", ".safetensors"):
        raise UsageError(f"{path}: a vector file ends in .gguf or .safetensors")
    if suffix == ".gguf" and site != "resid_post":
        raise UsageError(
            f"{path}: a control-vector GGUF is for resid_post; this vector belongs to {site}, which .safetensors can hold"
        )


def check_file(path: str | Path, site: str = "resid_post") -> None:
    """Checks before any work that a vector of this site can be written there. Raises
    `UsageError`, or `FileError` if the file cannot be written."""
    check_writable(path)
    check_suffix(path, site)


def read_directions(path: Path) -> Parts:
    """Reads a vector file. Raises `FileError`, or `UsageError` for numbers that are not real."""
    reading(path)
    existing_file(path)
    refuse_other_kind(path, "vector")
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    return readers.get(path.suffix, _read_gguf)(path)


def write_gguf_vector(
    path: Path, directions: Mapping[int, Array], metadata: Mapping[str, str]
) -> None:
    """Writes a control vector for llama.cpp."""
    from mia.llama.gguf_write import Value, write_gguf

    facts: dict[str, Value] = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": metadata.get("architecture", "unknown"),
        "controlvector.layer_count": len(directions),
        **{_PREFIX + k: v for k, v in metadata.items()},
    }
    write_gguf(path, facts, {f"direction.{i}": v for i, v in directions.items()})


def write_safetensors(
    path: Path, directions: Mapping[int, Array], site: str, metadata: Mapping[str, str]
) -> None:
    arrays = {f"direction.{i}": v for i, v in directions.items()}
    files.write_safetensors(path, arrays, {**metadata, "site": site})


def _read_npy(path: Path) -> Parts:
    a = read_npy(path)
    if a.ndim != 2 or not np.count_nonzero(a):
        raise FileError(
            f"{path} has shape {a.shape}; a vector file is (n_layer, n_embd), not all zero"
        )
    return {i: v for i, v in enumerate(a) if np.count_nonzero(v)}, "resid_post", {}


def _read_safetensors(path: Path) -> Parts:
    arrays, metadata = read_safetensors(path)
    directions: dict[int, Array] = {}
    site = metadata.pop("site", "resid_post")
    first = next(iter(arrays), "")
    for name, rows in arrays.items():
        m = re.fullmatch(rf"([a-z_]+)\.({_LAYER})", name)
        if m is None or m[1] not in ("direction", *LAYERED) or rows.shape[-1:] != (rows.size,):
            raise FileError(
                f"{path}: {name} is not the direction of a layer (direction.N, one row)"
            )
        if m[1] != first.rpartition(".")[0]:
            raise FileError(f"{path} mixes {first} and {name}; a vector belongs to one site")
        site = site if m[1] == "direction" else m[1]
        directions[int(m[2])] = rows.reshape(-1)
    return directions, site, metadata


def _read_gguf(path: Path) -> Parts:
    from mia.llama import file_strings
    from mia.llama.weights import Weights
    from mia.models.registry import check_gguf

    check_gguf(path)
    facts = file_strings(path)  # llama.cpp's own reading refuses what is damaged
    weights = Weights(path)
    directions = {}
    for name in weights.names:
        m = re.fullmatch(rf"direction\.({_LAYER})", name)
        if m is not None:
            if len(weights.shape(name)) != 1:
                raise FileError(f"{path}: {name} has shape {weights.shape(name)}, not (width,)")
            directions[int(m[1])] = weights.vector(name)
    if not directions:
        raise FileError(f"{path} is not a control vector: it has no tensor direction.N")
    metadata = {k.removeprefix(_PREFIX): v for k, v in facts.items() if k.startswith(_PREFIX)}
    hint = facts.get("controlvector.model_hint")
    if hint and hint != "unknown":
        metadata.setdefault("architecture", hint)
    return directions, "resid_post", metadata


def as_float32(a: npt.ArrayLike) -> Array:
    """Numbers that are too large become infinite without a warning; `Vector` refuses those.

    Raises `UsageError` for complex numbers."""
    if np.iscomplexobj(a):
        raise UsageError("a direction's numbers are real, not complex")
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(a, np.float32)
