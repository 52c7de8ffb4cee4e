"""The ledger of a stream: which rows each sequence holds, and the prefixes that stay.

A `Track` is a sequence with the rows that it holds, one cell each. Tracks that begin alike share
cells: a row is in the cache as long as any track holds it. When a request is over its track is
*kept*, so that the next turn of the conversation finds its prefix there; the one used longest ago
makes room when cells or sequences are wanted, or when many are kept: llama.cpp looks at every cell in use
for every row, whichever sequence it belongs to. What makes room is *saved* where that is possible: its
keys and values are copied out of the cache, and back when a prompt begins like it.

The invariant, asserted: cells in use and cells promised to requests that run never exceed the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mia.engine import limits
from mia.engine.cells import Cache
from mia.engine.jobs import EditAt
from mia.engine.saved import Saved
from mia.engine.segments import Row

#: what makes two rows after equal rows the same: the token, and the edits there
Key = int | tuple[int, tuple[EditAt, ...]]


def key_of(token: int, edits: tuple[EditAt, ...]) -> Key:
    """A prompt's row and a generated one are the same if an edit does the same at both."""
    return (token, edits) if edits else token


def common(a: Sequence[Key], b: Sequence[Key]) -> int:
    """How many rows two sequences have in common at their beginnings."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass(eq=False, slots=True, repr=False)
class Track:
    """A sequence. `Tracks` alone changes it.

    Attributes:
        rows, keys: what it holds, from the first position on.
        n_total: rows that its request may come to.
    """

    sequence: int
    n_total: int
    rows: list[Row] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)

    @property
    def promised(self) -> int:
        """Cells that it has yet to take."""
        return self.n_total - len(self.rows)


class Prefix(NamedTuple):
    """The first `n` rows of a track, or of what was saved of one; of none if nothing is shared."""

    track: Track | Saved | None
    n: int


class TrackCache(Cache, Protocol):
    """What they ask of a context."""

    def seq_save(self, seq: int) -> npt.NDArray[np.uint8]: ...
    def seq_load(self, seq: int, data: npt.NDArray[np.uint8]) -> bool: ...


class Tracks:
    """All cells and sequences of a stream's lane."""

    def __init__(
        self,
        cache: TrackCache,
        *,
        budget: int,
        n_sequences: int,
        n_kept: int,
        n_saved: int,
        has_window: bool,
    ):
        """`n_kept`: the most cells of tracks that are kept; `n_saved`: the most rows of those that are
        saved, 0 to save none. `has_window`: see `Ledger`; a sequence that has gone on may have lost
        what lies before its end, so only whole ones are shared."""
        self._cache, self._has_window = cache, has_window
        self.budget, self._most_kept, self._most_saved = budget, n_kept, n_saved
        self._n_sequences = n_sequences
        self.free = list(range(n_sequences - 1, -1, -1))
        self.live: list[Track] = []
        #: the one used longest ago first
        self.kept: list[Track] = []
        self.saved: list[Saved] = []
        #: how many tracks hold each row
        self._holders: dict[Row, int] = {}

    @property
    def used(self) -> int:
        """Cells that hold a row."""
        return len(self._holders)

    @property
    def promised(self) -> int:
        return sum(track.promised for track in self.live)

    def held_by(self, tracks: Sequence[Track]) -> int:
        """Cells of some tracks."""
        return len({row for track in tracks for row in track.rows})

    # -- a request's way ------------------------------------------------------------

    def prefix(self, keys: Sequence[Key], most: int, *, with_cells: bool) -> Prefix:
        """The longest beginning of a prompt that is in the cache, of at most `most` rows.

        Args:
            with_cells: only rows of which the cell is known (attention patterns are read by cell).
        """
        best = Prefix(None, 0)
        for track in (*self.live, *self.kept):
            n = min(common(keys, track.keys), most)
            if self._has_window and n < len(track.rows):
                continue
            if with_cells:
                n = next((i for i, row in enumerate(track.rows[:n]) if not row.cells), n)
            if n > best.n:
                best = Prefix(track, n)
        if not with_cells:
            for saved in self.saved:
                n = min(common(keys, saved.keys), most)
                if n >= best.n + limits.WAIT_ROWS:
                    best = Prefix(saved, n)
        return best if best.n >= limits.SHARED_ROWS else Prefix(None, 0)

    def open(self, prefix: Prefix, n_total: int) -> Track | None:
        """A track for a request of so many rows that begins with a prefix; None if there is no room."""
        source, n = prefix
        if isinstance(source, Saved):
            source = self._load(source, n)
            n = 0 if source is None else n
        needed = n_total - n
        if source in self.kept and n == len(source.rows):
            return self._take_over(source, n, n_total)
        while not (self.free and self._has_room(needed)):
            other = next((t for t in self.kept if t is not source), None)
            if other is not None:
                self._make_room(other)
            elif source in self.kept:
                return self._take_over(source, n, n_total)
            else:
                return None
        track = Track(self.free.pop(), n_total)
        if source is not None:
            self._cache.seq_cp(source.sequence, track.sequence, n)
            self._hold(track, source.rows[:n], source.keys[:n])
        self.live.append(track)
        self._check()
        return track

    def add(self, track: Track, row: Row) -> None:
        """A row of a track was decoded."""
        assert row.pos == len(track.rows) < track.n_total
        self._hold(track, [row], [key_of(row.token, row.edits)])

    def close(self, track: Track, *, keep: bool) -> None:
        """A request is over. Its rows stay if they are worth it."""
        self.live.remove(track)
        track.n_total = len(track.rows)
        if keep and len(track.rows) >= limits.SHARED_ROWS and not self._is_known(track):
            for other in [t for t in self.kept if _begins(track, t)]:
                self._evict(other)
            self.kept.append(track)
            while self.held_by(self.kept) > self._most_kept:
                self._make_room(self.kept[0])
        else:
            self._release(track)

    def clear(self) -> None:
        """The cache was wiped. Live tracks stay, and hold nothing. What was saved stays, too."""
        live = {track.sequence for track in self.live}
        # all of them: Ctrl-C may have come when one had been taken and had no track yet
        self.free = [i for i in reversed(range(self._n_sequences)) if i not in live]
        self.kept.clear()
        self._holders.clear()
        for track in self.live:
            track.rows, track.keys = [], []
        self._check()

    # -- counting --------------------------------------------------------------------

    def _has_room(self, n_cells: int) -> bool:
        return self.used + self.promised + n_cells <= self.budget

    def _take_over(self, track: Track, n: int, n_total: int) -> Track | None:
        """A kept track, cut to n rows, as that of a request."""
        self.kept.remove(track)
        self._cut(track, n)
        while not self._has_room(n_total - n):
            if not self.kept:
                self.kept.append(track)
                return None
            self._make_room(self.kept[0])
        track.n_total = n_total
        self.live.append(track)
        self._check()
        return track

    def _is_known(self, track: Track) -> bool:
        """Whether a kept track has all that this one has; then it was used now."""
        for other in self.kept:
            if _begins(other, track):
                self.kept.remove(other)
                self.kept.append(other)
                return True
        for saved in self.saved:
            if _begins(saved, track):
                self.saved.remove(saved)
                self.saved.append(saved)
                return True
        return False

    def _make_room(self, track: Track) -> None:
        """A kept track leaves the cache."""
        if limits.WAIT_ROWS <= len(track.rows) <= self._most_saved:
            self.saved = [s for s in self.saved if not _begins(track, s)]
            data = self._cache.seq_save(track.sequence)
            self.saved.append(
                Saved(list(track.keys), [(r.token, r.edits) for r in track.rows], data)
            )
            while sum(len(s.keys) for s in self.saved) > self._most_saved:
                self.saved.pop(0)
        self._evict(track)

    def _load(self, saved: Saved, n: int) -> Track | None:
        """The first n rows of what was saved, as a kept track; None if there is no room for all of it."""
        while not (self.free and self._has_room(len(saved.keys))):
            if not self.kept:
                return None
            self._make_room(self.kept[0])
        track = Track(self.free.pop(), n)
        if not self._cache.seq_load(track.sequence, saved.data):
            self.free.append(track.sequence)
            self.saved = [s for s in self.saved if s is not saved]
            return None
        if n < len(saved.keys):
            self._cache.seq_rm(track.sequence, n)
        else:
            self.saved = [s for s in self.saved if s is not saved]
        self._hold(track, saved.rows_of(n), saved.keys[:n])
        self.kept.append(track)
        return track

    def _evict(self, track: Track) -> None:
        self.kept.remove(track)
        self._release(track)

    def _release(self, track: Track) -> None:
        self._cut(track, 0)
        self.free.append(track.sequence)

    def _cut(self, track: Track, n: int) -> None:
        if n < len(track.rows) or not n:
            self._cache.seq_rm(track.sequence, n)
        for row in track.rows[n:]:
            left = self._holders[row] - 1
            if left:
                self._holders[row] = left
            else:
                del self._holders[row]
        del track.rows[n:], track.keys[n:]

    def _hold(self, track: Track, rows: Sequence[Row], keys: Sequence[Key]) -> None:
        for row in rows:
            self._holders[row] = self._holders.get(row, 0) + 1
        track.rows.extend(rows)
        track.keys.extend(keys)

    def _check(self) -> None:
        assert self.used + self.promised <= self.budget, "more cells are promised than there are"


def _begins(track: Track | Saved, other: Track | Saved) -> bool:
    """Whether a track begins with all rows of another one."""
    n = len(other.keys)
    return len(track.keys) >= n and track.keys[:n] == other.keys
