"""Capture files: activations with what is needed to trust them later.

safetensors, one tensor per site `(n_tokens, width)` float32 (`(n_tokens, n_head,
n_keys)` for attention patterns) under its canonical name, and in the metadata the
model's name and hash, its tokenizer's hash, the token ids, and how they were made.
`.npy` arrays of `(width,)` or `(n_tokens, width)` are read as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.edits import Tokens, resolve_tokens
from mia.errors import FileError, UsageError
from mia.io.files import write_whole
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of one prompt.

    Attributes:
        arrays: by canonical site name, `(n_tokens, width)` float32. One without a name
            (from a `.npy`) stands under "".
        metadata: strings; see `provenance`.
        source: the file they came from, for messages.
    """

    arrays: dict[str, Array]
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "captures"

    def save(self, path: str | Path) -> None:
        """Writes safetensors, or for a name that ends in .npy one bare array. Raises `FileError`."""
        if Path(path).suffix == ".npy":
            self._save_npy(path)
            return
        from safetensors.numpy import save_file

        arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in self.arrays.items()}
        write_whole(path, lambda p: save_file(arrays, p, metadata=self.metadata))

    def _save_npy(self, path: str | Path) -> None:
        if len(self.arrays) != 1:
            raise FileError(
                f"{path}: a .npy holds one site, not {len(self.arrays)}; name it .safetensors"
            )
        (array,) = self.arrays.values()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as f:  # np.save would add a suffix to a bare name
                np.save(f, array)

        write_whole(path, write)

    @property
    def tokens(self) -> list[int]:
        """The prompt's token ids, empty where the file does not say."""
        return list(json.loads(self.metadata.get("tokens", "[]")))

    def rows(self, site: Site, tokens: Tokens = None) -> Array:
        """The rows of a site at some tokens: `(n, width)`.

        Raises:
            UsageError: the file has no such site; it names those it has.
            RangeError: a token index out of range.
        """
        found = self.arrays.get(str(site), self.arrays.get(""))
        if found is None:
            raise UsageError(f"{self.source} has no {site}; it has {_listed(self.arrays)}")
        return found[resolve_tokens(tokens, len(found))]

    def check(self, model: Model) -> None:
        """Raises `UsageError` where these activations are of another kind of model."""
        theirs = self.metadata.get("tokenizer_sha256")
        if theirs is not None and theirs != model.tokenizer_hash:
            name = self.metadata.get("model", "another model")
            raise UsageError(
                f"{self.source} was captured from {name}, which has another tokenizer than {model.name}"
            )
        width = self.metadata.get("n_embd")
        if width is not None and int(width) != model.n_embd:
            raise UsageError(
                f"{self.source} was captured from a model of width {width}; {model.name} has {model.n_embd}"
            )


def _listed(names: Any) -> str:
    names = list(names)
    return (
        ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])}, … ({len(names)} sites)"
    )


def provenance(model: Model, **arguments: Any) -> dict[str, str]:
    """What a result needs to be made again: model file and hash, tokenizer, versions, arguments."""
    from mia import __version__
    from mia.llama.ggml import library_info

    return {
        "mia": __version__,
        "llama_cpp_python": library_info()["llama_cpp_python"],
        "model": model.name,
        "model_file": model.path.name,
        "model_sha256": model.file_hash,
        "tokenizer_sha256": model.tokenizer_hash,
        "n_embd": str(model.n_embd),
        "n_layer": str(model.n_layer),
        **{k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()},
    }


def load(path: str | Path) -> Activations:
    """Reads a capture file. Raises `FileError` where it is none, or holds numbers that are not finite."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    try:
        if path.suffix == ".npy":
            array = np.atleast_2d(np.load(path, allow_pickle=False))
            if array.ndim > 2:
                raise ValueError(f"its shape is {array.shape}, not (n_tokens, width)")
            captures = Activations({"": array.astype(np.float32)}, {}, str(path))
        else:
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as f:
                arrays = {k: np.asarray(f.get_tensor(k), np.float32) for k in f.keys()}  # noqa: SIM118
                captures = Activations(arrays, f.metadata() or {}, str(path))
    except Exception as err:
        raise FileError(f"{path} is neither a safetensors capture nor a .npy array: {err}") from err
    for name, array in captures.arrays.items():
        if array.ndim < 2 or not np.isfinite(array).all():
            what = "has no rows" if array.ndim < 2 else "has numbers that are not finite"
            raise FileError(f"{path}: {name or 'the array'} {what}")
    return captures
