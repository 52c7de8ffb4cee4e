"""A sequence that is being continued, token by token."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from mia.arrays import Array
from mia.engine.answers import Answer
from mia.engine.cells import Branch, Lease
from mia.engine.segments import Output, Row
from mia.llama import Context, Sampler

#: tokens that penalties look back on, as llama.cpp's own tools do
_PENALTY_TOKENS = 64


class Generation:
    """What one job generates after the last row of its segment."""

    def __init__(self, answer: Answer, branch: Branch, context: Context):
        self.job, self._answer = answer.job, answer
        self.branch = branch
        self.lease: Lease | None = None  # until there is room for it
        self._context = context
        self._row = branch.segment.rows[-1]
        self._sampler = Sampler(context.model, **asdict(self.job.request.sampling))
        for token in self.job.tokens[-_PENALTY_TOKENS:]:
            self._sampler.accept(token)

    @property
    def sequence(self) -> int:
        assert self.lease is not None
        return self.lease.sequence

    @property
    def n_cells(self) -> int:
        """Cells that it takes beyond the prompt's: the last token is not fed back."""
        return self.job.request.n_predict - 1

    def choose(self, logits: Array, b: int, scratch: Array) -> bool:
        """Picks the next token from the logits (n_vocab,) of batch row b. True if it is the last.

        `scratch` is an array like the logits: filling it costs less than getting a new one.
        """
        request, result = self.job.request, self._answer.result
        greedy = request.sampling.plain
        token = int(logits.argmax()) if greedy else self._sampler.sample(self._context, b)
        if request.logprobs:
            top = logits[token] if greedy else logits.max()
            np.subtract(logits, top, out=scratch)
            np.exp(scratch, out=scratch)
            result.logprobs.append(float(logits[token] - top - np.log(scratch.sum())))
        result.tokens.append(token)
        ended = request.stop_at_eog and self._context.model.is_eog(token)
        return ended or len(result.tokens) >= request.n_predict

    def next_row(self) -> Row:
        """The row of the token chosen last."""
        tokens = self._answer.result.tokens
        edits = self.job.edits_generated
        row = Row(tokens[-1], self._row.pos + 1, edits, self._row, Output.LOGITS)
        for read in self.job.reads:
            if read.generated:
                row.reads.append((read, len(read.positions) + len(tokens) - 1))
        self._row = row
        return row

    def close(self) -> None:
        self._sampler.close()
