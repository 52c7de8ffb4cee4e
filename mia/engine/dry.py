"""A run that decodes nothing: what `Model.run` would decode, counted.

The requests are planned and scheduled as they would be; each batch is noted instead of decoded. Results have
the right shapes and zeros in them, so that whatever builds the next requests from them goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.engine.answers import Answer
from mia.engine.batch import Batch
from mia.engine.runner import Runner
from mia.request import Request


@dataclass(frozen=True, slots=True)
class Decode:
    """One batch: its rows, how many sequences they are of, and the first block that runs."""

    rows: int
    sequences: int
    first_block: int


@dataclass(eq=False)
class Count:
    """What some runs decode.

    Attributes:
        n_layer: blocks of the model.
        room: rows that a batch holds.
        requests: how many there are.
        alone: rows (token-forwards) of the requests, each run alone.
        decodes: the batches of the planned runs.
    """

    n_layer: int = 0
    room: int = 0
    requests: int = 0
    alone: int = 0
    decodes: list[Decode] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Token-forwards of the planned runs."""
        return sum(d.rows for d in self.decodes)

    @property
    def block_rows(self) -> int:
        """Rows times the blocks that run for them."""
        return sum(d.rows * (self.n_layer - d.first_block) for d in self.decodes)


_count: ContextVar[Count | None] = ContextVar("count", default=None)


@contextmanager
def counted() -> Iterator[Count]:
    """Inside of it `Model.run` decodes nothing and notes what it would have. Results are zeros."""
    count = Count()
    token = _count.set(count)
    try:
        yield count
    finally:
        _count.reset(token)


def counting() -> Count | None:
    """The count that is under way, if one is."""
    return _count.get()


def prompts_only(requests: Sequence[Request]) -> list[Request]:
    """The same requests without generation, whose length nobody knows."""
    return [replace(r, n_predict=0) if r.n_predict else r for r in requests]


def no_logits(rows: Array, tokens: Sequence[int]) -> Array:
    """Stands for the unembedding."""
    return np.zeros((len(rows), len(tokens)), np.float32)


class _NoCache:
    """Stands for the KV cache."""

    def seq_cp(self, src: int, dst: int, end: int) -> None:
        pass

    def seq_rm(self, seq: int, start: int = 0) -> bool:
        return True


class _Noting:
    """Stands for the decoder."""

    def __init__(self, count: Count):
        self._count = count

    def decode(self, batch: Batch) -> None:
        n = len(set(batch.sequences))
        self._count.decodes.append(Decode(len(batch.rows), n, batch.first_block))


class DryRunner(Runner):
    """A runner that decodes nothing."""

    def __init__(self, count: Count, session: Any, jobs: Any, **how: Any):
        super().__init__(session, jobs, **how)
        self._site = session.site
        self.ledger.cache = _NoCache()
        self._decoder = _Noting(count)  # type: ignore[assignment]
        count.n_layer, count.room = session.context.model.n_layer, self._max_rows
        count.requests += len(self.answers)
        count.alone += sum(len(job.tokens) for job in self.answers)

    def _collect_logits(self, batch: Batch) -> None:
        pass

    def _finish(self, answer: Answer) -> None:
        for buffer in answer.buffers:
            for site in buffer.read.sites:
                buffer.array(site, self._site(site).read_shape(buffer.read.n_keys))
        job = answer.job
        if job.request.metric is not None:
            answer.result.value = 0.0
        elif job.logit_positions:
            shape = len(job.logit_positions), self.context.model.n_vocab
            answer.result.logits = np.zeros(shape, np.float32)
        super()._finish(answer)
