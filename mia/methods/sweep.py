"""Sweeps: one run changed along axes, with a number for each cell.

Sources: causal tracing, Meng et al. 2022 (arXiv 2202.05262), sec. 2.1; activation patching, Wang et
al. 2022 (2211.00593) and Heimersheim & Nanda 2024 (2404.15255), on which way to patch.

| in the papers                          | here                                                |
|----------------------------------------|-----------------------------------------------------|
| clean, corrupted run                   | `prompt`, `corrupted`                               |
| denoising: clean rows into corrupted   | `into="corrupted"`                                  |
| noising: corrupted rows into clean     | `into="clean"`                                      |
| corrupted-with-restoration, h_i^l      | the cell (l, i) of `over="layer,token"`             |
| noise ε ~ N(0, (3σ)²) on the subject   | `noise_on=` the subject, `noise=3`                  |
| indirect effect of a cell              | `Sweep.effect`: its number minus the unchanged run's |

Deviation: σ is that of the prompt's own embeddings, not of all subjects of a data set.

Among the cells run some whose change is too small to matter, 1e-5 of a row. In exact arithmetic they
give the unchanged run's number to four digits; on quantized files they do not, for each change flips
roundings of activations to 8 bits (`mia.measure.noise`). The largest such difference is the noise
floor, and cells within it say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.answers import UNITS, Metric, metric as metric_of, needs
from mia.measure.estimates import bootstrap_interval
from mia.methods.sweep_reports import Sweep, Values
from mia.progress import step
from mia.ranges import Ranges
from mia.request import Request
from mia.sweeps.axes import Axis, Grid, axis_names
from mia.sweeps.changes import Base, Change, Nudge
from mia.sweeps.choice import Choice
from mia.sweeps.experiments import Asked, Case, Experiment, Prompt

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

#: cells whose change is too small to matter, by default
NULL = 12
#: cells that the text lists
_LISTED = 10


@dataclass(frozen=True, eq=False)
class Cells:
    """The numbers of one sweep.

    Attributes:
        values: the metric in each cell, as `Grid.shape`.
        unchanged: the metric of the run that is changed.
        null: (n_null,) the metric of cells whose change is too small to matter.
    """

    values: Values
    unchanged: float
    null: Values

    @property
    def floor(self) -> float:
        """The largest difference that one of these made; NaN if none was tried."""
        return float(np.abs(self.null - self.unchanged).max()) if len(self.null) else float("nan")


def run_cells(
    model: Model,
    base: Base,
    grid: Grid,
    change: Change,
    metric: Metric,
    *,
    null: int = NULL,
    progress: Progress | None = None,
) -> Cells:
    """The metric of every cell, all in one run.

    Args:
        base: the run that is changed.
        null: how many cells have a change too small to matter, spread over the grid; at most as
            many as it has.
    """
    places = [grid.place(cell) for cell in grid.cells()]
    chosen = [places[i] for i in spread(len(places), null)]
    nudges = [Nudge.at(model, p, change.changed_tokens(p), seed) for seed, p in enumerate(chosen)]
    change.prepare(places, nudges)
    requests = [replace(_request(base, metric, change.reference()), metric=metric.of_unchanged)]
    requests += [_request(base, metric, change.edits(place)) for place in places]
    requests += [_request(base, metric, change.nudged(nudge)) for nudge in nudges]
    numbers = [metric.number(r.value) for r in model.run(requests, progress=progress)]
    values = np.array(numbers[1 : len(places) + 1], np.float64).reshape(grid.shape)
    return Cells(values, numbers[0], np.array(numbers[len(places) + 1 :], np.float64))


def _request(base: Base, metric: Metric, edits: Sequence[Edit] = ()) -> Request:
    n = len(base.tokens)
    positions = range(n - metric.n_positions, n)
    return Request(base.tokens, [*base.edits, *edits], logits=positions, metric=metric.function)


def spread(n: int, k: int) -> list[int]:
    """At most k of n indices, evenly over them."""
    k = min(k, n)
    return [int((i + 0.5) * n / k) for i in range(k)]


# -- the experiment --------------------------------------------------------------------


def sweep(
    model: Model,
    prompt: Prompt | None,
    experiment: Experiment,
    *,
    over: str | Sequence[str] = "layer,token",
    answer: str = "",
    against: str = "",
    metric: str | None = None,
    site: str | Sequence[str] | None = None,
    layers: Ranges | None = None,
    tokens: Ranges | None = None,
    heads: Ranges | None = None,
    neurons: Ranges | None = None,
    coeffs: Sequence[float] | None = None,
    window: int = 1,
    null: int = NULL,
    k: int = _LISTED,
) -> Sweep:
    """Changes one run along axes, a number for each cell, all cells of a prompt side by side.

    Args:
        prompt: a text or token ids; of a patch, the clean prompt. `PatchingPairs` has its own.
        experiment: of `mia.sweeps.experiments`: `Patching`, `PatchingPairs`, `PathPatching`,
            `Ablation`, `Steering`, `Blocking`.
        over: axes: layer, head, token, site, neuron, coeff.
        answer, against: what should follow the prompt, and what should not.
        metric: as `mia.measure.answers` names it; by default the logit difference where there is
            another answer, the log-probability where there is one, KL where there is none.
        site: where, `resid_post` by default; several for the axis `site`. `Steering`, `Blocking` and
            `PathPatching` have their own.
        layers, tokens, heads, neurons: those of an axis, or of every cell where there is no such
            axis; all of them by default.
        coeffs: of `Steering`: of the axis `coeff`, or one of every cell; 1 by default.
        window: layers around that of a cell that are changed with it.
        null: how many changes by 1e-5 measure the noise floor.
        k: how many cells the text lists.

    Raises:
        UsageError: an unknown axis or metric, or one that lacks an answer; prompts of two lengths.
        RangeError: no such layer, token, head or neuron.
        SiteError: no such site.
    """
    names = axis_names(over)
    if metric is not None:
        needs(metric)  # an unknown one is told before any work
    choice = Choice(experiment, site, layers, tokens, heads, neurons, coeffs, window)
    cases = experiment.cases(model, Asked(prompt, answer, against))
    name = metric or _default_metric(cases)
    grids = [choice.grid(model, case, names) for case in cases]
    _check_shapes(cases, grids)
    with step("sweeping") as bar:
        runs = [
            _run(model, experiment, case, grid, name, null, _share(bar, i, len(cases)))
            for i, (case, grid) in enumerate(zip(cases, grids, strict=True))
        ]
    return _summary(model, experiment, cases, grids, runs, name=name, k=k)


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


@dataclass(frozen=True, eq=False)
class _Run:
    cells: Cells
    source: float | None


def _run(
    model: Model,
    experiment: Experiment,
    case: Case,
    grid: Grid,
    name: str,
    null: int,
    progress: Progress | None,
) -> _Run:
    """One case: its cells, then its source's number."""
    measured = metric_of(name, answer=case.answer, against=case.against)
    if measured.n_positions > 1:
        case = case.followed(case.answer[:-1])
    change = experiment.change(model, case, grid)
    cells = run_cells(model, case.base, grid, change, measured, null=null, progress=progress)
    source = None
    if case.source is not None:
        source = measured.number(model.run([_request(case.source, measured)])[0].value)
    return _Run(cells, source)


