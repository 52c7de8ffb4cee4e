"""Activations of a prompt, and the files that hold them.

Files are safetensors: one tensor per site, `(n_tokens, width)` float32 (`(n_tokens, n_head,
n_keys)` for attention patterns), under its canonical name. The metadata has the model's name and
hash, the tokenizer's hash, the token ids, and how the file was made. `.npy` arrays of `(width,)`
or `(n_tokens, width)` are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, norms
from mia.edits import Tokens, resolve_tokens
from mia.errors import FileError, UsageError
from mia.io.files import read_npy, read_safetensors, write_npy, write_safetensors
from mia.io.kinds import refuse_other_kind
from mia.ranges import compact
from mia.show.report import Report, endings
from mia.sites import KINDS, Site, parse, split_spelling

if TYPE_CHECKING:
    from mia.generation import Token
    from mia.io.provenance import ModelFacts

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
        prompt: its tokens, empty where they are not known.
        positions: the token of the prompt that each row is of.
        file: what `save` wrote last.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        metadata: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        source: str = "the capture",
        *,
        facts: ModelFacts | None = None,
        prompt: Sequence[Token] = (),
        positions: Sequence[int] | None = None,
    ):
        """`metadata`: strings (see `mia.io.provenance`), or what makes them when they are asked
        for: hashing a model takes time."""
        self.arrays, self.source = dict(arrays), source
        self.facts, self.prompt = facts, list(prompt)
        self.file: str | None = None
        n_rows = max(map(len, self.arrays.values()), default=0)
        self.positions = list(range(n_rows) if positions is None else positions)
        self._metadata = metadata or {}

    @cached_property
    def metadata(self) -> dict[str, str]:
        return dict(self._metadata() if callable(self._metadata) else self._metadata)

    @property
    def tokens(self) -> list[int]:
        """The prompt's token ids, empty where a file does not say."""
        if self.prompt:
            return [t.id for t in self.prompt]
        return _ids(self.metadata.get("tokens", "[]"), self.source)

    @property
    def sites(self) -> list[Site]:
        return [_site(name) for name in self.arrays if name]

    # -- reading -----------------------------------------------------------------------

    def __repr__(self) -> str:
        name = self.facts.name if self.facts is not None else self.source
        places = ", ".join(self._places()) or "no named site"
        n = len(self.positions)
        return f"Activations({name}: {places}, {n} token{'' if n == 1 else 's'})"

    def _places(self) -> list[str]:
        """Its sites, those of one kind together: "resid_post.0..29"."""
        names = [name for name in self.arrays if name]
        kinds = dict.fromkeys(name.partition(".")[0] for name in names)
        return [
            f"{kind}.{compact(layers)}" if (layers := self._layers_of(kind)) else kind
            for kind in kinds
        ]

    def _layers_of(self, kind: str) -> list[int]:
        """The layers that there are of a kind of site."""
        parts = [name.partition(".") for name in self.arrays]
        return [int(layer) for name, _, layer in parts if name == kind and layer.isdigit()]

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
        name = self._key(site)
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
        kind = KINDS[self._kind()]
        n_heads = self.metadata.get(kind.shape[0])
        if not kind.headed or kind.by_key or n_heads is None:
            raise UsageError(f"{self.source} has {kind.name}, which is not made of heads")
        n = int(n_heads)
        if not 0 <= head < n:
            raise UsageError(f"there is no head {head} at {kind.name}; there are 0 to {n - 1}")
        rows = self.at(Site(kind.name, layer))
        if rows.shape[-1] % n:
            raise UsageError(f"{self.source}: {n} heads do not fill a row of {rows.shape[-1]}")
        return rows.reshape(len(rows), n, -1)[:, head]

    def stack(self) -> Array:
        """All layers of the only kind of site, `(n_layer, n_tokens, width)`."""
        self._kind()
        return np.stack(list(self.arrays.values()))

    def _key(self, site: str | Site) -> str:
        """The canonical name of one site. Raises `UsageError` for a kind of site without a layer,
        where there are layers of it."""
        kind, layers = split_spelling(str(site).strip())
        if layers is not None or not KINDS[kind].layered:
            return str(parse(site, self._n_layer))
        if have := self._layers_of(kind):
            stack = "; stack() gives all layers" if len(self._places()) == 1 else ""
            raise UsageError(
                f"{str(site)!r} needs a layer: {self.source} has {kind}.{compact(have)}{stack}"
            )
        return kind

    @property
    def _n_layer(self) -> int:
        """The model's layers, a large number where they are not known."""
        if self.facts is not None:
            return self.facts.n_layer
        n = self.metadata.get("n_layer", "")
        return int(n) if n.isdigit() else _MANY_LAYERS

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

    # -- showing -----------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        from mia.show.text import rounded

        return {
            "model": None if self.facts is None else self.facts.document(),
            "tokens": [t.document() for t in self.prompt],
            **({} if self.file is None else {"file": self.file}),
            "sites": [
                {"site": k, "shape": list(a.shape), "dtype": "float32"}
                for k, a in self.arrays.items()
            ],
            # over all tokens: two captures that differ are seen to
            "norms": {
                k: rounded(np.linalg.norm(a.astype(np.float64))) for k, a in self.arrays.items()
            },
        }

    def plain(self) -> str:
        return "\n".join(
            f"{name}  {' × '.join(map(str, a.shape))}  float32" for name, a in self.arrays.items()
        )

    def rows(self) -> list[dict[str, Any]]:
        """For each site and token the norm of its row."""
        out = []
        for name, a in self.arrays.items():
            lengths = norms(a.reshape(len(a), -1))
            for i, norm in zip(self.positions, lengths.tolist(), strict=False):
                piece = self.prompt[i].text if i < len(self.prompt) else ""
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
        """Writes safetensors; for a name that ends in .npy one bare array, in .json, .csv or .html
        as every report.

        Raises `FileError`."""
        if Path(path).suffix.lower() in endings(picture=False):
            super().save(path)
            return
        self.file = str(path)
        if Path(path).suffix == ".npy":
            self._save_npy(path)
            return
        write_safetensors(path, self.arrays, self.metadata)

    def _save_npy(self, path: str | Path) -> None:
        if len(self.arrays) != 1:
            raise FileError(
                f"{path}: a .npy holds one site, not {len(self.arrays)}; name it .safetensors"
            )
        (array,) = self.arrays.values()
        write_npy(path, array)


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
    refuse_other_kind(path, "capture")
    arrays, metadata = ({"": _npy_rows(path)}, {}) if path.suffix == ".npy" else _stored(path)
    for name, array in arrays.items():
        if array.ndim < 2 or not array.size or not np.isfinite(array).all():
            wrong = "has numbers that are not finite" if array.size else "is empty"
            what = wrong if array.ndim >= 2 else "has no rows"
            raise FileError(f"{path}: {name or 'the array'} {what}")
    return Activations(arrays, metadata, str(path))


