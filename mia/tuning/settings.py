"""Settings of an intervention, and what a trial of one gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mia.edits import OPERATORS, WITHOUT_COEFF, Edit
from mia.errors import UsageError
from mia.ranges import compact
from mia.steering import Steering
from mia.values import number, whole
from mia.vectors import Vector


@dataclass(frozen=True)
class Setting:
    """An operator, consecutive layers, and a coefficient (1 for operators that take none)."""

    operator: str
    layers: tuple[int, ...]
    coeff: float

    @property
    def takes_coeff(self) -> bool:
        return self.operator not in WITHOUT_COEFF

    def steering(self, vector: Vector, *, keep_norm: bool = False) -> Steering:
        return Steering(vector, self.operator, self.coeff, self.layers, keep_norm=keep_norm)

    def edits(self, vector: Vector, *, keep_norm: bool = False) -> list[Edit]:
        return self.steering(vector, keep_norm=keep_norm).edits()

    def document(self) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "layers": compact(self.layers),
            "coeff": self.coeff if self.takes_coeff else None,
        }

    def __str__(self) -> str:
        coeff = f" {self.coeff:g}" if self.takes_coeff else ""
        return f"{self.operator}{coeff} at {compact(self.layers)}"


@dataclass(frozen=True)
class Trial:
    """What a setting gave.

    Attributes:
        score: larger is better; NaN where the model's numbers were not finite.
        kl: mean KL from the plain model, in nats per token; infinite there.
    """

    setting: Setting
    score: float
    kl: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.score) and math.isfinite(self.kl)


def all_settings(
    layers: Sequence[int],
    operators: Sequence[str],
    widths: Sequence[int],
    coeffs: Sequence[float],
) -> list[Setting]:
    """Every setting: for each operator and width, all runs of so many consecutive layers, with each
    coefficient. A width that no layers have is left out.

    Raises `UsageError` for an unknown operator, or where nothing is left to try.
    """
    known = [o.name for o in OPERATORS.values() if o.value]
    for operator in operators:
        if operator not in known and ":" not in operator:
            raise UsageError(
                f"unknown operator {operator!r}; known: {', '.join(known)}, or module:function"
            )
    if not (operators and widths and coeffs):
        raise UsageError("a search needs an operator, a width and a coefficient to try")
    strengths = list(dict.fromkeys(number(c, "coefficient") for c in coeffs))
    sizes = dict.fromkeys(whole(w, "width") for w in widths)
    windows = [window for width in sizes for window in _windows(layers, width)]
    if not windows:
        raise UsageError(
            f"no {min(sizes)} consecutive layers are among layers {compact(sorted(layers))}"
        )
    return [
        Setting(operator, window, c)
        for operator in dict.fromkeys(operators)
        for window in windows
        for c in ([1.0] if operator in WITHOUT_COEFF else strengths)
    ]


def _windows(layers: Sequence[int], width: int) -> list[tuple[int, ...]]:
    if width < 1:
        raise UsageError(f"a width of {width} layers; at least 1")
    have = set(layers)
    windows = [tuple(range(first, first + width)) for first in sorted(have)]
    return [window for window in windows if have.issuperset(window)]
