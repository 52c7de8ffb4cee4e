"""Which settings to try next: Bayesian optimisation of two aims by Thompson sampling.

Source: TSEMO, Bradford, Schweidtmann & Lapkin 2018 (J. Glob. Optim. 71). A Gaussian process is
fitted to the score and one to log KL. A function is drawn from each, and the setting that would
make the hypervolume largest, if the drawn functions were true, is tried. Deviation: there is a list
of settings, so that functions are drawn at these, by a Cholesky factor, and nothing is optimised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mia.arrays import Floats, IntArray
from mia.tuning.gaussian import Features, Process
from mia.tuning.pareto import gains
from mia.tuning.settings import Setting, Trial

#: settings of a round
ROUND = 6
#: the share of all trials that are spread over the settings at the start
_SPREAD = 0.2
#: settings that functions are drawn at: the time grows with the third power
_POOL = 1200
#: the least KL that has a logarithm here
_LEAST = 1e-7
#: trials beyond this many budgets say nothing about the scores within it
_FAR = 4.0


class Search:
    """Chooses what to try, from a list of settings.

    Args:
        budget: the KL budget.
        plain: the plain model's score.
        runs: how many settings will be tried in all.
        round_size: how many in one round, but the first.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        *,
        budget: float,
        plain: float,
        runs: int,
        round_size: int = ROUND,
        rng: np.random.Generator,
    ):
        self.settings, self.budget, self.plain, self.runs = settings, budget, plain, runs
        self._rng, self._round = rng, round_size
        self._features = Features.of(settings)
        self._n_kinds = int(self._features.kind.max()) + 1

    def next(self, tried: Mapping[int, Trial]) -> list[int]:
        """The settings of the next round, by their place in the list; none when all is done."""
        left = min(self.runs, len(self.settings)) - len(tried)
        if left <= 0:
            return []
        if self.runs >= len(self.settings):  # all of them, in their order
            return list(range(len(tried), len(tried) + min(left, self._round)))
        if not tried:
            return self._spread(min(left, max(self._round, round(_SPREAD * self.runs))))
        return self._best(tried, min(left, self._round))

    def _spread(self, n: int) -> list[int]:
        """A Latin hypercube: of each kind alike, over layers and over strengths."""
        f, kinds = self._features, np.arange(n) % self._n_kinds
        self._rng.shuffle(kinds)
        layers, strengths = ((self._rng.permutation(n) + self._rng.random(n)) / n for _ in range(2))
        chosen: list[int] = []
        for kind, layer, strength in zip(kinds, layers, strengths, strict=True):
            free = np.setdiff1d(np.flatnonzero(f.kind == kind), chosen)
            if not len(free):
                free = np.setdiff1d(np.arange(len(f.kind)), chosen)
            depths, sizes = f.depth[free], f.strength[free]
            far = np.abs(depths - np.quantile(depths, layer)) * 4
            far = far + np.abs(sizes - np.quantile(sizes, strength))
            near = free[np.isclose(far, far.min())]
            chosen.append(int(self._rng.choice(near)))
        return chosen

    def _best(self, tried: Mapping[int, Trial], n: int) -> list[int]:
        """Each of the n settings is the best of one draw."""
        rest = np.setdiff1d(np.arange(len(self.settings)), list(tried))
        pool = rest if len(rest) <= _POOL else np.sort(self._rng.choice(rest, _POOL, False))
        scores, kls = self._draws(tried, pool, n)
        known = [t for t in tried.values() if t.finite]
        chosen: list[int] = []
        for score, kl in zip(scores, kls, strict=True):
            free = np.flatnonzero(~np.isin(pool, chosen))
            gain = gains(score[free], kl[free], known, budget=self.budget, plain=self.plain)
            # where nothing would gain, what costs least may lead there
            best = free[np.argmax(gain if gain.max() > 0 else -kl[free])]
            chosen.append(int(pool[best]))
            # the next draws look elsewhere
            known.append(Trial(self.settings[chosen[-1]], float(score[best]), float(kl[best])))
        return chosen

    def _draws(self, tried: Mapping[int, Trial], pool: IntArray, n: int) -> tuple[Floats, Floats]:
        """Drawn scores and KLs of the pool's settings, (n, n_pool) each."""
        which = np.array(list(tried))
        score = np.array([t.score for t in tried.values()])
        kl = np.array([t.kl for t in tried.values()])
        finite = np.isfinite(score) & np.isfinite(kl)
        # numbers that are not finite: beyond any budget
        highest = max(100 * self.budget, kl[finite].max(initial=0.0))
        log_kl = np.log(np.clip(np.where(finite, kl, highest), _LEAST, None))
        at = self._features.at(pool)
        cost = Process(self._features.at(which), log_kl, self._n_kinds)
        kls = np.exp(cost.draws(at, n, self._rng))
        near = finite & (kl <= _FAR * self.budget)
        if near.sum() < 4:
            near = finite
        if not near.any():
            return np.full(kls.shape, self.plain), kls
        worth = Process(self._features.at(which[near]), score[near], self._n_kinds)
        return worth.draws(at, n, self._rng), kls
