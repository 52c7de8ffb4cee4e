"""One completion as it is written: bytes become characters, and a stop text ends it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from mia.request import Request, Result, RowMetric
from mia.serve.changes import Reads


@dataclass(frozen=True, slots=True)
class Written:
    """A token with its log-probability, and those of the most probable tokens, as (id, logprob)."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclass(eq=False)
class Choice:
    """One completion of one prompt, on the thread that has the model.

    Attributes:
        request, reads: what is run, and what is told of it when it is over.
        stops: texts at which it ends; they are no part of it.
        prompt: its token ids.
        tokens: written so far, the one that ended the turn too.
        text: written so far, as far as it is certain: what may become a stop text is held back.
        finish_reason: "stop" or "length" when it is over.
    """

    index: int
    request: Request
    prompt: list[int]
    stops: Sequence[str]
    reads: Reads
    tokens: list[Written] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prompt_logprobs: list[Written] | None = None
    _held: str = ""

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: Written, data: bytes, *, ends_turn: bool) -> str:
        """One more token, which stands for `data`. Returns the text that is certain now."""
        self.tokens.append(token)
        if ends_turn:
            return self.end("stop")
        self._held += self._decoder.decode(data)
        found = [(i, stop) for stop in self.stops if (i := self._held.find(stop)) >= 0]
        if found:
            first, _ = min(found)
            new, self._held = self._held[:first], ""
            self.text += new
            self.finish_reason = "stop"
            return new
        n = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
        new, self._held = self._held[:n], self._held[n:]
        self.text += new
        return new

    def end(self, reason: str) -> str:
        """It is over. Returns the text that was held back."""
        rest = self._held + self._decoder.decode(b"", True)
        self._held = ""
        self.text += rest
        self.finish_reason = reason
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text are the beginning of a stop text."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class PromptLogProbs(RowMetric):
    """A metric: for each token of a prompt but the first its log-probability, and the tokens that
    were the most probable there, as (id, log-probability)."""

    def __init__(self, tokens: Sequence[int], top: int):
        self.tokens, self.top = tokens, top

    def row(self, i: int, logits: object) -> Written | None:
        import numpy as np

        from mia.engine.generation import best_tokens

        if i + 1 >= len(self.tokens):
            return None
        x = np.asarray(logits, np.float32)
        largest = x.max()
        log_sum = float(np.log(np.exp(x - largest).sum(dtype=np.float64)) + largest)
        target = self.tokens[i + 1]
        best = best_tokens(x, self.top) if self.top else []
        return Written(
            target, float(x[target]) - log_sum, [(t, float(x[t]) - log_sum) for t in best]
        )


def prompt_logprobs(choice: Choice, result: Result) -> list[Written]:
    """Of each prompt token, the first without one."""
    return [Written(choice.prompt[0], None), *(w for w in result.value or [] if w is not None)]
