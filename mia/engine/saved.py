"""A prefix that has left a stream's cache, with all that it takes to bring it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.engine.jobs import EditAt
from mia.engine.segments import Row

if TYPE_CHECKING:
    from mia.engine.tracks import Key


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Saved:
    """The rows of a track that was kept.

    Attributes:
        keys: of its rows (see `tracks.py`).
        tokens: of each row its token and edits.
        data: keys and values, as llama.cpp writes them.
    """

    keys: list[Key]
    tokens: list[tuple[int, tuple[EditAt, ...]]]
    data: npt.NDArray[np.uint8]

    def rows_of(self, n: int) -> list[Row]:
        """The first n of them. They are new rows: the cells of the old ones may hold others' by now, or
        belong to tracks that are in the cache still."""
        rows: list[Row] = []
        for pos, (token, edits) in enumerate(self.tokens[:n]):
            rows.append(Row(token, pos, edits, rows[-1] if rows else None))
        return rows