def _share(bar: Progress | None, i: int, n: int) -> Progress | None:
    """The progress of case i of n."""
    if bar is None:
        return None
    return lambda done, total: bar(i * total + done, n * total)


def _summary(
    model: Model,
    experiment: Experiment,
    cases: Sequence[Case],
    grids: Sequence[Grid],
    runs: Sequence[_Run],
    *,
    name: str,
    k: int,
) -> Sweep:
    """The mean over the runs, with intervals if there are several."""
    case = cases[0]
    values = np.stack([r.cells.values for r in runs], axis=-1)  # (..., n_runs)
    low = high = None
    if len(runs) > 1:
        unchanged = np.array([r.cells.unchanged for r in runs])
        low, high = bootstrap_interval(values - unchanged, np.random.default_rng(0), n=2000)
    sources = [r.source for r in runs if r.source is not None]
    floors = [r.cells.floor for r in runs]
    return Sweep(
        facts=model.facts,
        title=experiment.title,
        site=grids[0].rest.site,
        prompt=model.token_rows(case.base.tokens),
        answer=model.token_rows(case.answer),
        against=model.token_rows(case.against),
        axes=_common_axes(cases, grids),
        metric=name,
        unit=UNITS.get(name, ""),
        values=values.mean(-1),
        low=low,
        high=high,
        unchanged=float(np.mean([r.cells.unchanged for r in runs])),
        source=float(np.mean(sources)) if sources else None,
        floor=float(np.max(floors)),
        n_runs=len(runs),
        n_null=sum(len(r.cells.null) for r in runs),
        k=k,
    )


def _common_axes(cases: Sequence[Case], grids: Sequence[Grid]) -> tuple[Axis, ...]:
    """The axes, with labels where they are those of every run. Tokens of prompts of several lengths
    are counted from the end.

    Raises `UsageError` where tokens are the same neither from the start nor from the end."""
    out = []
    for axes in zip(*(grid.axes for grid in grids), strict=True):
        if all(a == axes[0] for a in axes):
            out.append(axes[0])
            continue
        values = [a.values for a in axes]
        if any(v != values[0] for v in values):  # tokens: all else is the same in every run
            lengths = [len(case.base.tokens) for case in cases]
            values = [tuple(i - n for i in v) for v, n in zip(values, lengths, strict=True)]
        if any(v != values[0] for v in values):
            raise UsageError("the prompts have other tokens at the same places; count from the end")
        out.append(Axis(axes[0].name, values[0]))
    return tuple(out)
