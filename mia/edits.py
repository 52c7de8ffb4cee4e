"""Edits: changes at a site while the model runs. Pure numpy.

An `Edit` says where (site, heads, dimensions), when (prompt tokens, generated tokens) and
what (an operator and its value). The operators, for a row h of the site, a value v, its unit
vector v̂ = v/|v| and a coefficient c:

| operator          | h becomes                                                       |
|-------------------|-----------------------------------------------------------------|
| `replace`         | c·v                                                             |
| `add`             | h + c·v                                                         |
| `scale`           | c·h                                                             |
| `zero`            | 0                                                               |
| `mean`            | the mean over v's rows (mean ablation)                          |
| `blend`           | h(1 - c) + c·v                                                  |
| `project_out`     | h - (h·v̂)v̂                                                      |
| `project_out_add` | h - (h·v̂)v̂ + c·v: the projection becomes exactly that of c·v    |
| `clamp`           | h + max(0, c|v| - h·v̂)v̂: the projection is at least that of c·v |
| `cap`             | h - max(0, h·v̂ - c|v|)v̂: the projection is at most that of c·v  |
| a function        | f(h), rows `(n, width)` in, the same shape out                  |

`OPERATORS` is the one table of them.

Values are `(width,)` for all selected tokens alike, or `(n_selected, width)`, one row per
selected prompt token in the order of `tokens`. `add`, `scale` and `blend` also take several
coefficients: n of them, each for width / n consecutive dimensions, so that at `head_out`
n_head coefficients are one per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from mia.arrays import Array, Floats, IntArray, norms
from mia.errors import RangeError, UsageError
from mia.sites import HEADED, Site
from mia.values import distinct, flag, number, real_array, shown, token_indices

Function = Callable[[Array], Array]
#: a coefficient as operators see it: one number, or an array that broadcasts over the rows
Coeff = np.float32 | Array
#: which prompt tokens: None for all, an index, a slice, or a sequence of indices
Tokens = int | slice | Sequence[int] | None


# -- operators ---------------------------------------------------------------------------


#: of a number x and one of the edit: their sum, the other one, their product
Operation = Literal["add", "set", "multiply"]


@dataclass(frozen=True, slots=True)
class Operator:
    """One row of the table of operators.

    Attributes:
        name, formula: as in the module's table.
        apply: rows h `(n, width)`, value v `(width,)` or `(n, width)`, coefficient c -> rows.
        value: whether it takes one; without one, v is empty.
        direction: v is a direction, which a zero vector has not: `apply` gets its unit vector
            as v, and c·|v| as c.
        average: a value of several rows stands for their mean.
        operation: if it is one sum, product or replacement of each number, which.
        coeff: whether c is ignored ("none"), is one number ("one"), or may also differ along
            the row ("each").
    """

    name: str
    formula: str
    apply: Callable[[Array, Array, Coeff], Array]
    value: bool = True
    direction: bool = False
    average: bool = False
    operation: Operation | None = None
    coeff: Literal["none", "one", "each"] = "one"


def _replace(h: Array, v: Array, c: Coeff) -> Array:
    return np.broadcast_to(v if c == 1 else c * v, h.shape)


def _add(h: Array, v: Array, c: Coeff) -> Array:
    return h + c * v


def _scale(h: Array, v: Array, c: Coeff) -> Array:
    return h * c


def _zero(h: Array, v: Array, c: Coeff) -> Array:
    return np.zeros_like(h)


def _mean(h: Array, v: Array, c: Coeff) -> Array:
    return np.broadcast_to(v, h.shape)


def _blend(h: Array, v: Array, c: Coeff) -> Array:
    return h * (1 - c) + v * c


def _projection(h: Array, unit: Array) -> Array:
    return (h * unit).sum(-1, keepdims=True)  # (n, 1)


def _project_out(h: Array, unit: Array, c: Coeff) -> Array:
    return h - _projection(h, unit) * unit


def _project_out_add(h: Array, unit: Array, c: Coeff) -> Array:
    return h + (c - _projection(h, unit)) * unit


def _clamp(h: Array, unit: Array, c: Coeff) -> Array:
    return h + np.maximum(c - _projection(h, unit), 0) * unit


def _cap(h: Array, unit: Array, c: Coeff) -> Array:
    return h + np.minimum(c - _projection(h, unit), 0) * unit


_TABLE = (
    Operator("replace", "c·v", _replace, operation="set"),
    Operator("add", "h + c·v", _add, operation="add", coeff="each"),
    Operator("scale", "c·h", _scale, value=False, operation="multiply", coeff="each"),
    Operator("zero", "0", _zero, value=False, operation="set", coeff="none"),
    Operator(
        "mean",
        "the mean over v's rows (mean ablation)",
        _mean,
        average=True,
        operation="set",
        coeff="none",
    ),
    Operator("blend", "h(1 - c) + c·v", _blend, coeff="each"),
    Operator("project_out", "h - (h·v̂)v̂", _project_out, direction=True, coeff="none"),
    Operator(
        "project_out_add",
        "h - (h·v̂)v̂ + c·v: the projection becomes exactly that of c·v",
        _project_out_add,
        direction=True,
    ),
    Operator(
        "clamp",
        "h + max(0, c|v| - h·v̂)v̂: the projection is at least that of c·v",
        _clamp,
        direction=True,
    ),
    Operator(
        "cap",
        "h - max(0, h·v̂ - c|v|)v̂: the projection is at most that of c·v",
        _cap,
        direction=True,
    ),
)
OPERATORS = {operator.name: operator for operator in _TABLE}
#: operators that no coefficient changes
WITHOUT_COEFF = tuple(o.name for o in _TABLE if o.coeff == "none")
_NO_VALUE = np.zeros(0, np.float32)


def _with_norm_of(h: Array, out: Array) -> Array:
    length = norms(out, keepdims=True)
    factor = norms(h, keepdims=True) / np.where(length > 0, length, 1)
    return np.asarray(out * factor, np.float32)


# -- edits -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site.

    Attributes:
        site: where; a `Site` or any spelling of one (`"l_out-14"`).
        op: an operator's name (see the module) or a function of rows `(n, width)`.
        value: `(width,)` or `(n_selected, width)` float32; width is that of the selection:
            all of the site, or `len(heads) × head_dim`, or `len(dims)`.
        tokens: which prompt tokens, each once; negative indices count from the end.
        generated: also while generating; by default only where `tokens` is None.
        heads: at a site of heads, only these; one or several, each once.
        dims: only these dimensions of the row (with `heads`, of each head).
        coeff: c of the operators; `add`, `scale` and `blend` take several (see the module).
        keep_norm: scale the selected part of each row back to the norm that it had.

    The value is copied. Raises `UsageError` if a field is of the wrong type.

    Two edits are the same only if they are the same object; requests that share one
    share the work up to where they differ.
    """

    site: Site | str
    op: str | Function
    value: Any = None
    tokens: Tokens = None
    _: KW_ONLY
    generated: bool | None = None
    heads: int | Sequence[int] | None = None
    dims: int | Sequence[int] | None = None
    coeff: float | Sequence[float] | Array = 1.0
    keep_norm: bool = False
    _operator: Operator | None = field(init=False, repr=False, default=None)
    # operators of a direction keep its unit vector here, and its length in `_length`
    _value: Array | None = field(init=False, repr=False, default=None)
    _length: Floats | None = field(init=False, repr=False, default=None)
    _coeff: Coeff = field(init=False, repr=False, default=np.float32(1))
    # the edit that this one is at more or fewer tokens (`on_text`)
    _origin: Edit | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.site, (str, Site)):
            raise UsageError(f"an edit's site is a name or a Site, not {shown(self.site)}")
        where = f"of the edit at {self.site}"
        tokens = token_indices(self.tokens, f"tokens {where}")
        object.__setattr__(self, "tokens", tokens)
        if self.generated is not None:
            flag(self.generated, f"generated {where}")
        for name in ("heads", "dims"):
            object.__setattr__(self, name, distinct(getattr(self, name), f"{name} {where}"))
        flag(self.keep_norm, f"keep_norm {where}")
        if isinstance(self.op, str):
            operator = OPERATORS.get(self.op)
            if operator is None:
                raise UsageError(f"unknown operator {self.op!r}; known: {', '.join(OPERATORS)}")
            if operator.value != (self.value is not None):
                raise UsageError(
                    f"operator {self.op!r} {'needs a' if operator.value else 'takes no'} value"
                )
            object.__setattr__(self, "_operator", operator)
        elif not callable(self.op):
            raise UsageError(f"op is neither an operator's name nor a function: {shown(self.op)}")
        object.__setattr__(self, "_coeff", self._checked_coeff())
        if self.value is not None:
            object.__setattr__(self, "_value", self._checked_value())
        if self._operator is not None and self._operator.direction:
            assert self._value is not None
            length = norms(self._value, keepdims=True)  # float64
            if not length.all():
                raise UsageError(f"the direction of the edit at {self.site} is zero")
            object.__setattr__(self, "_length", length)
            object.__setattr__(self, "_value", (self._value / length).astype(np.float32))

    def _checked_coeff(self) -> Coeff:
        if np.ndim(self.coeff) == 0:
            number(self.coeff, "coefficient")
        c = real_array(self.coeff, "an edit's coefficient")
        if not np.isfinite(c).all():
            raise UsageError(f"coefficient {shown(self.coeff)} is not a finite number")
        if c.ndim == 0:
            return np.float32(c)
        if self._operator is None or self._operator.coeff != "each":
            several = ", ".join(o.name for o in OPERATORS.values() if o.coeff == "each")
            raise UsageError(
                f"operator {self.op!r} takes one coefficient; several are for {several}"
            )
        if c.ndim > 1 or not len(c):
            raise UsageError(f"an edit's coefficients have 1 axis, not shape {c.shape}")
        return c

    def _checked_value(self) -> Array:
        v = real_array(self.value, f"the value of the edit at {self.site}")
        if v.ndim == 0 or v.ndim > 2:
            raise UsageError(f"an edit's value has 1 or 2 axes, not shape {v.shape}")
        if not np.isfinite(v).all():
            raise UsageError(
                f"the value of the edit at {self.site} has numbers that are not finite"
            )
        if self._operator is not None and self._operator.average and v.ndim == 2:
            v = v.mean(0, dtype=np.float64).astype(np.float32)
        return v

    @property
    def on_generated(self) -> bool:
        return self.tokens is None if self.generated is None else self.generated

    def positions(self, n_tokens: int) -> list[int]:
        """Indices of the selected prompt tokens, in the order of `tokens`. Raises `RangeError`, or
        `UsageError` if one is there twice."""
        positions = resolve_tokens(self.tokens, n_tokens)
        if len(set(positions)) < len(positions):
            twice = next(p for i, p in enumerate(positions) if p in positions[:i])
            raise UsageError(f"the edit at {self.site} selects token {twice} twice")
        return positions

    @property
    def origin(self) -> Edit:
        """The edit that this one is at other tokens (`on_text`): it does the same to a row."""
        return self._origin or self

    def on_text(self, n_prompt: int, n_tokens: int) -> Edit:
        """The edit as a run makes it that generates, for a run that reads what was generated.

        Its tokens are those of the first `n_prompt` tokens; if it is made at generated tokens too, it is
        at all tokens behind them. Only those of the first `n_tokens` tokens stay.
        """
        if self.tokens is None and self.on_generated:
            return self
        chosen = self.positions(n_prompt)
        kept = [i for i, p in enumerate(chosen) if p < n_tokens]
        positions = [chosen[i] for i in kept]
        if self.on_generated:
            positions += range(n_prompt, n_tokens)
        if self.tokens == positions:
            return self
        v, value = self._value, self.value
        has_rows = v is not None and v.ndim == 2 and len(v) > 1
        if has_rows:
            given = np.asarray(value)
            if len(given) != len(chosen):
                raise UsageError(
                    f"the edit at {self.site} selects {len(chosen)} tokens but has {len(given)} "
                    "rows of value"
                )
            value = given[kept or [0]]
        edit = replace(self, value=value, tokens=positions, generated=self.on_generated)
        if not has_rows:
            object.__setattr__(edit, "_origin", self.origin)
        return edit

    def check(self, site: Site, shape: tuple[int, ...], n_tokens: int) -> None:
        """Raises `UsageError` or `RangeError` if heads, dims or the value do not fit the number
        of tokens, or rows of `shape`: (width,) or (n_head, head_dim)."""
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
            if not site.kind.headed:
                raise UsageError(f"site {site} has no heads; heads are at {', '.join(HEADED)}")
            heads = _several(self.heads)
            for head in heads:
                if not 0 <= head < shape[0]:
                    raise RangeError(f"head {head} is out of range; {site} has 0 to {shape[0] - 1}")
            # the number of keys is not known yet
            per_head = 1 if site.kind.by_key else shape[-1]
            width = per_head * (len(heads) if self.dims is None else 1)
        if self.dims is None:
            return width
        dims = _several(self.dims)
        for d in dims:
            if not 0 <= d < width:
                raise RangeError(f"dimension {d} is out of range; {site} has 0 to {width - 1} here")
        return len(dims) * (len(_several(self.heads)) if self.heads is not None else 1)

    def apply(self, rows: Array, which: IntArray, picks: IntArray) -> None:
        """Changes `rows[which]` in place.

        Args:
            rows: `(n_rows, width)`, or `(n_rows, n_head, head_dim)` if the edit has `heads`.
            which: the rows of the batch to change.
            picks: for each of them, its row of the value: its place among the selected tokens.
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
        # what is too large becomes infinite, and the caller refuses that
        with np.errstate(over="ignore", invalid="ignore"):
            out = self._result(h, picks)
            if self.keep_norm:
                out = _with_norm_of(h, out)
            rows[index] = out.reshape(old.shape)

    def as_arithmetic(self, width: int, pick: int) -> tuple[Operation, Array] | None:
        """What the edit does to the selected part of one row, if it is one sum, product or replacement
        of each number: which, and what with, (width,). None if it is not.

        Args:
            pick: see `apply`.
        """
        if self._operator is None or self._operator.operation is None or self.keep_norm:
            return None
        # a sum with -0 is what is added, its sign too, and a product with 1 what it multiplies with
        h = np.full((1, width), 1 if self._operator.operation == "multiply" else -0.0, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            value = self._result(h, np.array([pick], np.intp))
        return self._operator.operation, np.ascontiguousarray(value[0], np.float32)

    def _result(self, h: Array, picks: IntArray) -> Array:
        """New rows for h (n, width)."""
        if not isinstance(self.op, str):
            out = real_array(self.op(h.copy()), f"what the function at {self.site} made")
            if out.shape != h.shape:
                raise UsageError(f"the function at {self.site} made {out.shape} of rows {h.shape}")
            return out
        assert self._operator is not None
        c = self._coeff
        if isinstance(c, np.ndarray):
            c = np.repeat(c, h.shape[1] // len(c))  # (width,)
        v, length = self._value, self._length
        if v is None:
            return self._operator.apply(h, _NO_VALUE, c)
        if v.ndim == 2:
            row = picks if v.shape[0] > 1 else 0
            v, length = v[row], None if length is None else length[row]
        if length is not None:
            c = np.asarray(c * length, np.float32)
        return self._operator.apply(h, v, c)


def _several(indices: int | Sequence[int]) -> Sequence[int]:
    """Heads or dims of an edit, which are a list since it was made."""
    assert not isinstance(indices, int)
    return indices


def as_slice(index: IntArray) -> IntArray | slice:
    """Consecutive indices as a slice, with which numpy is several times as fast."""
    first, n = int(index[0]), len(index)
    if n == 1 or (int(index[-1]) == first + n - 1 and bool((np.diff(index) == 1).all())):
        return slice(first, first + n)
    return index


def resolve_tokens(tokens: Tokens, n_tokens: int) -> list[int]:
    """Token indices from None (all), an index, a slice or a sequence; negative ones count
    from the end. Raises `RangeError` naming the valid range."""
    if tokens is None:
        return list(range(n_tokens))
    if isinstance(tokens, slice):
        return list(range(n_tokens))[tokens]
    indices = [tokens] if isinstance(tokens, (int, np.integer)) else list(tokens)
    for t in indices:
        if not -n_tokens <= t < n_tokens:
            raise RangeError(
                f"token index {t} is out of range; the prompt has {n_tokens} tokens, 0 to {n_tokens - 1}"
            )
    return [int(t) % n_tokens for t in indices]
