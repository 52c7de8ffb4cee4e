"""Attention scores and patterns: from cells of the cache to positions of a sequence, and back.

The nodes have one column for each cell of the cache, whichever sequence it belongs to. What mia
shows and edits has one for each position of the row's own sequence. So each row notes the cell
that its key was stored in, and a row's pattern is read through the cells of its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mia.arrays import Array, BoolArray, IntArray
from mia.edits import Edit
from mia.engine.finite import check_edited, not_finite
from mia.engine.segments import Row
from mia.engine.session import Session
from mia.errors import UsageError
from mia.llama import describe, rows_of
from mia.sites import Site


@dataclass(frozen=True, eq=False)
class HiddenKeys:
    """An edit's function at `attn_scores`: keys that queries may not attend to. The engine knows it: it
    writes all rows of a batch at once, and looks their cells up once for all layers that share it.

    Attributes:
        keys: a query's position -> the positions that it may not attend to.
        n_heads: of the edit.
    """

    keys: Callable[[int], IntArray]
    n_heads: int

    def __call__(self, rows: Array) -> Array:
        """`rows`: (1, n_heads × n_keys) of one query, keys 0 to its own position."""
        scores = rows.reshape(self.n_heads, -1)
        n_keys = scores.shape[1]
        hidden = self.keys(n_keys - 1)
        scores[:, hidden[hidden < n_keys]] = -np.inf
        return rows


class Patterns:
    """The rows of one batch, and where each of their keys lies."""

    def __init__(self, session: Session, rows: Sequence[Row]):
        self._session = session
        self.rows = rows
        #: layer -> the address of its mask, in this decode
        self._masks: dict[int, int] = {}
        #: function, group and rows of an edit -> (row, cell) of each score that it hides
        self._hidden: dict[tuple[HiddenKeys, int, bytes], tuple[IntArray, IntArray] | None] = {}
        #: group and row -> see `_path`
        self._paths: dict[tuple[int, int], tuple[IntArray, list[int]]] = {}
        inputs = session.topology.cell_inputs
        #: layers that store to the same cells are one group: (address of the cells) -> its number
        numbers: dict[int, int] = {}
        for _, cells in inputs.values():
            numbers.setdefault(cells, len(numbers))
        self._groups = {layer: numbers[cells] for layer, (_, cells) in inputs.items()}

    def go_on(self, rows: Sequence[Row]) -> None:
        """The rows of the next decode."""
        self.rows = rows
        self._masks.clear()
        self._hidden.clear()
        self._paths.clear()

    def cell_notes(self) -> Iterator[tuple[int, Callable[[int], None]]]:
        """(index of a node, what to do there): each row notes the cell of its key."""
        known: set[int] = set()
        for layer, (index, _) in self._session.topology.cell_inputs.items():
            group = self._groups[layer]
            if group not in known:
                known.add(group)
                yield index, self._note_cells(group)

    def _note_cells(self, group: int) -> Callable[[int], None]:
        def note(addr: int) -> None:
            source = next(s for s in describe(addr).src if describe(s).type == "i64")
            with rows_of(source, write=False) as cells:
                for row, cell in zip(self.rows, cells.ravel().tolist(), strict=False):
                    row.cells[group] = cell
            self._paths.clear()  # a decode that is tried again may have other cells

        return note

    def line(self, site: Site, a: Array, b: int) -> Array:
        """Row b of a node (n_head, n_rows, n_cells) by position: (n_head, n_keys), a copy.

        A key that the mask hides from the query has 0: its cell may have another token's key, or
        none. So has the future, which no line reaches.
        """
        cells, taken = self._path(self._group(site), b)
        line: Array = a[:, b][:, cells] * np.float32(self._session.site(site).scale)
        if site.name == "attn_scores":
            line[:, ~self._seen(site, b)] = 0
        else:
            line[:, taken] = 0  # the softmax has masked the others
        return line

    def edit(self, edit: Edit, site: Site, batch_rows: IntArray, addr: int) -> None:
        """Applies an edit to each row, by position."""
        if isinstance(edit.op, HiddenKeys) and self._hide(edit, edit.op, site, batch_rows, addr):
            return
        scale = np.float32(self._session.site(site).scale)
        first = np.zeros(1, np.intp)
        with rows_of(addr, write=True) as a:
            for b in batch_rows.tolist():
                cells, _ = self._path(self._group(site), b)
                seen = self._seen(site, b)
                line = a[0][:, b][:, cells] * scale
                line[:, ~seen] = 0
                edit.apply(line[None], first, first)
                if site.name == "attn_scores":
                    self._check_scores(site, b, line, seen)
                else:
                    check_edited(line, site)
                    self._check_pattern(site, b, line, seen)
                a[0][:, b, cells[seen]] = line[:, seen] / scale

    def _hide(
        self, edit: Edit, op: HiddenKeys, site: Site, batch_rows: IntArray, addr: int
    ) -> bool:
        """Hides keys from all rows in one operation; False if a query would lose its own key, for
        then it may have none left."""
        group = self._group(site)
        key = op, group, batch_rows.tobytes()
        if key not in self._hidden:
            self._hidden[key] = self._hidden_cells(op, batch_rows, group)
        places = self._hidden[key]
        if places is None or site.name != "attn_scores" or edit.dims is not None or edit.keep_norm:
            return False
        rows, cells = places
        heads = slice(None) if edit.heads is None else np.atleast_1d(edit.heads)[:, None]
        with rows_of(addr, write=True) as a:
            a[0][heads, rows, cells] = -np.inf
        return True

    def _hidden_cells(
        self, op: HiddenKeys, batch_rows: IntArray, group: int
    ) -> tuple[IntArray, IntArray] | None:
        queries, hidden = [], []
        for b in batch_rows.tolist():
            row = self.rows[b]
            keys = op.keys(row.pos)
            if row.pos in keys:
                return None
            cells, taken = self._path(group, b)
            keys = keys[(keys < row.pos) & ~np.isin(keys, taken)] if taken else keys[keys < row.pos]
            queries.append(np.full(len(keys), b, np.intp))
            hidden.append(cells[keys])
        return np.concatenate(queries), np.concatenate(hidden)

    def _path(self, group: int, b: int) -> tuple[IntArray, list[int]]:
        """The cells of row b's keys, and the positions whose cell another one has now."""
        if (group, b) not in self._paths:
            cells = self.rows[b].path_cells(group)
            self._paths[group, b] = cells, _overwritten(cells)
        return self._paths[group, b]

    def _group(self, site: Site) -> int:
        assert site.layer is not None
        return self._groups[self._session.topology.cache_layers.get(site.layer, site.layer)]

    def _seen(self, site: Site, b: int) -> BoolArray:
        """Which keys of its sequence the mask lets row b see: (n_keys,)."""
        assert site.layer is not None
        mask_addr = self._masks.get(site.layer)
        if mask_addr is None:
            softmax = self._session.site(Site("attn_pattern", site.layer)).index
            mask_addr = describe(self._session.variants[0].addrs[softmax]).src[1]
            self._masks[site.layer] = mask_addr
        cells, taken = self._path(self._group(site), b)
        with rows_of(mask_addr, write=False) as mask:
            seen: BoolArray = np.isfinite(mask[0, 0, b, cells])
        seen[taken] = False
        return seen

    def _check_scores(self, site: Site, b: int, line: Array, seen: BoolArray) -> None:
        """Scores (n_head, n_keys) may be -inf, a key not looked at. But each head must have a
        key left that the mask lets it see: a softmax over nothing is NaN."""
        if np.isnan(line).any() or np.isposinf(line).any():
            raise not_finite(site)
        blind = np.flatnonzero(~np.isfinite(line[:, seen]).any(1))
        if len(blind):
            raise UsageError(
                f"all keys of query {self.rows[b].pos} are blocked in layer {site.layer}, "
                f"head {blind[0]}; leave at least one"
            )

    def _check_pattern(self, site: Site, b: int, line: Array, seen: BoolArray) -> None:
        """Nothing can be read of a key that a sliding window has left behind."""
        hidden = np.flatnonzero((line != 0).any(0) & ~seen)
        if len(hidden):
            raise UsageError(
                f"an edit at {site} gives weight to key {hidden[0]}, which the layer's sliding window "
                f"hides from query {self.rows[b].pos}; leave it at 0"
            )


def _overwritten(cells: IntArray) -> list[int]:
    """Positions whose cell a later position of the sequence has taken over, as llama.cpp does with
    what a sliding window has left behind: nothing of them is attended to."""
    if len(np.unique(cells)) == len(cells):
        return []
    latest = {cell: pos for pos, cell in enumerate(cells.tolist())}
    return [pos for pos, cell in enumerate(cells.tolist()) if latest[cell] != pos]
