"""The work of a sweep, cut into chunks of cells: each is one planned run of its own.

Where the chunks end depends on what is asked and on the memory that they may take, on nothing else. So a chunk is
decoded in the same batches whoever runs it, and gives the same numbers to the last bit: after an interruption,
on another worker, in another shard. (On quantized files a cell's number depends on what it shares a batch with.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mia.errors import UsageError
from mia.measure.answers import Metric, metric as metric_of, needs
from mia.ranges import Ranges
from mia.sweeps.axes import Grid
from mia.sweeps.cells import NULL, CellRow, Prepared, request_of, run_prepared, seeds_of
from mia.sweeps.changes import Change
from mia.sweeps.choice import Choice
from mia.sweeps.experiments import Asked, Case, Experiment, Prompt
from mia.sweeps.memory import Sizes

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

#: bytes that the cells of one chunk may take, by default
MEMORY = 256 << 20


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked for: see `mia.methods.sweep.sweep`. With a model it is a `Work`."""

    prompt: Prompt | None
    experiment: Experiment
    over: Sequence[str]
    answer: str = ""
    against: str = ""
    metric: str | None = None
    site: str | Sequence[str] | None = None
    layers: Ranges | None = None
    tokens: Ranges | None = None
    heads: Ranges | None = None
    neurons: Ranges | None = None
    coeffs: Sequence[float] | None = None
    window: int = 1
    null: int = NULL
    memory: int = MEMORY

    @property
    def choice(self) -> Choice:
        return Choice(
            self.experiment,
            self.site,
            self.layers,
            self.tokens,
            self.heads,
            self.neurons,
            self.coeffs,
            self.window,
        )


class Part(NamedTuple):
    """Cells `start` to `stop` - 1 of a case."""

    case: int
    start: int
    stop: int


#: what runs together: one part, or several whole cases
Chunk = tuple[Part, ...]


class Work:
    """All cells of a sweep on one model.

    Attributes:
        cases: the runs to change, each with its answer's tokens behind it where the metric is of several.
        grids: one for each case, all of one shape.
        metric: its name.
        chunks: what runs together, in the order of the cells.
    """

    def __init__(self, model: Model, task: Task):
        """Raises what `mia.methods.sweep.sweep` raises."""
        if task.metric is not None:
            needs(task.metric)  # an unknown one is told before any work
        self.model, self.task = model, task
        choice = task.choice
        cases = task.experiment.cases(model, Asked(task.prompt, task.answer, task.against))
        self.metric = task.metric or _default_metric(cases)
        self.grids = [choice.grid(model, case, task.over) for case in cases]
        _check_shapes(cases, self.grids)
        self.prompts = [case.base.tokens for case in cases]
        n_more = [self._metric(case).n_positions - 1 for case in cases]
        self.cases = [
            case.followed(case.answer[:-1]) if n else case
            for case, n in zip(cases, n_more, strict=True)
        ]
        self._sizes = Sizes(model, task.experiment, self.cases, self.grids, task.memory)
        self.chunks = list(self._cut())
        self._nulls = seeds_of(self.n_cells, task.null)
        #: the case whose change is kept for its next chunk
        self._kept: tuple[int, Change] | None = None

    @property
    def n_cells(self) -> int:
        """Of one run."""
        return len(self.grids[0])

    def _metric(self, case: Case) -> Metric:
        return metric_of(self.metric, answer=case.answer, against=case.against)

    def _cut(self) -> Iterator[Chunk]:
        """Cases that are small go together, large ones are cut."""
        n, size, most = self.n_cells, self._sizes.cells, self._sizes.cases
        if n <= size:
            for first in range(0, len(self.cases), most):
                last = min(first + most, len(self.cases))
                yield tuple(Part(i, 0, n) for i in range(first, last))
            return
        for i in range(len(self.cases)):
            for start in range(0, n, size):
                yield (Part(i, start, min(start + size, n)),)

    def run(
        self,
        chunk: Chunk,
        on_row: Callable[[CellRow], None],
        progress: Progress | None = None,
    ) -> None:
        """Runs the cells of a chunk. `on_row` is called with each cell as soon as it and all before
        it are done."""
        prepared = [self._prepared(part) for part in chunk]
        sources = self._sources(chunk, prepared)
        run_prepared(
            self.model,
            [replace(p, source=s) for p, s in zip(prepared, sources, strict=True)],
            on_row,
            progress,
        )

    def _prepared(self, part: Part) -> Prepared:
        case, change = self.cases[part.case], self._change(part)
        cells = range(part.start, part.stop)
        nulls = {i: self._nulls[i] for i in cells if i in self._nulls}
        grid = self.grids[part.case]
        prepared = Prepared(part.case, case.base, grid, change, self._metric(case), cells)
        return replace(prepared, nudges=prepared.prepare(self.model, nulls))

    def _change(self, part: Part) -> Change:
        """Of a case that is cut its source's rows are kept for the next chunk, if there is room."""
        if self._kept is not None and self._kept[0] == part.case:
            return self._kept[1]
        self._kept = None
        case, grid = self.cases[part.case], self.grids[part.case]
        if not self._sizes.keeps_sources:
            grid = grid.part(part.start, part.stop)
        change = self.task.experiment.change(self.model, case, grid)
        if self._sizes.keeps_sources and part.stop - part.start < self.n_cells:
            self._kept = part.case, change
        return change

    def _sources(self, chunk: Chunk, prepared: Sequence[Prepared]) -> list[Any]:
        """What the metrics give for the runs that rows come from; None where they come from none."""
        runs = [
            (self.cases[part.case].source, p.metric)
            for part, p in zip(chunk, prepared, strict=True)
        ]
        given = iter(
            self.model.run([request_of(base, metric) for base, metric in runs if base is not None])
        )
        return [None if base is None else next(given).value for base, _ in runs]


def _default_metric(cases: Sequence[Case]) -> str:
    if all(len(case.against) for case in cases):
        return "logit-diff"
    return "logprob" if all(len(case.answer) for case in cases) else "kl"


def _check_shapes(cases: Sequence[Case], grids: Sequence[Grid]) -> None:
    """Raises `UsageError` where the cells of two cases are not of the same tokens."""
    for i, grid in enumerate(grids):
        if grid.shape != grids[0].shape:
            raise UsageError(
                f"prompt {i} has {len(cases[i].base.tokens)} tokens and the first "
                f"{len(cases[0].base.tokens)}: their tokens are no one axis; choose some of them, "
                "counted from the end, or another axis"
            )
