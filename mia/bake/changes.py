"""Edits as low-rank changes of the matrices that write the edited site.

A site that is a product, y = W x, is edited for all tokens by another matrix:

| edit                                  | W becomes                                             |
|---------------------------------------|-------------------------------------------------------|
| `project_out` of r, or `Removal`      | W - s·r(rᵀW), s = 1 for `project_out`                 |
| the same behind a scale, d·(W x)      | W - s·(r/d)((d·r)ᵀW), element by element              |
| `zero` or `scale` of heads            | W + (c - 1)·W_h, the columns that read these heads    |
| of the embedding's rows e             | E - s·(E r)rᵀ                                         |

Each is W + left · right with few columns and rows. Biases beside W change as W's own columns do. Behind an
RMS norm, y = d·(W x) / |W x|, that is the edit but for |W x|, which is another: the row is that of the edit times one
number for each token. So with s = 1 nothing is left along r, exactly, and the rest is longer or shorter.

Arditi et al. 2024 (arXiv 2406.11717, section 4 and eq. 5) orthogonalize weights so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.arrays import Array, Floats
from mia.edits import Edit
from mia.engine.writers import Writer, writers
from mia.errors import ModelError, UsageError
from mia.llama.weights import Weights
from mia.sites import Site, parse

if TYPE_CHECKING:
    from mia.model import Model

#: sites whose rows are sums of products
WRITTEN = ("attn_out", "mlp_out")
#: a bias counts as having no part along a direction below this share of its length
_NO_PART = 1e-6
#: `remove` as steering names it
REMOVE = "mia.bake.changes:remove"
#: rows of a matrix that are read at a time, in numbers
_BLOCK = 1 << 24


def remove(rows: Array, v: Array, c: float) -> Array:
    """rows - c·(rows·v̂)v̂: c = 1 removes a direction, 0.5 half of it, -1 doubles it. As an operator of
    steering: `REMOVE`."""
    unit = (v / np.linalg.norm(v.astype(np.float64))).astype(np.float32)
    return np.asarray(rows - np.float32(c) * (rows @ unit)[:, None] * unit, np.float32)


class Removal:
    """An edit's function: `remove` with a direction (width,) and a strength."""

    def __init__(self, direction: Array, strength: float):
        self.direction, self.strength = direction, strength
        self.__name__ = f"remove {strength:g}"

    def __call__(self, rows: Array) -> Array:
        return remove(rows, self.direction, self.strength)


@dataclass(eq=False)
class Change:
    """What is added to a tensor: left · right.

    Attributes:
        left, right: (n_out, rank) and (rank, n_in); of experts both with an axis in front. A bias is a
            matrix with one column.
    """

    tensor: str
    kind: str
    left: list[Floats] = field(default_factory=list)
    right: list[Floats] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return sum(x.shape[-1] for x in self.left)

    def add(self, left: Floats, right: Floats) -> None:
        self.left.append(left)
        self.right.append(right)

    def factors(self) -> tuple[Floats, Floats]:
        """All of it as two factors."""
        return np.concatenate(self.left, -1), np.concatenate(self.right, -2)

    def times(self, u: Floats) -> Floats:
        """uᵀ · left · right, (n_in,), or (n_expert, n_in)."""
        total: Floats = np.zeros(())
        for a, b in zip(self.left, self.right, strict=True):
            total = total + (np.einsum("o,eor,eri->ei", u, a, b) if a.ndim == 3 else u @ a @ b)
        return total


