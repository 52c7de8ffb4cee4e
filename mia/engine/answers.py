"""Results in the making: the arrays that captures fill, and what becomes of a job's logits."""

from __future__ import annotations

import numpy as np

from mia.arrays import Array
from mia.engine.jobs import Job, Read
from mia.request import Result
from mia.sites import BY_KEY, Site


class Buffer:
    """The arrays of one `Read`, made when the width of a site is known."""

    def __init__(self, read: Read):
        self.read = read
        self.arrays: dict[Site, Array] = {}

    def array(self, site: Site, shape: tuple[int, ...]) -> Array:
        """The site's array (n_rows, *shape)."""
        array = self.arrays.get(site)
        if array is None:
            array = self.arrays[site] = np.zeros((self.read.n_rows, *shape), np.float32)
        return array


class Answer:
    """The result of one job, while it is being made."""

    def __init__(self, job: Job):
        self.job, self.result = job, Result()
        self.buffers = [Buffer(read) for read in job.reads]
        self._logits: Array | None = None  # (n_positions, n_vocab)
        self._logits_left = len(job.logit_positions)

    def put_logits(self, i: int, row: Array) -> None:
        """Row i of the logits asked for. With the last of them they go to the metric, or stay."""
        if self._logits is None:
            self._logits = np.empty((len(self.job.logit_positions), len(row)), np.float32)
        self._logits[i] = row
        self._logits_left -= 1
        if self._logits_left:
            return
        metric = self.job.request.metric
        if metric is None:
            self.result.logits = self._logits
        else:
            self.result.value = metric(self._logits)
        self._logits = None

    def finish(self) -> None:
        """Moves the captures into the result, cut to the tokens that there were."""
        n_fed = max(len(self.result.tokens) - 1, 0)
        for buffer in self.buffers:
            read, extra = buffer.read, n_fed if buffer.read.generated else 0
            n_rows, n_keys = len(read.positions) + extra, len(self.job.tokens) + extra
            for site in read.sites:
                a = buffer.arrays[site][:n_rows]
                self.result.captures[site] = a[..., :n_keys] if site.name in BY_KEY else a
