"""The k largest numbers of each row, from blocks of columns."""

from __future__ import annotations

import numpy as np

from mia.arrays import Array, IntArray


class TopK:
    """The k largest of n rows that come in blocks of columns, from left to right."""

    def __init__(self, n: int, k: int):
        self.n, self.k = n, k
        self.values = np.full((n, k), -np.inf, np.float32)
        self.ids = np.zeros((n, k), np.intp)
        self.least = np.full(n, -np.inf, np.float32)

    def add(self, start: int, block: Array, high: Array) -> None:
        """Takes in a block (n, width) whose first column is `start`.

        Args:
            high: (n,) the block's largest value in each row, so that rows without a new
                value are passed over.
        """
        rows = np.flatnonzero(high > self.least)
        if not len(rows):
            return
        part = block if len(rows) == self.n else block[rows]
        if np.isneginf(self.least[rows[0]]):
            # the first columns give a threshold that most of the others stay below
            seed = max(self.k, 512)
            first = part[:, :seed]
            keep = min(self.k, first.shape[1])
            cols = np.argpartition(first, -keep, axis=1)[:, -keep:]
            self._merge(rows, np.take_along_axis(first, cols, 1), cols + start)
            part, start = part[:, seed:], start + seed
        r, c = np.nonzero(part > self.least[rows, None])
        if not len(r):
            return
        counts = np.bincount(r, minlength=len(rows))
        slot = np.arange(len(r)) - np.repeat(np.cumsum(counts) - counts, counts)
        values = np.full((len(rows), counts.max()), -np.inf, np.float32)
        ids = np.zeros(values.shape, np.intp)
        values[r, slot], ids[r, slot] = part[r, c], c + start
        self._merge(rows, values, ids)

    def _merge(self, rows: IntArray, values: Array, ids: IntArray) -> None:
        values = np.concatenate([self.values[rows], values], 1)
        ids = np.concatenate([self.ids[rows], ids], 1)
        keep = np.argpartition(values, -self.k, axis=1)[:, -self.k :]
        self.values[rows] = np.take_along_axis(values, keep, 1)
        self.ids[rows] = np.take_along_axis(ids, keep, 1)
        self.least[rows] = self.values[rows].min(1)

    def sorted(self) -> tuple[IntArray, Array]:
        """Columns and values, (n, k) each, the largest first."""
        order = np.argsort(-self.values, axis=1, kind="stable")
        return np.take_along_axis(self.ids, order, 1), np.take_along_axis(self.values, order, 1)
