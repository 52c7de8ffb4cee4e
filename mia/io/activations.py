"""Activations of a prompt, and the files that hold them.

Files are safetensors: one tensor per site, `(n_tokens, width)` float32 (`(n_tokens, n_head,
n_keys)` for attention patterns), under its canonical name. The metadata has the model's name and
hash, the tokenizer's hash, the token ids, and how the file was made. `.npy` arrays of `(width,)`
or `(n_tokens, width)` are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.edits import Tokens, resolve_tokens
from mia.errors import FileError, UsageError
from mia.io.files import write_whole
from mia.show.report import Report
from mia.sites import Site, parse

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model

Array = npt.NDArray[np.float32]
#: stands for the number of layers where it is not known
_MANY_LAYERS = 1 << 20


class Activations(Report):
    """Activations of one prompt.

        a = model.look("The capital of France is", "l_out")
        a["l_out-14"]              # (n_tokens, n_embd), any spelling of a site
        a.layer(14)                # the same, where there is one kind of site
        a.stack()                  # (n_layer, n_tokens, n_embd)
        a[-1]                      # of a single site: the row of the last token
        model.look(prompt, "head_out").head(3, 5)     # (n_tokens, head_dim)

    Attributes:
        arrays: by canonical site name, `(n_tokens, width)` float32. One without a name (from a
            `.npy`) stands under "".
        source: the file they came from, for messages.
        facts: the model, where they were read in this process.
        pieces: the text of each token of the prompt, empty where it is not known.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        metadata: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        source: str = "activations",
        *,
        facts: ModelFacts | None = None,
        pieces: Iterable[str] = (),
    ):
        """`metadata`: strings (see `mia.io.provenance`), or what makes them when they are asked
        for: hashing a model takes time."""
        self.arrays, self.source = dict(arrays), source
        self.facts, self.pieces = facts, list(pieces)
        self._metadata = metadata or {}

    @cached_property
    def metadata(self) -> dict[str, str]:
        return dict(self._metadata() if callable(self._metadata) else self._metadata)

    @property
    def tokens(self) -> list[int]:
        """The prompt's token ids, empty where a file does not say."""
        return list(json.loads(self.metadata.get("tokens", "[]")))

    @property
    def sites(self) -> list[Site]:
        return [_site(name) for name in self.arrays if name]

    # -- reading -----------------------------------------------------------------------

    def __getitem__(self, key: str | Site | int | slice) -> Array:
        """The rows of a site, `(n_tokens, width)`; or by an index or slice the tokens of the
        only site there is. Raises `UsageError` or `IndexError`."""
        if isinstance(key, (str, Site)):
            return self.at(key)
        return self._only()[key]

    def at(self, site: str | Site, tokens: Tokens = None) -> Array:
        """The rows of a site at some tokens, `(n, width)`.

        Raises:
            UsageError: there is no such site; the message names those there are.
            RangeError: a token index out of range.
        """
        name = str(parse(site, _MANY_LAYERS))
        array = self.arrays.get(name, self.arrays.get(""))
        if array is None:
            raise UsageError(f"{self.source} has no {name}; it has {_listed(self.arrays)}")
        return array[resolve_tokens(tokens, len(array))]

    def layer(self, layer: int) -> Array:
        """The rows of one layer, `(n_tokens, width)`. Raises `UsageError` where there are sites of
        several kinds."""
        return self.at(Site(self._kind(), layer))

    def head(self, layer: int, head: int) -> Array:
        """One head of a site of heads (`head_out`, `q`, `k`, `v`), `(n_tokens, head_dim)`.

        Raises `UsageError` where the site has no heads or no such head."""
        kind = self._kind()
        n = self.metadata.get("n_head_kv" if kind in ("k", "v") else "n_head")
        rows = self.at(Site(kind, layer))
        if kind not in ("q", "k", "v", "head_out") or n is None:
            raise UsageError(f"{self.source} has {kind}, which is not made of heads")
        if not 0 <= head < int(n):
            raise UsageError(
                f"there is no head {head} at {kind}.{layer}; there are 0 to {int(n) - 1}"
            )
        return rows.reshape(len(rows), int(n), -1)[:, head]

    def stack(self) -> Array:
        """All layers of the only kind of site, `(n_layer, n_tokens, width)`."""
        self._kind()
        return np.stack(list(self.arrays.values()))

    def _only(self) -> Array:
        if len(self.arrays) != 1:
            raise UsageError(
                f"{self.source} has {_listed(self.arrays)}; say which: activations['l_out-14']"
            )
        return next(iter(self.arrays.values()))

    def _kind(self) -> str:
        kinds = list(dict.fromkeys(s.name for s in self.sites))
        if len(kinds) != 1:
            raise UsageError(
                f"{self.source} has {' and '.join(kinds) or 'no named site'}, not one kind of site"
            )
        return kinds[0]

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

    # -- showing -----------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        return {
            "model": None if self.facts is None else self.facts.document(),
            "tokens": [
                {"index": i, "id": t, "text": p}
                for i, (t, p) in enumerate(zip(self.tokens, self.pieces, strict=False))
            ],
            "sites": [
                {"site": k, "shape": list(a.shape), "dtype": "float32"}
                for k, a in self.arrays.items()
            ],
        }

    def plain(self) -> str:
        return "\n".join(
            f"{name}  {' × '.join(map(str, a.shape))}  float32" for name, a in self.arrays.items()
        )

    def rows(self) -> list[dict[str, Any]]:
        """For each site and token the norm of its row."""
        out = []
        for name, a in self.arrays.items():
            norms = np.linalg.norm(a.reshape(len(a), -1), axis=1)
            for i, norm in enumerate(norms.tolist()):
                piece = self.pieces[i] if i < len(self.pieces) else ""
                out.append({"site": name, "token_index": i, "text": piece, "norm": norm})
        return out

    def to_pandas(self) -> Any:
        """A row for each site and token, a column for each dimension."""
        try:
            import pandas
        except ImportError as err:
            raise UsageError("a DataFrame needs pandas: pip install pandas") from err
        frames = {k: pandas.DataFrame(a.reshape(len(a), -1)) for k, a in self.arrays.items()}
        return pandas.concat(frames, names=["site", "token_index"])

    # -- files -------------------------------------------------------------------------

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


def _site(name: str) -> Site:
    return parse(name, _MANY_LAYERS)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return (
        ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])}, … ({len(names)} sites)"
    )


def load(path: str | Path) -> Activations:
    """Reads a file of activations.

    Raises `FileError` where it is none, or holds numbers that are not finite."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    try:
        if path.suffix == ".npy":
            array = np.atleast_2d(np.load(path, allow_pickle=False))
            if array.ndim > 2:
                raise ValueError(f"its shape is {array.shape}, not (n_tokens, width)")
            activations = Activations({"": array.astype(np.float32)}, {}, str(path))
        else:
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as f:
                arrays = {k: np.asarray(f.get_tensor(k), np.float32) for k in f.keys()}  # noqa: SIM118
                activations = Activations(arrays, f.metadata() or {}, str(path))
    except Exception as err:
        raise FileError(f"{path} is neither a safetensors capture nor a .npy array: {err}") from err
    for name, array in activations.arrays.items():
        if array.ndim < 2 or not np.isfinite(array).all():
            what = "has no rows" if array.ndim < 2 else "has numbers that are not finite"
            raise FileError(f"{path}: {name or 'the array'} {what}")
    return activations
