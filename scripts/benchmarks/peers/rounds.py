"""Turns: every contestant does a job once per round, so that all share the machine's noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.jobs import Check, Job, check
from benchmarks.peers.worker import Array


class Answers(Protocol):
    """A running contestant (`contestants.Running`)."""

    contestant: Contestant
    jobs: list[str]

    def ask(self, job: str, inputs: Path, out: Path | None = None) -> dict[str, Any]: ...


#: rounds that libraries take part in at most, the first ones: they are slow
LIBRARY_ROUNDS = 3


@dataclass
class Timing:
    """One contestant at one job.

    Attributes:
        cpu, wall: seconds of the whole job, per round (scaled up if it does a part).
        scale: the whole over the part that was done.
        check: how its result compares; None if there is nothing to compare.
        error: why there are no seconds: it failed, or its result is wrong.
    """

    name: str
    library: str
    type: str
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    scale: float = 1.0
    check: Check | None = None
    error: str = ""


@dataclass
class Table:
    """A job's timings, the contestants in order."""

    job: Job
    part: float
    timings: list[Timing]

    def ratios(self, timing: Timing, base: Timing) -> list[float]:
        """CPU seconds of one per CPU second of another, in the rounds that both took part in."""
        return [a / b for a, b in zip(timing.cpu, base.cpu, strict=False)]

    @property
    def mias(self) -> list[Timing]:
        return [t for t in self.timings if t.library == "mia" and not t.error]


def measure(
    job: Job,
    inputs: Path,
    running: Sequence[Answers],
    reference: Answers,
    *,
    rounds: int,
    folder: Path,
    part: float = 1.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Table:
    """A turn of each to see whether its result is right, which warms it up too; then the rounds.

    Args:
        reference: whose result the others are compared with.
        part: the whole job is this many times what `inputs` asks for.
    """
    table = Table(job, part, [])
    want, _ = _result(reference, job, inputs, folder)
    racing = []
    for who in running:
        if job.name not in who.jobs:
            continue
        c = who.contestant
        timing = Timing(c.name, c.library, c.type)
        table.timings.append(timing)
        got, timing.error = _result(who, job, inputs, folder)
        if not timing.error and got:
            timing.check = check(job, got, want, exact=c.exact)
            if not timing.check.right:
                timing.error = f"wrong: {timing.check}"
        if not timing.error:
            racing.append((who, timing))
        progress(f"{job.name}: {c.name}: {timing.error or timing.check or 'nothing to compare'}")
    for k in range(rounds):
        for who, timing in racing:
            if timing.error or (who.contestant.is_library and k >= LIBRARY_ROUNDS):
                continue
            answer = who.ask(job.name, inputs)
            if "error" in answer:
                timing.error = answer["error"]
                continue
            timing.scale = answer["scale"]
            timing.cpu.append(answer["cpu"] * answer["scale"] * part)
            timing.wall.append(answer["wall"] * answer["scale"] * part)
        progress(f"{job.name}: round {k + 1} of {rounds}")
    return table


def _result(who: Answers, job: Job, inputs: Path, folder: Path) -> tuple[Mapping[str, Array], str]:
    """The arrays that a contestant made, or why there are none."""
    out = folder / "result.npz"
    out.unlink(missing_ok=True)
    answer = who.ask(job.name, inputs, out)
    if "error" in answer:
        return {}, answer["error"]
    with np.load(out) as file:
        return {name: file[name] for name in file.files}, ""


def spread(values: Sequence[float]) -> str:
    """Median with the least and the most: 1.23 (1.2–1.3)."""
    mid = f"{median(values):.3g}"
    if len(values) < 2:
        return mid
    return f"{mid} ({min(values):.3g}–{max(values):.3g})"
