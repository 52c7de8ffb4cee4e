"""How many cells run together: as many as the memory allows that a sweep may take."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from mia.errors import UsageError
from mia.sites import Site
from mia.sweeps.axes import Grid
from mia.sweeps.changes import sites_of
from mia.sweeps.experiments import Case, Experiment, grid_sites

if TYPE_CHECKING:
    from mia.model import Model

#: bytes of a request, and of each row of it in the engine's plan: measured with tracemalloc
_REQUEST, _ROW = 7000, 700
#: a chunk has at most so many cells, for an interruption loses what it has done of them; more, if each is so
#: short that the chunk's own prompts, which are run anew in each, would be more than a share of the work
_CELLS, _SHARE = 1024, 1 / 32


class Sizes:
    """The sizes of chunks.

    Attributes:
        cells: of one case that run together, at most; at least one.
        cases: whole cases that run together, at most, where one fits.
        keeps_sources: whether a case's source is read once for all its chunks.
    """

    def __init__(
        self,
        model: Model,
        experiment: Experiment,
        cases: Sequence[Case],
        grids: Sequence[Grid],
        memory: int,
    ):
        if memory < 1:
            raise UsageError(f"a sweep cannot run in {memory} bytes")
        self._model, self._memory = model, memory
        longest = max(range(len(cases)), key=lambda i: len(cases[i].base.tokens))
        self._grid = grid = grids[longest]
        self._n_tokens = len(cases[longest].base.tokens)
        n_source = max(experiment.n_source(model, case) for case in cases)
        site_bytes = 4 * n_source * self._width(grid)
        sources = site_bytes * len(grid_sites(grid)) if n_source else 0
        self.keeps_sources = sources <= memory // 4
        self._site_bytes, self._fixed = (0, sources) if self.keeps_sources else (site_bytes, 0)
        self._cell = self._cell_bytes() + experiment.bytes_per_cell(model, cases[longest])
        most = self._most()
        cells = min(len(grid), most)
        while cells > 1 and self._bytes(cells) > memory:
            cells = cells * 7 // 8
        # a chunk that ends where the first axis goes on leaves no batch half full
        inner = len(grid) // len(grid.axes[0])
        self.cells = cells if cells < inner else cells - cells % inner
        self.cases = max(1, min(most // len(grid), memory // max(self._bytes(len(grid)), 1)))

    def _most(self) -> int:
        n = self._n_tokens
        starts = [min(self._grid.place(cell).tokens) for cell in self._ends()]
        rows = n - sum(starts) / len(starts)  # of a cell, on average
        return max(_CELLS, int(2 * n / (rows * _SHARE)))

    def _ends(self) -> list[tuple[int, ...]]:
        return [self._grid.cell(0), self._grid.cell(len(self._grid) - 1)]

    def _bytes(self, cells: int) -> int:
        """What a chunk of so many cells takes: requests, their rows of the plan, values; the residuals
        that they start from, and the rows of their source, at each of the layers that they touch."""
        sites = grid_sites(self._grid.part(0, cells))
        layers = len({site.layer for site in sites})
        residuals = 4 * layers * self._n_tokens * self._model.n_embd
        return self._fixed + cells * self._cell + residuals + len(sites) * self._site_bytes

    def _cell_bytes(self) -> int:
        place = self._grid.place(self._grid.cell(len(self._grid) // 2))
        values = 0
        for site in sites_of(place):
            shape = self._shape(site)
            width = prod(shape)
            if place.heads is not None:
                width = width * len(place.heads) // shape[0]
            if place.neurons is not None:
                width = len(place.neurons)
            values += 4 * width * len(place.tokens)
        return _REQUEST + _ROW * self._n_tokens + values

    def _width(self, grid: Grid) -> int:
        """Of the widest site."""
        places = [grid.place(cell) for cell in self._first_of_sites(grid)]
        return max(prod(self._shape(site)) for place in places for site in sites_of(place))

    def _first_of_sites(self, grid: Grid) -> list[tuple[int, ...]]:
        """A cell for each value of the axis `site`."""
        names = [a.name for a in grid.axes]
        if "site" not in names:
            return [grid.cell(0)]
        at = names.index("site")
        return [
            tuple(j if i == at else 0 for i in range(len(names))) for j in range(len(grid.axes[at]))
        ]

    def _shape(self, site: Site) -> tuple[int, ...]:
        node = self._model.topology.sites.get(site)
        return (self._model.n_embd,) if node is None else tuple(node.shape)
