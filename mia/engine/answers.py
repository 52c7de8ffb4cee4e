"""Results in the making: the arrays that captures fill, and what becomes of a job's logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mia.arrays import Array
from mia.engine.finite import check_capture, check_logits
from mia.engine.jobs import Job, Read
from mia.request import Result, RowMetric, TokenMetric
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
        metric = self.job.request.metric
        if isinstance(metric, RowMetric):
            if self.result.value is None:
                self.result.value = [None] * len(self.job.logit_positions)
            self.result.value[i] = metric.row(i, row)
            return
        if self._logits is None:
            self._logits = np.empty((len(self.job.logit_positions), len(row)), np.float32)
        self._logits[i] = row
        self._logits_left -= 1
        if self._logits_left:
            return
        if metric is None:
            self.result.logits = self._logits
        else:
            self.result.value = metric(self._logits)
        self._logits = None

    def finish(self, kv_type: str) -> None:
        """Moves the captures into the result, cut to the tokens that there were.

        Raises `EngineError` for numbers that are not finite (see finite.py)."""
        n, n_fed = len(self.job.tokens), max(len(self.result.tokens) - 1, 0)
        by_site: dict[Site, list[tuple[list[int], Array]]] = {}
        buffers = self.buffers
        if self.job.metric_read is not None:
            *buffers, of_metric = buffers
            self._measure(of_metric, kv_type)
        for capture, buffer in zip(self.job.request.captures, buffers, strict=True):
            positions = list(buffer.read.positions)
            n_keys = n
            if buffer.read.generated:
                positions += range(n, n + n_fed)
                n_keys += n_fed
            arrays: dict[Site, Array] = {}
            for site in buffer.read.sites:
                a = buffer.arrays[site][: len(positions)]
                arrays[site] = a = a[..., :n_keys] if site.name in BY_KEY else a
                check_capture(a, site, kv_type=kv_type)
                by_site.setdefault(site, []).append((positions, a))
            self.result.by_capture.append((capture, arrays))
        for site, parts in by_site.items():
            self.result.captures[site] = parts[0][1] if len(parts) == 1 else _merged(parts, n)

    def _measure(self, buffer: Buffer, kv_type: str) -> None:
        """The metric of a few tokens, from the final norm's rows."""
        ((site, rows),) = buffer.arrays.items()
        check_capture(rows, site, kv_type=kv_type)
        metric = self.job.request.metric
        assert isinstance(metric, TokenMetric) and self.job.token_logits is not None
        logits = self.job.token_logits(rows, metric.tokens)
        changed = bool(self.job.request.edits)
        check_logits(logits, changed=changed, edited=False, kv_type=kv_type)
        self.result.value = metric.of(logits)


def _merged(parts: Sequence[tuple[list[int], Array]], n_prompt: int) -> Array:
    """The rows of several captures of one site, each token once, in the order in which the
    captures name them, generated tokens at the end."""
    rows: dict[int, Array] = {}
    for positions, a in parts:
        for position, row in zip(positions, a, strict=True):
            rows.setdefault(position, row)
    # with keys as the last axis, a capture of generated tokens has more of them
    out = np.zeros((len(rows), *max(a.shape[1:] for _, a in parts)), np.float32)
    for i, position in enumerate(sorted(rows, key=lambda p: p >= n_prompt)):
        out[i][..., : rows[position].shape[-1]] = rows[position]
    return out
