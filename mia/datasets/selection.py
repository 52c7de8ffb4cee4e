"""Some items of a data set, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mia.io.files import existing_file
from mia.io.provenance import data_metadata
from mia.ranges import Ranges, compact, parse_items

Item = TypeVar("Item")


@dataclass(frozen=True)
class Selection(Generic[Item]):
    """Some items of a data set.

    Attributes:
        name: what the data set was asked for as: a shipped name, or a file.
        items: the chosen ones.
        indices: which those are, counted from 0.
        paths: the files they come from.
    """

    name: str
    items: tuple[Item, ...]
    indices: tuple[int, ...]
    paths: tuple[Path, ...]

    @property
    def range(self) -> str:
        """Which items, as `mia.ranges` reads them: "0..39"."""
        return compact(self.indices)

    def metadata(self) -> dict[str, str]:
        """What a vector learned from these items says of them."""
        return data_metadata(self.paths, self.indices)


def select(
    name: str, items: Sequence[Item], paths: Sequence[Path], given: Ranges | None = None
) -> Selection[Item]:
    """Items that are asked for (`mia.ranges`), all for None.

    Raises `RangeError`, or `FileError` where data came from a pipe: it is read once more, for its
    hash."""
    for path in paths:
        existing_file(path)
    indices = parse_items(given, len(items))
    return Selection(name, tuple(items[i] for i in indices), tuple(indices), tuple(paths))
