"""Two aims at once: a high score and a low KL.

A trial is on the Pareto front if no other one has a score at least as high at a KL at most as high.
The hypervolume (Zitzler & Thiele 1999) is the area between the front, the score of the plain model
and the KL budget: a front of larger area is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mia.arrays import Floats
from mia.tuning.settings import Trial


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other is better than, by their KL. Of equals, the first one stays."""
    order = sorted((t for t in trials if t.finite), key=lambda t: (t.kl, -t.score))
    out: list[Trial] = []
    for trial in order:
        if not out or trial.score > out[-1].score:
            out.append(trial)
    return out


def hypervolume(trials: Sequence[Trial], *, budget: float, plain: float) -> float:
    """The area below the front, above the plain model's score, left of the KL budget."""
    steps = [t for t in front(trials) if t.kl <= budget and t.score > plain]
    ends = [*(t.kl for t in steps), budget][1:]
    areas = ((t.score - plain) * (end - t.kl) for t, end in zip(steps, ends, strict=True))
    return float(sum(areas))


def gains(
    score: Floats, kl: Floats, trials: Sequence[Trial], *, budget: float, plain: float
) -> Floats:
    """By how much each of n more points (n,) would make the hypervolume larger. (n,)"""
    steps = [t for t in front(trials) if t.kl <= budget and t.score > plain]
    starts = np.array([0.0, *(t.kl for t in steps)])
    heights = np.array([plain, *(t.score for t in steps)])
    ends = np.array([*starts[1:], budget])
    height = np.maximum(score[:, None] - heights, 0)  # (n, n_steps)
    width = np.maximum(ends - np.maximum(kl[:, None], starts), 0)
    gain: Floats = (height * width).sum(1)
    return gain
