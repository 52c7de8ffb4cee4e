"""The axes of a sweep, and the place that each of its cells stands for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mia.errors import UsageError

#: what a sweep can run over
AXES = ("layer", "head", "token", "site", "neuron", "coeff")

#: axis -> index along it
Cell = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One axis: its name (see `AXES`), and its values with what a picture calls them."""

    name: str
    values: tuple[Any, ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in AXES:
            raise UsageError(f"unknown axis {self.name!r}; known: {', '.join(AXES)}")
        if not self.values:
            raise UsageError(f"the axis {self.name} is empty")
        if not self.labels:
            object.__setattr__(self, "labels", tuple(str(v) for v in self.values))

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Place:
    """Where a run is changed, and how much.

    Attributes:
        layers, tokens: which; tokens are positions in the run that is changed.
        heads, neurons: only these of the site's row; None for all.
    """

    site: str
    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    coeff: float = 1.0


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep: the product of its axes.

    Attributes:
        rest: what no axis says.
        window: so many layers around that of a cell are changed together (Meng et al. 2022 take 10
            for MLPs and attention); 1 is the layer alone.
        only: the cells that `cells` gives; None for all.
    """

    axes: tuple[Axis, ...]
    rest: Place
    n_layer: int
    window: int = 1
    only: range | None = None

    def __post_init__(self) -> None:
        names = [a.name for a in self.axes]
        if not names:
            raise UsageError(f"a sweep needs an axis; known: {', '.join(AXES)}")
        if twice := [n for n in names if names.count(n) > 1]:
            raise UsageError(f"the axis {twice[0]} is given twice")
        if self.window < 1:
            raise UsageError(f"a window of {self.window} layers; at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(a) for a in self.axes)

    def __len__(self) -> int:
        n = 1
        for axis in self.axes:
            n *= len(axis)
        return n

    def cells(self) -> Iterator[Cell]:
        """Every cell, the last axis fastest."""
        if self.only is not None:
            return (self.cell(i) for i in self.only)
        return itertools.product(*(range(len(a)) for a in self.axes))

    def cell(self, i: int) -> Cell:
        """Cell i of all, the last axis fastest."""
        out: list[int] = []
        for n in reversed(self.shape):
            i, at = divmod(i, n)
            out.append(at)
        return tuple(reversed(out))

    def part(self, start: int, stop: int) -> Grid:
        """The same grid, of which `cells` gives only those from `start` to `stop` - 1."""
        return replace(self, only=range(start, stop))

    def values(self, cell: Cell) -> dict[str, Any]:
        """axis -> its value in a cell."""
        return {a.name: a.values[i] for a, i in zip(self.axes, cell, strict=True)}

    def place(self, cell: Cell) -> Place:
        """What a cell changes."""
        return self._at(self.values(cell))

    def _at(self, values: Mapping[str, Any]) -> Place:
        place = self.rest
        if "layer" in values:
            place = replace(place, layers=window(values["layer"], self.window, self.n_layer))
        if "token" in values:
            place = replace(place, tokens=(values["token"],))
        if "head" in values:
            place = replace(place, heads=(values["head"],))
        if "neuron" in values:
            place = replace(place, neurons=(values["neuron"],))
        if "site" in values:
            place = replace(place, site=values["site"])
        if "coeff" in values:
            place = replace(place, coeff=values["coeff"])
        return place


def window(layer: int, width: int, n_layer: int) -> tuple[int, ...]:
    """`width` layers around one, cut off at the ends of the model."""
    first = layer - width // 2
    return tuple(i for i in range(first, first + width) if 0 <= i < n_layer)


def axis_names(over: str | Sequence[str]) -> tuple[str, ...]:
    """`"layer,token"` or several names. Raises `UsageError`."""
    names = over.split(",") if isinstance(over, str) else list(over)
    names = [n.strip() for n in names]
    for name in names:
        if name not in AXES:
            raise UsageError(f"unknown axis {name!r}; known: {', '.join(AXES)}")
    return tuple(names)
