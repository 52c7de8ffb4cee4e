"""Vectors: one direction per layer, as values.

v = 0.5 * (french - english)          # + - * /, layer by layer
v.norms, v.dot(w), v.cosine(w)        # {layer: number}
v.onto(w), v.without(w)               # the part along w, and the rest
v.save("french.gguf"); w = load("english.gguf")   # formats: `mia.vectors.files`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mia.arrays import Array, Floats, cosine, dot, norms
from mia.edits import Edit, Tokens
from mia.errors import FileError, UsageError
from mia.notices import notice
from mia.ranges import Ranges, compact, parse_layers
from mia.sites import LAYERED, Site
from mia.values import number, real_array, shown, whole
from mia.vectors.files import (
    check_suffix,
    read_directions,
    write_gguf_vector,
    write_safetensors,
)


@dataclass(frozen=True, eq=False)
class Vector:
    """A direction per layer.

    Attributes:
        directions: layer -> (width,) float32; layer i is the output of block i.
        site: the site that it belongs to.
        metadata: where it came from: model, data, method. `name` is what arithmetic calls it.
    """

    directions: Mapping[int, Array]
    site: str = "resid_post"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directions:
            raise UsageError("a vector needs a direction for at least one layer")
        if self.site not in LAYERED:
            raise UsageError(f"a vector's site is one of {', '.join(LAYERED)}, not {self.site!r}")
        if not isinstance(self.directions, Mapping):
            raise UsageError(
                f"a vector's directions are {{layer: row}}, not {shown(self.directions)}"
            )
        layers = [whole(i, "a vector's layer") for i in self.directions]
        if min(layers) < 0:
            raise UsageError(f"a vector's layers count from 0; there is no layer {min(layers)}")
        ready = {
            i: real_array(v, f"the direction of layer {i}")
            for i, v in sorted(
                zip(layers, self.directions.values(), strict=True), key=lambda x: x[0]
            )
        }
        for layer, v in ready.items():
            if v.ndim != 1 or not v.size or v.shape != ready[min(ready)].shape:
                raise UsageError(
                    f"the direction of layer {layer} has shape {v.shape}, not (width,)"
                )
            if not np.isfinite(v).all():
                raise UsageError(f"the direction of layer {layer} has numbers that are not finite")
        object.__setattr__(self, "directions", ready)
        _sources(self.metadata)

    def __repr__(self) -> str:
        return (
            f"Vector({self.name!r}, {self.site}, layers {compact(self.layers)}, width {self.width})"
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
        """Its metadata; for the result of arithmetic, the metadata of each operand."""
        sources = _sources(self.metadata)
        return [self.metadata] if sources is None else list(sources.values())

    def __getitem__(self, layer: int) -> Array:
        """The direction of a layer, (width,). Raises `UsageError` naming the vector's layers."""
        if layer not in self.directions:
            raise UsageError(f"{self.name} has no layer {layer}; it has {compact(self.layers)}")
        return self.directions[layer]

    # -- arithmetic ----------------------------------------------------------------

    def __add__(self, other: Vector) -> Vector:
        """Layer by layer; if only one of them has a layer, its direction is kept."""
        return self._combined(other, 1, "+")

    def __sub__(self, other: Vector) -> Vector:
        return self._combined(other, -1, "-")

    def __mul__(self, factor: float) -> Vector:
        number(factor, "a vector's factor")
        return self._mapped(lambda v: v * np.float64(factor), f"{factor:g}*{_bracketed(self.name)}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        if number(divisor, "a vector's divisor") == 0:
            raise UsageError(f"{self.name} cannot be divided by 0")
        return self._mapped(
            lambda v: v / np.float64(divisor), f"{_bracketed(self.name)}/{divisor:g}"
        )

    def __neg__(self) -> Vector:
        return self._mapped(lambda v: -v, f"-{_bracketed(self.name)}")

    @property
    def norms(self) -> dict[int, float]:
        """Length of each layer's direction."""
        return {i: float(norms(v)) for i, v in self.directions.items()}

    def dot(self, other: Vector) -> dict[int, float]:
        """Scalar products at the layers that both have."""
        return {i: dot(self[i], other[i]) for i in self._common(other)}

    def cosine(self, other: Vector) -> dict[int, float]:
        """Cosines at the layers that both have; 0 if a direction is zero."""
        return {i: cosine(self[i], other[i]) for i in self._common(other)}

    def unit(self) -> Vector:
        """Each direction at length 1; a zero one stays zero."""
        return self._mapped(
            lambda v: (v / (norms(v) or 1)).astype(np.float32), f"unit({self.name})"
        )

    def onto(self, other: Vector) -> Vector:
        """The part of it along `other`, at the layers that both have."""
        return self._paired(other, _along, "onto")

    def without(self, other: Vector) -> Vector:
        """It without the part along `other`, at the layers that both have."""
        return self._paired(other, lambda a, b: a - _along(a, b), "without")

    def at(self, layers: Iterable[int]) -> Vector:
        """The vector of these layers, as far as it has them. Raises `UsageError` if it has none."""
        chosen = {i: self.directions[i] for i in layers if i in self.directions}
        if not chosen:
            raise UsageError(f"{self.name} has none of these layers; it has {compact(self.layers)}")
        return replace(self, directions=chosen)

    def layers_among(self, given: Ranges | None, n_layer: int, name: str) -> list[int]:
        """Those of its layers that are asked for (`mia.ranges`), all for None; a notice names
        the ones that it does not have. Raises `RangeError`, or `UsageError` if it has none."""
        if given is None:
            return self.layers
        asked = parse_layers(given, n_layer)
        layers = self.at(asked).layers
        if missing := sorted(set(asked) - set(layers)):
            many = "s" if len(missing) > 1 else ""
            notice(f"{name} has no layer{many} {compact(missing)}: it is not steered there")
        return layers

    def renamed(self, name: str) -> Vector:
        return self.with_metadata(name=name)

    def with_metadata(self, **facts: str) -> Vector:
        return replace(self, metadata={**self.metadata, **facts})

    def _mapped(self, f: Callable[[Array], Array], name: str) -> Vector:
        with np.errstate(over="ignore", invalid="ignore"):  # the new vector refuses inf and NaN
            directions = {i: f(v).astype(np.float32) for i, v in self.directions.items()}
        return replace(self, directions=directions, metadata=_derived(name, self))

    def _paired(self, other: Vector, f: Callable[[Array, Array], Floats], word: str) -> Vector:
        with np.errstate(over="ignore", invalid="ignore"):
            directions = {i: f(self[i], other[i]).astype(np.float32) for i in self._common(other)}
        name = f"{_bracketed(self.name)} {word} {_bracketed(other.name)}"
        return Vector(directions, self.site, _derived(name, self, other))

    def _combined(self, other: Vector, sign: int, symbol: str) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        self._check_same(other)
        directions = dict(self.directions)
        with np.errstate(over="ignore", invalid="ignore"):
            for i, v in other.directions.items():
                directions[i] = directions[i] + sign * v if i in directions else sign * v
        second = _bracketed(other.name) if symbol == "-" else other.name
        return Vector(
            directions, self.site, _derived(f"{self.name} {symbol} {second}", self, other)
        )

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
                f"{self.name} (layers {compact(self.layers)}) and {other.name} "
                f"(layers {compact(other.layers)}) have no layer in common"
            )
        return both

    # -- use -----------------------------------------------------------------------

    def check(self, n_layer: int, width: int, source: str | None = None) -> None:
        """Raises `UsageError` if the vector does not fit a model of these sizes."""
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
        tokens: Tokens = None,
        generated: bool | None = None,
    ) -> list[Edit]:
        """Adds the vector: one edit per layer, of all its layers or only `layers`.

        `mia.Steering` has the other operators.
        """
        chosen = self if layers is None else self.at(layers)
        return [
            Edit(Site(self.site, i), "add", v, tokens=tokens, generated=generated, coeff=coeff)
            for i, v in chosen.directions.items()
        ]

    # -- files ---------------------------------------------------------------------

    def save(self, path: str | Path, *, layer_zero: bool = False) -> list[int]:
        """Writes safetensors if the name ends so, else control-vector GGUF.

        Args:
            layer_zero: keep a direction of layer 0 in a GGUF, which llama.cpp then refuses.

        Returns:
            The layers that were left out: [0], or [].

        Raises:
            UsageError: a GGUF of another site than `resid_post`, or of layer 0 only: llama.cpp
                would add it at the wrong place, or not at all.
            FileError: the file cannot be written.
        """
        path = Path(path)
        check_suffix(path, self.site)
        if path.suffix == ".safetensors":
            write_safetensors(path, self.directions, self.site, self.metadata)
            return []
        kept = {i: v for i, v in self.directions.items() if i or layer_zero}
        if not kept:
            raise UsageError(
                f"{path}: {self.name} has only layer 0, which llama.cpp's control vectors do not "
                "have; pass layer_zero=True to keep it, or write .safetensors"
            )
        write_gguf_vector(path, kept, self.metadata)
        return [i for i in self.layers if i not in kept]


