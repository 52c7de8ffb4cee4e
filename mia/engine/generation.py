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


def best_tokens(logits: Array, n: int) -> list[int]:
    """The n tokens with the largest logits (n_vocab,), largest first; of equal ones the first."""
    n = min(n, len(logits))
    best = np.argpartition(logits, len(logits) - n)[len(logits) - n :]
    return best[np.lexsort((best, -logits[best]))].tolist()


class Generation:
    """What one job generates after a row.

    Attributes:
        sequence: which it goes on in, as soon as it has one.
        row: the last one that the model was run on.
    """

    def __init__(self, answer: Answer, row: Row, context: Context):
        self.job, self._answer = answer.job, answer
        self.row, self.sequence = row, -1
        self._context = context
        self._sampler = Sampler(context.model, **asdict(self.job.request.sampling))
        for token in self.job.tokens[-_PENALTY_TOKENS:]:
            self._sampler.accept(token)

    @property
    def tokens(self) -> list[int]:
        """Those chosen so far."""
        return self._answer.result.tokens

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
        if request.logprobs or request.top_logprobs:
            top = logits[token] if greedy else logits.max()
            np.subtract(logits, top, out=scratch)
            np.exp(scratch, out=scratch)
            log_sum = np.log(scratch.sum())
            if request.logprobs:
                result.logprobs.append(float(logits[token] - top - log_sum))
            if n := request.top_logprobs:
                best = best_tokens(logits, n)
                result.top_logprobs.append([(t, float(logits[t] - top - log_sum)) for t in best])
        result.tokens.append(token)
        ended = request.stop_at_eog and self._context.model.is_eog(token)
        return ended or len(result.tokens) >= request.n_predict

    def next_row(self) -> Row:
        """The row of the token chosen last."""
        tokens = self._answer.result.tokens
        edits = self.job.edits_generated
        row = Row(tokens[-1], self.row.pos + 1, edits, self.row, Output.LOGITS)
        for read in self.job.reads:
            if read.generated:
                row.reads.append((read, len(read.positions) + len(tokens) - 1))
        self.row = row
        return row

    def close(self) -> None:
        self._sampler.close()


class BranchGeneration(Generation):
    """A generation of a `Runner`: it starts at the end of a branch."""

    def __init__(self, answer: Answer, branch: Branch, context: Context):
        super().__init__(answer, branch.segment.rows[-1], context)
        self.branch = branch
        self.lease: Lease | None = None  # until there is room for it
