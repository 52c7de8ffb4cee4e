"""Vectors: one direction per layer, as values.

    v = 0.5 * (french - english)          # + - * /, layer by layer
    v.norms, v.dot(w), v.cosine(w)        # {layer: number}
    v.onto(w), v.without(w)               # the part along w, and the rest
    v.save("french.gguf")

Files: llama.cpp's control-vector GGUF (`direction.N` float32 `(n_embd,)` is added at
the end of block N; llama.cpp's loader refuses a file with N = 0), safetensors, and for
reading `.npy` of `(n_layer, n_embd)`. llama.cpp's own cvector-generator computes
direction.N from the output of block N-1; its files are read as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mia.edits import Edit, Tokens
from mia.errors import FileError, UsageError
from mia.sites import LAYERED, Site

Array = npt.NDArray[np.float32]

_PREFIX = "mia."


@dataclass(frozen=True, eq=False)
class Vector:
    """A direction per layer.

    Attributes:
        directions: layer -> (width,) float32; layer i is the output of block i.
        site: the site it belongs to, `resid_post` unless it says otherwise.
        metadata: where it came from: model, data, method. `name` is what arithmetic
            calls it in `expression`.
    """

    directions: Mapping[int, Array]
    site: str = "resid_post"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directions:
            raise UsageError("a vector needs a direction for at least one layer")
        if self.site not in LAYERED:
            raise UsageError(f"a vector's site is one of {', '.join(LAYERED)}, not {self.site!r}")
        ready = {int(i): _float32(v) for i, v in sorted(self.directions.items())}
        for layer, v in ready.items():
            if v.ndim != 1 or v.shape != ready[min(ready)].shape:
                raise UsageError(
                    f"the direction of layer {layer} has shape {v.shape}, not (width,)"
                )
            if not np.isfinite(v).all():
                raise UsageError(f"the direction of layer {layer} has numbers that are not finite")
        object.__setattr__(self, "directions", ready)

    def __repr__(self) -> str:
        return (
            f"Vector({self.name!r}, {self.site}, layers {_ranges(self.layers)}, width {self.width})"
        )

    @property
    def layers(self) -> list[int]:
        return sorted(self.directions)

    @property
    def width(self) -> int:
        return len(next(iter(self.directions.values())))

    @property
    def name(self) -> str:
        return self.metadata.get("name", "vector")

    @property
    def sources(self) -> list[Mapping[str, str]]:
        """What is known of it or, where arithmetic made it, of each vector that it was made from."""
        if "sources" not in self.metadata:
            return [self.metadata]
        return list(json.loads(self.metadata["sources"]).values())

    def __getitem__(self, layer: int) -> Array:
        """The direction of a layer, (width,). Raises `UsageError` naming those there are."""
        if layer not in self.directions:
            raise UsageError(f"{self.name} has no layer {layer}; it has {_ranges(self.layers)}")
        return self.directions[layer]

    # -- arithmetic ----------------------------------------------------------------

    def __add__(self, other: Vector) -> Vector:
        """Layer by layer; a layer that only one of them has is that one's."""
        return self._combined(other, 1, "+")

    def __sub__(self, other: Vector) -> Vector:
        return self._combined(other, -1, "-")

    def __mul__(self, factor: float) -> Vector:
        return self._mapped(lambda v: v * np.float32(factor), f"{factor:g}*{_bracketed(self.name)}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        if divisor == 0:
            raise UsageError(f"{self.name} cannot be divided by 0")
        return self._mapped(
            lambda v: v / np.float32(divisor), f"{_bracketed(self.name)}/{divisor:g}"
        )

    def __neg__(self) -> Vector:
        return self._mapped(lambda v: -v, f"-{_bracketed(self.name)}")

    @property
    def norms(self) -> dict[int, float]:
        """Length of each layer's direction."""
        return {i: float(np.linalg.norm(v)) for i, v in self.directions.items()}

    def dot(self, other: Vector) -> dict[int, float]:
        """Scalar products at the layers that both have."""
        return {i: float(self[i] @ other[i]) for i in self._common(other)}

    def cosine(self, other: Vector) -> dict[int, float]:
        """Cosines at the layers that both have; 0 where a direction is zero."""
        a, b, dots = self.norms, other.norms, self.dot(other)
        return {i: d / (a[i] * b[i]) if a[i] * b[i] else 0.0 for i, d in dots.items()}

    def unit(self) -> Vector:
        """Each direction at length 1; a zero one stays zero."""
        return self._mapped(lambda v: v / (np.linalg.norm(v) or 1), f"unit({self.name})")

    def onto(self, other: Vector) -> Vector:
        """The part of it along `other`, at the layers that both have."""
        return self._paired(other, _along, "onto")

    def without(self, other: Vector) -> Vector:
        """What is left of it when the part along `other` is taken away."""
        return self._paired(other, lambda a, b: a - _along(a, b), "without")

    def at(self, layers: Iterable[int]) -> Vector:
        """Only these of its layers. Raises `UsageError` where it has none of them."""
        wanted = [i for i in layers if i in self.directions]
        if not wanted:
            raise UsageError(f"{self.name} has none of these layers; it has {_ranges(self.layers)}")
        return replace(self, directions={i: self.directions[i] for i in wanted})

    def renamed(self, name: str) -> Vector:
        return replace(self, metadata={**self.metadata, "name": name})

    def _mapped(self, f: Callable[[Array], Array], name: str) -> Vector:
        with np.errstate(over="ignore", invalid="ignore"):  # the new vector refuses what they mean
            made = {i: f(v).astype(np.float32) for i, v in self.directions.items()}
        return replace(self, directions=made, metadata=_derived(name, self))

    def _paired(self, other: Vector, f: Callable[[Array, Array], Array], word: str) -> Vector:
        with np.errstate(over="ignore", invalid="ignore"):
            made = {i: f(self[i], other[i]) for i in self._common(other)}
        name = f"{_bracketed(self.name)} {word} {_bracketed(other.name)}"
        return Vector(made, self.site, _derived(name, self, other))

    def _combined(self, other: Vector, sign: int, symbol: str) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        self._check_same(other)
        made = dict(self.directions)
        with np.errstate(over="ignore", invalid="ignore"):
            for i, v in other.directions.items():
                made[i] = made[i] + sign * v if i in made else sign * v
        second = _bracketed(other.name) if symbol == "-" else other.name
        return Vector(made, self.site, _derived(f"{self.name} {symbol} {second}", self, other))

    def _check_same(self, other: Vector) -> None:
        if self.site != other.site:
            raise UsageError(
                f"{self.name} belongs to {self.site}, {other.name} to {other.site}: they do not mix"
            )
        if self.width != other.width:
            raise UsageError(
                f"{self.name} has width {self.width}, {other.name} has {other.width}: they do not mix"
            )

    def _common(self, other: Vector) -> list[int]:
        self._check_same(other)
        both = [i for i in self.layers if i in other.directions]
        if not both:
            raise UsageError(
                f"{self.name} (layers {_ranges(self.layers)}) and {other.name} "
                f"(layers {_ranges(other.layers)}) have no layer in common"
            )
        return both

    # -- use -----------------------------------------------------------------------

    def check(self, n_layer: int, width: int, source: str | None = None) -> None:
        """Raises `UsageError` where the vector does not fit a model."""
        source = source or self.name
        if self.width != width:
            raise UsageError(
                f"{source} has directions of {self.width}; the model's width at {self.site} is {width}"
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
        keep_norm: bool = False,
    ) -> list[Edit]:
        """One edit per layer that the vector has and `layers` allows."""
        chosen = self if layers is None else self.at(layers)
        return [
            Edit(
                Site(self.site, i),
                op,
                chosen.directions[i],
                tokens=tokens,
                generated=generated,
                coeff=coeff,
                keep_norm=keep_norm,
            )
            for i in chosen.layers
        ]

    # -- files ---------------------------------------------------------------------

    def save(self, path: str | Path, *, layer_zero: bool = False) -> list[int]:
        """Writes safetensors where the name ends so, else control-vector GGUF.

        Args:
            layer_zero: keep a direction of layer 0 in a GGUF, which llama.cpp then refuses.

        Returns:
            The layers that were left out: [0], or [].

        Raises:
            UsageError: a vector of another site than `resid_post`, or of layer 0 only, as
                GGUF: llama.cpp would add it at the wrong place, or not at all.
            FileError: the file cannot be written.
        """
        path = Path(path)
        check_suffix(path, self.site)
        if path.suffix == ".safetensors":
            self._save_safetensors(path)
            return []
        kept = {i: v for i, v in self.directions.items() if i or layer_zero}
        if not kept:
            raise UsageError(
                f"{path}: {self.name} has only layer 0, which llama.cpp's control vectors have "
                "not; keep it by --layer-zero, or write .safetensors"
            )
        from mia.llama.gguf_write import Value, write_gguf

        hint = self.metadata.get("architecture", "unknown")
        facts: dict[str, Value] = {
            "general.architecture": "controlvector",
            "controlvector.model_hint": hint,
            "controlvector.layer_count": len(kept),
            **{_PREFIX + k: v for k, v in self.metadata.items()},
        }
        write_gguf(path, facts, {f"direction.{i}": v for i, v in kept.items()})
        return [i for i in self.layers if i not in kept]

    def _save_safetensors(self, path: Path) -> None:
        from safetensors.numpy import save_file

        from mia.io.files import write_whole

        arrays = {f"direction.{i}": np.ascontiguousarray(v) for i, v in self.directions.items()}
        metadata = {**self.metadata, "site": self.site}
        write_whole(path, lambda p: save_file(arrays, p, metadata=metadata))


def check_suffix(path: str | Path, site: str) -> None:
    """Raises `UsageError` where no vector file ends so, or none that can hold the site."""
    suffix = Path(path).suffix
    if suffix not in (".gguf", ".safetensors"):
        raise UsageError(f"{path}: a vector file ends in .gguf or .safetensors")
    if suffix == ".gguf" and site != "resid_post":
        raise UsageError(
            f"{path}: a control-vector GGUF is for resid_post; this vector belongs to {site}, which .safetensors can hold"
        )


def load(path: str | Path) -> Vector:
    """Reads a vector. Raises `FileError` where the file is none, or has numbers that are not finite."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    read = {".npy": _load_npy, ".safetensors": _load_safetensors}.get(path.suffix, _load_gguf)
    try:
        vector = read(path)
    except UsageError as err:
        raise FileError(f"{path}: {err}") from err
    return vector if "name" in vector.metadata else vector.renamed(path.stem)


def _load_npy(path: Path) -> Vector:
    try:
        a = _float32(np.load(path, allow_pickle=False))
    except UsageError:  # a ValueError too, but it says what is wrong
        raise
    except (ValueError, OSError, EOFError) as err:
        raise FileError(f"{path} is not a .npy array: {err}") from err
    if a.ndim != 2 or not a.any():
        raise FileError(
            f"{path} has shape {a.shape}; a vector file is (n_layer, n_embd), not all zero"
        )
    return Vector({i: v for i, v in enumerate(a) if v.any()})


def _load_safetensors(path: Path) -> Vector:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as f:
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            metadata = dict(f.metadata() or {})
    except Exception as err:
        raise FileError(f"{path} is not a safetensors file: {err}") from err
    directions: dict[int, Array] = {}
    site = metadata.pop("site", "resid_post")
    first = next(iter(arrays), "")
    for name, rows in arrays.items():
        m = re.fullmatch(r"(direction|[a-z_]+)\.(\d+)", name)
        if m is None or m[1] not in ("direction", *LAYERED) or rows.shape[-1:] != (rows.size,):
            raise FileError(
                f"{path}: {name} is not the direction of a layer (direction.N, one row)"
            )
        if m[1] != first.rpartition(".")[0]:
            raise FileError(f"{path} mixes {first} and {name}; a vector belongs to one site")
        site = site if m[1] == "direction" else m[1]
        directions[int(m[2])] = rows.reshape(-1)
    return Vector(directions, site, metadata)


def _load_gguf(path: Path) -> Vector:
    from mia.llama.ggml import file_strings
    from mia.llama.weights import Weights
    from mia.models.registry import check_gguf

    check_gguf(path)
    weights = Weights(path)
    directions = {}
    for name in weights.names:
        m = re.fullmatch(r"direction\.(\d+)", name)
        if m is not None:
            directions[int(m[1])] = weights.vector(name)
    if not directions:
        raise FileError(f"{path} is not a control vector: it has no tensor direction.N")
    facts = file_strings(path)
    metadata = {k.removeprefix(_PREFIX): v for k, v in facts.items() if k.startswith(_PREFIX)}
    hint = facts.get("controlvector.model_hint")
    if hint and hint != "unknown":
        metadata.setdefault("architecture", hint)
    return Vector(directions, "resid_post", metadata)


def _float32(a: npt.ArrayLike) -> Array:
    """Numbers too large become infinite without a warning; what reads them refuses those.

    Raises `UsageError` where they are complex."""
    if np.iscomplexobj(a):
        raise UsageError("a direction's numbers are real, not complex")
    with np.errstate(over="ignore"):
        return np.asarray(a, np.float32)


# -- names and provenance ----------------------------------------------------------


def _along(a: Array, b: Array) -> Array:
    square = float(b @ b)
    return (a @ b / square * b if square else np.zeros_like(a)).astype(np.float32)


def _bracketed(name: str) -> str:
    return name if re.fullmatch(r"[\w.*]+", name) else f"({name})"


def _derived(name: str, *parents: Vector) -> dict[str, str]:
    """What all parents agree on, and what each came from."""
    first = parents[0].metadata
    same = {k: v for k, v in first.items() if all(p.metadata.get(k) == v for p in parents)}
    sources: dict[str, dict[str, str]] = {}
    for p in parents:
        inherited = json.loads(p.metadata["sources"]) if "sources" in p.metadata else None
        own = {k: v for k, v in p.metadata.items() if k not in ("name", "sources")}
        sources.update(inherited or {p.name: own})
    return {**same, "name": name, "sources": json.dumps(sources, ensure_ascii=False)}


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
