"""Edits: changes at a site, while the model runs. Pure numpy.

An `Edit` says where (site, heads, dimensions), when (prompt tokens, generated
tokens) and what (an operator and its value). The operators, for a row h of the
site and a value v:

| operator          | h becomes                                                       |
|-------------------|-----------------------------------------------------------------|
| `replace`         | v                                                               |
| `add`             | h + c·v                                                         |
| `scale`           | c·h                                                             |
| `zero`            | 0                                                               |
| `mean`            | the mean over v's rows (mean ablation)                          |
| `blend`           | h(1 - w) + v·w                                                  |
| `project_out`     | h - (h·v̂)v̂, v̂ = v/|v|                                          |
| `project_out_add` | h - (h·v̂)v̂ + c·v: the projection becomes exactly c·v's          |
| `clamp`           | h + max(0, c|v| - h·v̂)v̂: the projection is at least that of c·v |
| `cap`             | h - max(0, h·v̂ - c|v|)v̂: the projection is at most that of c·v  |
| a function        | f(h), rows `(n, width)` in, the same shape out                  |

Values are `(width,)` for all selected tokens alike, or `(n_selected, width)`,
one row per selected prompt token in the order of `tokens`. In `add`, `scale` and `blend`
the coefficient may differ along the row: n numbers, each for width / n dimensions that
follow one another, so that at `head_out` n_head numbers are one for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.errors import RangeError, UsageError
from mia.sites import BY_KEY, HEADED, Site

Array = npt.NDArray[np.float32]
Function = Callable[[Array], Array]
#: a coefficient as operators see it: one number, or one for each dimension of the row
Coeff = np.float32 | Array
#: which prompt tokens: None for all, an index, a slice, or a sequence of indices
Tokens = int | slice | Sequence[int] | None


def _replace(h: Array, v: Array, c: Coeff) -> Array:
    return np.broadcast_to(v, h.shape)


def _add(h: Array, v: Array, c: Coeff) -> Array:
    return h + c * v


def _blend(h: Array, v: Array, c: Coeff) -> Array:
    return h * (1 - c) + v * c


def _project_out(h: Array, unit: Array, length: Array, c: Coeff) -> Array:
    return h - (h * unit).sum(-1, keepdims=True) * unit


def _project_out_add(h: Array, unit: Array, length: Array, c: Coeff) -> Array:
    return h + (c * length - (h * unit).sum(-1, keepdims=True)) * unit


def _clamp(h: Array, unit: Array, length: Array, c: Coeff) -> Array:
    return h + np.maximum(c * length - (h * unit).sum(-1, keepdims=True), 0) * unit


def _cap(h: Array, unit: Array, length: Array, c: Coeff) -> Array:
    return h + np.minimum(c * length - (h * unit).sum(-1, keepdims=True), 0) * unit


def _with_norm_of(h: Array, out: Array) -> Array:
    norms = np.linalg.norm(out, axis=-1, keepdims=True)
    return out * (np.linalg.norm(h, axis=-1, keepdims=True) / np.where(norms > 0, norms, 1))


_WITH_VALUE: dict[str, Callable[[Array, Array, Coeff], Array]] = {
    "replace": _replace,
    "add": _add,
    "mean": _replace,
    "blend": _blend,
}
#: operators of v as a direction, which a zero vector has not, and a length
_DIRECTED: dict[str, Callable[[Array, Array, Array, Coeff], Array]] = {
    "project_out": _project_out,
    "project_out_add": _project_out_add,
    "clamp": _clamp,
    "cap": _cap,
}
#: operators whose coefficient may differ along the row
_ALONG = ("add", "scale", "blend")
_WITHOUT_VALUE: dict[str, Callable[[Array, Coeff], Array]] = {
    "scale": lambda h, c: h * c,
    "zero": lambda h, c: np.zeros_like(h),
}
OPERATORS = (*_WITH_VALUE, *_DIRECTED, *_WITHOUT_VALUE)


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site.

    Attributes:
        site: where; a `Site` or any spelling of one (`"l_out-14"`).
        op: an operator's name (see the module) or a function of rows `(n, width)`.
        value: `(width,)` or `(n_selected, width)` float32; width is that of what is
            selected: all of the site, or `len(heads) × head_dim`, or `len(dims)`.
        tokens: which prompt tokens; negative indices count from the end.
        generated: also while generating; by default only where `tokens` is None.
        heads: at a site of heads, only these.
        dims: only these dimensions of the row (of each head, where `heads` is given).
        coeff: c or w of the operators; `add`, `scale` and `blend` take several (see the module).
        keep_norm: what was selected of each row is scaled back to the norm that it had.

    Two edits are the same only if they are the same object; requests that share one
    share the work up to where they differ.
    """

    site: Site | str
    op: str | Function
    value: Any = None
    tokens: Tokens = None
    generated: bool | None = None
    heads: Sequence[int] | None = None
    dims: Sequence[int] | None = None
    coeff: float | Sequence[float] | Array = 1.0
    keep_norm: bool = False
    # operators of a direction keep it as a unit vector, its length apart
    _value: Array | None = field(init=False, repr=False, default=None)
    _length: Array | None = field(init=False, repr=False, default=None)
    _coeff: Coeff = field(init=False, repr=False, default=np.float32(1))

    def __post_init__(self) -> None:
        if isinstance(self.op, str):
            if self.op not in OPERATORS:
                raise UsageError(f"unknown operator {self.op!r}; known: {', '.join(OPERATORS)}")
            with_value = self.op not in _WITHOUT_VALUE
            if with_value != (self.value is not None):
                raise UsageError(
                    f"operator {self.op!r} {'needs a' if with_value else 'takes no'} value"
                )
        elif not callable(self.op):
            raise UsageError(f"op is neither an operator's name nor a function: {self.op!r}")
        object.__setattr__(self, "_coeff", self._checked_coeff())
        if self.value is not None:
            object.__setattr__(self, "_value", self._checked_value())
        if isinstance(self.op, str) and self.op in _DIRECTED:
            assert self._value is not None
            length = np.linalg.norm(self._value, axis=-1, keepdims=True)
            if not length.all():
                raise UsageError(f"the direction of the edit at {self.site} is zero")
            object.__setattr__(self, "_length", length)
            object.__setattr__(self, "_value", self._value / length)

    def _checked_coeff(self) -> Coeff:
        c = np.asarray(self.coeff, np.float32)
        if not np.isfinite(c).all():
            raise UsageError(f"coefficient {self.coeff} is not a finite number")
        if c.ndim == 0:
            return np.float32(c)
        if self.op not in _ALONG:
            raise UsageError(
                f"operator {self.op!r} takes one coefficient; several are for {', '.join(_ALONG)}"
            )
        if c.ndim > 1 or not len(c):
            raise UsageError(f"an edit's coefficients have 1 axis, not shape {c.shape}")
        return c

    def _checked_value(self) -> Array:
        v = np.asarray(self.value, np.float32)
        if v.ndim == 0 or v.ndim > 2:
            raise UsageError(f"an edit's value has 1 or 2 axes, not shape {v.shape}")
        if not np.isfinite(v).all():
            raise UsageError(
                f"the value of the edit at {self.site} has numbers that are not finite"
            )
        if self.op == "mean" and v.ndim == 2:
            v = v.mean(0)
        return v

    @property
    def on_generated(self) -> bool:
        return self.tokens is None if self.generated is None else self.generated

    def positions(self, n_tokens: int) -> list[int]:
        """Indices of the prompt tokens meant, in the order of `tokens`.

        Raises `RangeError` naming the valid range.
        """
        return resolve_tokens(self.tokens, n_tokens)

    def check(self, site: Site, shape: tuple[int, ...], n_tokens: int) -> None:
        """Raises where heads, dims or the value do not fit rows of `shape` (width,) or
        (n_head, head_dim), or the number of tokens."""
        width = self._width(site, shape)
        c = self._coeff
        if isinstance(c, np.ndarray) and width % len(c):
            raise UsageError(
                f"{site} has rows of {width} here, which {len(c)} coefficients do not divide"
            )
        v = self._value
        if v is None:
            return
        if v.shape[-1] != width:
            raise UsageError(f"{site} has rows of {width} here, the edit's value has {v.shape[-1]}")
        if v.ndim == 2 and v.shape[0] > 1:
            if self.on_generated:
                raise UsageError(
                    f"an edit of generated tokens at {site} takes one row, not {v.shape[0]}"
                )
            n = len(self.positions(n_tokens))
            if n != v.shape[0]:
                raise UsageError(
                    f"the edit at {site} selects {n} tokens but has {v.shape[0]} rows of value"
                )

    def _width(self, site: Site, shape: tuple[int, ...]) -> int:
        if self.heads is None:
            width = int(np.prod(shape))
        else:
            if site.name not in HEADED:
                raise UsageError(f"site {site} has no heads; heads are at {', '.join(HEADED)}")
            for head in self.heads:
                if not 0 <= head < shape[0]:
                    raise RangeError(f"head {head} is out of range; {site} has 0 to {shape[0] - 1}")
            per_head = (
                1 if site.name in BY_KEY else shape[-1]
            )  # the number of keys is not known yet
            width = per_head * (len(self.heads) if self.dims is None else 1)
        if self.dims is None:
            return width
        for d in self.dims:
            if not 0 <= d < width:
                raise RangeError(f"dimension {d} is out of range; {site} has 0 to {width - 1} here")
        return len(self.dims) * (len(self.heads) if self.heads is not None else 1)

    def apply(self, rows: Array, which: npt.NDArray[np.intp], picks: npt.NDArray[np.intp]) -> None:
        """Changes `rows[which]` in place.

        Args:
            rows: `(n_rows, width)` or, where `heads` is set, `(n_rows, n_head, head_dim)`.
            which: rows of the batch.
            picks: for each of them, its place among the selected tokens (its row of the value).
        """
        index: Any = as_slice(which)
        if self.heads is not None:
            heads = np.asarray(self.heads, np.intp)
            if self.dims is None:
                index = (which[:, None], heads)
            else:
                index = (which[:, None, None], heads[:, None], np.asarray(self.dims, np.intp))
        elif self.dims is not None:
            index = (which[:, None], np.asarray(self.dims, np.intp))
        old = rows[index]
        h = old.reshape(len(which), -1)
        out = self._result(h, picks)
        if self.keep_norm:
            out = _with_norm_of(h, out)
        rows[index] = out.reshape(old.shape)

    def _result(self, h: Array, picks: npt.NDArray[np.intp]) -> Array:
        if not isinstance(self.op, str):
            out = np.asarray(self.op(h.copy()), np.float32)
            if out.shape != h.shape:
                raise UsageError(f"the function at {self.site} made {out.shape} of rows {h.shape}")
            return out
        c = self._coeff
        if isinstance(c, np.ndarray):
            c = np.repeat(c, h.shape[1] // len(c))
        if self.op in _WITHOUT_VALUE:
            return _WITHOUT_VALUE[self.op](h, c)
        v, length = self._value, self._length
        assert v is not None
        if v.ndim == 2:
            at = picks if v.shape[0] > 1 else 0
            v, length = v[at], None if length is None else length[at]
        if length is not None:
            return _DIRECTED[self.op](h, v, length, c)
        return _WITH_VALUE[self.op](h, v, c)


def as_slice(index: npt.NDArray[np.intp]) -> npt.NDArray[np.intp] | slice:
    """Indices that follow each other as a slice, which numpy takes several times as fast."""
    first, n = int(index[0]), len(index)
    if n == 1 or (int(index[-1]) == first + n - 1 and bool((np.diff(index) == 1).all())):
        return slice(first, first + n)
    return index


def resolve_tokens(tokens: Tokens, n_tokens: int) -> list[int]:
    """Token indices from None (all), an index, a slice or a sequence; negative ones count
    from the end. Raises `RangeError`."""
    if tokens is None:
        return list(range(n_tokens))
    if isinstance(tokens, slice):
        return list(range(n_tokens))[tokens]
    wanted = [tokens] if isinstance(tokens, (int, np.integer)) else list(tokens)
    for t in wanted:
        if not -n_tokens <= t < n_tokens:
            raise RangeError(
                f"token index {t} is out of range; the prompt has {n_tokens} tokens, 0 to {n_tokens - 1}"
            )
    return [int(t) % n_tokens for t in wanted]
