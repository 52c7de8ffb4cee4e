"""Steering: a vector that changes a site while the model runs.

    with model.steered(Steering(vector, "project_out", layers=[14])):
        print(model.generate("I went to the cinema and"))

Sources: addition, Turner et al. 2023 (arXiv 2308.10248) and Rimsky et al. 2023
(2312.06681); removing a direction, Arditi et al. 2024 (2406.11717, eq. 4); a floor under
the projection, as "clamping" of features in Templeton et al. 2024.

Operators are those of `mia.edits` that take a value, with the vector as v and the
coefficient as c, or a function `f(rows, v, c)` of rows `(n, width)` (`module:function` names
one). An `add` at all tokens at `resid_post` runs as llama.cpp's control vector, at no cost;
everything else runs in the callback (`mia.methods.steering.explain` tells which and why).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mia.arrays import Array
from mia.edits import OPERATORS, Edit, Function, Tokens
from mia.errors import UsageError
from mia.plugins import load_function
from mia.sites import Site
from mia.values import distinct, flag, number, shown, token_indices
from mia.vectors import Vector

#: rows (n, width), direction (width,), coefficient -> rows
SteeringFunction = Callable[[Array, Array, float], Array]


@dataclass(frozen=True, eq=False)
class Steering:
    """A vector, and how it changes the model.

    Attributes:
        op: an operator of `mia.edits` that takes a value, a function (rows, v, c) -> rows, or
            `module:function`.
        coeff: c.
        layers: some of the vector's layers; None for all of them.
        tokens: prompt tokens; None for all. `slice(i, None)` is token i and later.
        generated: also generated tokens; by default only if `tokens` is None.
        keep_norm: keep the norm of each row.
    """

    vector: Vector
    op: str | SteeringFunction = "add"
    coeff: float = 1.0
    layers: int | Sequence[int] | None = None
    tokens: Tokens = None
    generated: bool | None = None
    keep_norm: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Vector):
            raise UsageError(f"a Steering's vector is a Vector, not {shown(self.vector)}")
        if not isinstance(self.op, str) and not callable(self.op):
            raise UsageError(f"op is neither an operator's name nor a function: {shown(self.op)}")
        number(self.coeff, "coefficient")
        distinct(self.layers, "layers of a Steering")
        token_indices(self.tokens, "tokens of a Steering")
        if self.generated is not None:
            flag(self.generated, "generated of a Steering")
        flag(self.keep_norm, "keep_norm of a Steering")

    def edits(self) -> list[Edit]:
        """One edit per layer. Requests must share them to be steered by a control vector.

        Raises `UsageError` for an unknown operator, or if the vector has none of the layers.
        """
        layers = distinct(self.layers, "layers of a Steering")
        chosen = self.vector if layers is None else self.vector.at(layers)
        op = self._operator()
        return [
            Edit(
                Site(chosen.site, layer),
                op if isinstance(op, str) else self._bound(op, chosen[layer]),
                chosen[layer] if isinstance(op, str) else None,
                tokens=self.tokens,
                generated=self.generated,
                coeff=self.coeff if isinstance(op, str) else 1.0,
                keep_norm=self.keep_norm,
            )
            for layer in chosen.layers
        ]

    def _operator(self) -> str | SteeringFunction:
        """An operator's name, or a function."""
        if not isinstance(self.op, str):
            return self.op
        if ":" in self.op:
            return load_function(self.op)
        if self.op not in OPERATORS:
            known = [o.name for o in OPERATORS.values() if o.value]
            raise UsageError(
                f"unknown operator {self.op!r}; known: {', '.join(known)}, or module:function"
            )
        return self.op

    def _bound(self, f: SteeringFunction, v: Array) -> Function:
        """The function of rows alone, under the name that `explain` prints."""

        def bound(rows: Array) -> Array:
            return f(rows, v, self.coeff)

        name = f"{getattr(f, '__module__', '')}:{getattr(f, '__qualname__', type(f).__name__)}"
        bound.__name__ = self.op if isinstance(self.op, str) else name
        return bound


class Handle:
    """Steering that stays on a model until it is removed; a context manager too."""

    def __init__(self, standing: list[Edit], edits: Sequence[Edit]):
        """Adds edits to a model's `standing_edits`."""
        self._standing, self.edits = standing, list(edits)
        standing.extend(self.edits)

    def remove(self) -> None:
        """Takes the steering off. A second call does nothing."""
        own = {id(e) for e in self.edits}
        self._standing[:] = [e for e in self._standing if id(e) not in own]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