def _npy_rows(path: Path) -> Array:
    """(n_tokens, width) of a file; a single row is one token."""
    array = np.atleast_2d(read_npy(path))
    if array.ndim > 2:
        raise FileError(f"{path}: its shape is {array.shape}, not (n_tokens, width)")
    return array


def _stored(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and metadata of a safetensors file, checked."""
    arrays, metadata = read_safetensors(path)
    rows: dict[str, Array] = {}
    for name, array in arrays.items():
        try:
            site = _site(name)
        except UsageError as err:
            raise FileError(f"{path} is not a file of activations: {err}") from err
        if site.layer is not None and site.layer >= _MANY_LAYERS // 2:  # counted from the end
            raise FileError(f"{path} is not a file of activations: {name!r:.60} names no layer")
        key = str(site)
        if key in rows:
            raise FileError(f"{path} has {key} twice")
        with np.errstate(over="ignore", invalid="ignore"):  # what is infinite is refused
            rows[key] = np.asarray(array, np.float32)
    for key in ("n_layer", "n_embd", "n_head", "n_head_kv"):
        if key in metadata and not (metadata[key].isdecimal() and len(metadata[key]) < 10):
            raise FileError(f"{path}: its {key} is {metadata[key]!r:.60}, not a whole number")
    _ids(metadata.get("tokens", "[]"), path)
    return rows, metadata


def _ids(text: str, path: str | Path) -> list[int]:
    """Token ids as a file's metadata writes them. Raises `FileError`."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise FileError(f"{path}: its tokens are {text!r:.60}, not a list of token ids")
    return ids