def load(path: str | Path) -> Vector:
    """Reads a vector file.

    Raises `FileError` if there is none, or if it has numbers that are not finite.
    """
    path = Path(path)
    try:
        vector = Vector(*read_directions(path))
    except UsageError as err:
        raise FileError(f"{path}: {err}") from err
    return vector if "name" in vector.metadata else vector.renamed(path.stem)


# -- names and provenance ----------------------------------------------------------


def _along(a: Array, b: Array) -> Floats:
    square = dot(b, b)
    return dot(a, b) / square * b.astype(np.float64) if square else np.zeros(len(a))


def _bracketed(name: str) -> str:
    return name if re.fullmatch(r"[\w.*]+", name) else f"({name})"


def _sources(metadata: Mapping[str, str]) -> dict[str, dict[str, str]] | None:
    """The metadata of the operands that arithmetic made a vector of, by name; None if it did not.

    Raises `UsageError` if a file says something else there."""
    if "sources" not in metadata:
        return None
    text = metadata["sources"]
    try:
        sources = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        sources = None
    if not isinstance(sources, dict) or not all(
        isinstance(facts, dict) and all(isinstance(v, str) for v in facts.values())
        for facts in sources.values()
    ):
        raise UsageError(f"the vector's sources are {text!r:.60}, not the metadata of each operand")
    return sources


def _derived(name: str, *parents: Vector) -> dict[str, str]:
    """Metadata of a result: what all parents agree on, and the sources of each."""
    first = parents[0].metadata
    same = {k: v for k, v in first.items() if all(p.metadata.get(k) == v for p in parents)}
    sources: dict[str, dict[str, str]] = {}
    for p in parents:
        inherited = _sources(p.metadata)
        own = {k: v for k, v in p.metadata.items() if k not in ("name", "sources")}
        sources.update(inherited or {p.name: own})
    return {**same, "name": name, "sources": json.dumps(sources, ensure_ascii=False)}