class Baked:
    """The changes of a list of edits, by tensor, in the order of the edits.

    Attributes:
        changes: by tensor.
        notes: what is not exact.
    """

    def __init__(self, model: Model, edits: Sequence[Edit]):
        """Raises `UsageError` for an edit that no change of weights does, saying why."""
        if model.adapters:
            raise UsageError(
                f"{model.name} is open with LoRA adapters; bake into the model without them"
            )
        self._model, self._weights = model, model.weights
        self._topology = model.topology
        self.changes: dict[str, Change] = {}
        self.notes: dict[str, None] = {}
        for edit in edits:
            self._bake(edit, parse(edit.site, model.n_layer))

    def _bake(self, edit: Edit, site: Site) -> None:
        if edit.tokens is not None or not edit.on_generated:
            raise UsageError(
                f"the edit at {site} is of some tokens only; weights are the same for all tokens"
            )
        if edit.keep_norm:
            raise UsageError(f"the edit at {site} keeps norms, which no change of weights does")
        if site.name == "head_out":
            return self._heads(edit, site)
        if site.name not in (*WRITTEN, "embed") and site != Site("resid_pre", 0):
            raise UsageError(
                f"{site} is not written by matrices of its own; what can be baked is at "
                f"{', '.join(WRITTEN)}, embed, resid_pre.0 and head_out"
            )
        if edit.heads is not None or edit.dims is not None:
            raise UsageError(f"the edit at {site} is of some dimensions only; mia bakes whole rows")
        direction, strength = _direction(edit, site)
        for writer in self._writers(site):
            self._project(writer, site, direction, strength)

    def _writers(self, site: Site) -> list[Writer]:
        try:
            return writers(self._topology, site)
        except ModelError as err:
            raise UsageError(f"{self._model.name} cannot be baked: {err}") from err

    def _of(self, writer: Writer) -> Change:
        return self.changes.setdefault(writer.tensor, Change(writer.tensor, writer.kind))

    def _project(self, writer: Writer, site: Site, r: Floats, strength: float) -> None:
        d = np.ones_like(r)
        for name in writer.scales:
            d = d * self._weights.vector(name)
        if (np.abs(d) < 1e-4 * np.abs(d).max()).any():
            raise UsageError(
                f"what {writer.tensor} writes is multiplied by numbers near zero "
                f"({', '.join(writer.scales)}), behind which a direction cannot be told"
            )
        if writer.normed:
            self.notes[
                f"{site.name} has a norm behind it: of a direction as much is removed as by the edit, but "
                "the whole row is scaled by a number for each token, which the edit does not do"
            ] = None
        change, u = self._of(writer), r * d
        if writer.kind == "table":
            along = self._rows_times(writer.tensor, u).reshape(-1, 1)
            for a, b in zip(change.left, change.right, strict=True):
                along = along + a @ (b @ u)[:, None]
            change.add(-strength * along, (r / d)[None])
        elif writer.kind == "bias":
            rows = self._weights.rows(writer.tensor, 0, self._n_rows(writer.tensor))
            own = rows.astype(np.float64).reshape(-1, len(r))
            part = own @ u + np.atleast_1d(change.times(u))  # one, or one for each expert
            if np.abs(part).max() > _NO_PART * np.abs(own).max():
                change.add(-strength * (r / d)[:, None], part.reshape(1, -1))
        elif writer.kind == "experts":
            part = self._times(writer.tensor, u) + change.times(u)  # (n_expert, n_in)
            left = np.broadcast_to(-strength * (r / d)[:, None], (len(part), len(r), 1))
            change.add(left, part[:, None])
        else:
            part = self._times(writer.tensor, u)[0] + change.times(u)
            change.add(-strength * (r / d)[:, None], part[None])

    def _heads(self, edit: Edit, site: Site) -> None:
        """Heads scaled where W_O reads them: columns of W_O scaled."""
        if edit.op not in ("zero", "scale") or np.ndim(edit.coeff):
            raise UsageError(
                f"{_named(edit)} at {site} has no form in weights: heads can be baked with zero and "
                "scale; a mean or another value is a bias, which W_O has none for"
            )
        if edit.dims is not None:
            raise UsageError(
                f"the edit at {site} is of some dimensions only; mia bakes whole heads"
            )
        if "norm" in self._topology.notes.get(site, ""):
            raise UsageError(
                f"{site} is {self._topology.notes[site]}; W_O does not read it as it is"
            )
        c = 0.0 if edit.op == "zero" else float(np.asarray(edit.coeff))
        n_head, dim = self._topology.sites[site].shape
        heads = range(n_head) if edit.heads is None else _listed(edit.heads)
        columns = np.concatenate([np.arange(h * dim, (h + 1) * dim) for h in heads])
        assert site.layer is not None
        for writer in self._writers(Site("attn_out", site.layer)):
            if writer.kind == "bias":
                continue  # it is added whatever the heads give
            rows, n_in = self._weights.shape(writer.tensor)
            if writer.kind != "matrix" or n_in != n_head * dim:
                raise UsageError(f"{writer.tensor} does not read the heads of {site} side by side")
            change = self._of(writer)
            pick = np.zeros((len(columns), n_in))
            pick[np.arange(len(columns)), columns] = 1
            own = self._weights.rows(writer.tensor, 0, rows)[:, columns].astype(np.float64)
            for a, b in zip(change.left, change.right, strict=True):
                own = own + a @ b[:, columns]
            change.add((c - 1) * own, pick)

    # -- the file's matrices -----------------------------------------------------------------

    def _n_rows(self, name: str) -> int:
        return int(np.prod(self._weights.shape(name)[:-1], dtype=int))

    def _times(self, name: str, u: Floats) -> Floats:
        """uᵀW of each matrix of a tensor, (n_matrices, n_in)."""
        n_in, n_out = self._weights.shape(name)[-1], len(u)
        out = np.zeros((self._n_rows(name) // n_out, n_in))
        size = max(_BLOCK // n_in, 1)
        for i in range(len(out)):
            for start in range(0, n_out, size):
                stop = min(start + size, n_out)
                rows = self._weights.rows(name, i * n_out + start, i * n_out + stop)
                out[i] += u[start:stop] @ rows.astype(np.float64)
        return out

    def _rows_times(self, name: str, r: Floats) -> Floats:
        """W r of a table, (n_rows,)."""
        n, size = self._n_rows(name), max(_BLOCK // len(r), 1)
        parts = [self._weights.rows(name, i, min(i + size, n)) @ r for i in range(0, n, size)]
        return np.concatenate(parts)


def _direction(edit: Edit, site: Site) -> tuple[Floats, float]:
    """A unit direction, and how much of it is removed."""
    if isinstance(edit.op, Removal):
        value, strength = edit.op.direction, edit.op.strength
    elif edit.op == "project_out":
        value, strength = np.asarray(edit.value), 1.0
    else:
        raise UsageError(f"{_named(edit)} at {site} has no form in weights: {_why_not(edit)}")
    v = np.asarray(value, np.float64)
    if v.ndim != 1:
        raise UsageError(f"the edit at {site} has {len(v)} rows of value; one direction is baked")
    return v / np.linalg.norm(v), strength


def _named(edit: Edit) -> str:
    return edit.op if isinstance(edit.op, str) else getattr(edit.op, "__name__", "a function")


def _why_not(edit: Edit) -> str:
    if not isinstance(edit.op, str):
        return "it may be anything"
    if edit.op in ("clamp", "cap"):
        return "it acts on some rows and not on others, and a matrix is linear"
    if edit.op in ("add", "project_out_add", "mean", "replace", "blend"):
        return "it adds a constant, which is a bias; additions at resid_post are a control vector"
    return "of whole rows mia bakes project_out"


def _listed(heads: int | Sequence[int]) -> Sequence[int]:
    return [heads] if isinstance(heads, int) else heads


def changed(weights: Weights, change: Change, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Rows `start:stop` of a tensor with its change, counted as `Weights.rows` does."""
    rows = weights.rows(change.tensor, start, stop).astype(np.float64)
    left, right = change.factors()
    if change.kind == "bias":
        rows += (left @ right).T.reshape(rows.shape)
    elif change.kind == "experts":
        n_out = left.shape[1]
        assert start // n_out == (stop - 1) // n_out
        e = start // n_out
        rows += left[e, start - e * n_out : stop - e * n_out] @ right[e]
    else:
        rows += left[start:stop] @ right
    return rows.astype(np.float32)
