"""Metrics: whether an answer is right and how probable it was; shares of words."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from mia.arrays import Array


@dataclass(frozen=True, slots=True)
class Score:
    """One answer: right or not, and the natural log-probability of the right ones."""

    correct: bool
    logprob: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A `Request.metric`: does the model's best next token begin a right answer?

    Attributes:
        answers: ids of the first tokens of the right answers, at least one.
    """

    answers: tuple[int, ...]

    def __call__(self, logits: Array) -> Score:
        row = logits[-1]  # (n_vocab,)
        best = int(row.argmax())
        top = float(row[best])
        log_all = top + math.log(float(np.exp(row - row[best]).sum()))
        right = row[list(self.answers)].astype(np.float64)
        log_right = top + math.log(np.exp(right - top).sum() + 1e-300)
        return Score(best in self.answers, min(log_right - log_all, 0.0))


def exact_match(text: str, outputs: Iterable[str], end: str = "") -> bool:
    """Whether a continuation, up to what ends an answer in the prompt's format, is one of the
    right answers. `end`: "\\n\\n" ends at the first line end, ", " at the first comma that the
    answer does not have itself (Washington, D.C.)."""
    stop = end.strip(" ")[:1] or end[:1]
    parts = text.split(stop) if stop else [text]

    def said(answer: str) -> str:
        own = answer.count(stop) if stop else 0
        return stop.join(parts[: own + 1]).strip()

    return any(said(o) == o for o in (o.strip() for o in outputs))


def word_share(text: str, words: Collection[str]) -> float:
    """The share of a text's words that are in a list, case aside; 0 for a text without words."""
    in_text = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())
    return sum(w in words for w in in_text) / len(in_text) if in_text else 0.0
