"""What is measured of a run, as one number: metrics by name, the same in every command.

| name         | the number                                                              | unit |
|--------------|-------------------------------------------------------------------------|------|
| `logprob`    | log-probability of the answer, its tokens summed                        | nats |
| `prob`       | its probability                                                         |      |
| `logit`      | logit of the answer's first token                                       |      |
| `logit-diff` | logit of the answer's first token minus that of the other answer's      |      |
| `rank`       | place of the answer's first token among all, 1 for the most likely      |      |
| `kl`         | KL(unchanged run ‖ this run) of the next token                          | nats |
| `module:function` | what a function of the logits `(n_positions, n_vocab)` returns    |      |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.errors import UsageError
from mia.measure.losses import log_probs, log_softmax
from mia.plugins import load_function
from mia.request import LogitDifference, LogitSum

#: name -> what it needs besides the logits
METRICS = {
    "logprob": ("answer",),
    "prob": ("answer",),
    "logit": ("answer",),
    "logit-diff": ("answer", "against"),
    "rank": ("answer",),
    "kl": (),
}
#: metrics that are of several tokens, if the answer has them
_WHOLE_ANSWER = ("logprob", "prob")
UNITS = {"logprob": "nats", "kl": "nats"}


@dataclass(frozen=True, eq=False)
class Metric:
    """One number of a run.

    Attributes:
        name: as in the module's table.
        function: takes logits (n_positions, n_vocab) and returns the number. That of `logit` and
            `logit-diff` needs the logits of one or two tokens only (`mia.request.TokenMetric`).
        n_positions: how many rows of logits it takes: those of the text's last tokens.
    """

    name: str
    function: Callable[[Array], float]
    n_positions: int = 1

    @property
    def of_unchanged(self) -> Callable[[Array], Any]:
        """The function for the unchanged run, which KL is measured from."""
        f = self.function
        return f.keep if isinstance(f, Divergence) else f

    def number(self, given: Any) -> float:
        """The number, from what the function has returned. Raises `UsageError` if that is none."""
        if isinstance(self.function, Divergence):
            given = self.function.number(given)
        try:
            value = float(given)
        except (TypeError, ValueError):
            raise UsageError(f"the metric {self.name} is {given!r:.40}, not a number") from None
        if not math.isfinite(value):
            raise UsageError(f"the metric {self.name} is {value}, no number to compare")
        return value


def needs(name: str) -> tuple[str, ...]:
    """What a metric needs besides logits: "answer", "against". Raises `UsageError`
    for an unknown one."""
    if ":" in name:
        return ()
    if name not in METRICS:
        raise UsageError(
            f"unknown metric {name!r}; known: {', '.join(METRICS)}, or module:function"
        )
    return METRICS[name]


def metric(
    name: str,
    *,
    answer: Sequence[int] = (),
    against: Sequence[int] = (),
) -> Metric:
    """A metric by name.

    Args:
        answer, against: token ids of the answer and of the other one.

    Raises:
        UsageError: an unknown metric, or one that lacks what it needs.
    """
    given = {"answer": len(answer), "against": len(against)}
    for what in needs(name):
        if not given[what]:
            raise UsageError(f"the metric {name} needs {_SAID[what]}")
    if ":" in name:
        return Metric(name, _Own(name))
    if name in _WHOLE_ANSWER:
        whole = _WholeAnswer(tuple(answer), probability=name == "prob")
        return Metric(name, whole, len(answer))
    if name == "kl":
        return Metric(name, Divergence())
    if name == "rank":
        return Metric(name, lambda logits: 1 + int((logits[-1] > logits[-1, answer[0]]).sum()))
    if name == "logit":
        return Metric(name, LogitSum({answer[0]: 1.0}))
    if answer[0] == against[0]:
        raise UsageError("both answers begin with the same token: their logits cannot differ")
    return Metric(name, LogitDifference(answer[0], against[0]))


_SAID = {"answer": "an answer", "against": "another answer"}


@dataclass(frozen=True)
class _WholeAnswer:
    answer: tuple[int, ...]
    probability: bool

    def __call__(self, logits: Array) -> float:
        logprob = float(log_probs(logits, self.answer).sum())
        return math.exp(logprob) if self.probability else logprob


class Divergence:
    """KL(unchanged ‖ changed) of the last token's distribution, in nats.

    The unchanged run is one of the same `Model.run`, for on another graph, or alone, it gives other
    roundings. Rows that come before it wait.
    """

    def __init__(self) -> None:
        #: (n_vocab,) log-probabilities and probabilities
        self._unchanged: Array | None = None
        self._probs: Array | None = None

    def keep(self, logits: Array) -> float:
        """For the unchanged run, whose divergence from itself is 0."""
        self._unchanged = log_softmax(logits[-1:])[0]
        self._probs = np.exp(self._unchanged)
        return 0.0

    def __call__(self, logits: Array) -> Any:
        row = log_softmax(logits[-1:])[0]
        return row.astype(np.float32) if self._unchanged is None else self.number(row)

    def number(self, given: Any) -> float:
        if not isinstance(given, np.ndarray):
            return float(given)
        assert self._unchanged is not None and self._probs is not None
        # no dot product: BLAS would start its threads for it, which takes longer
        return float((self._probs * (self._unchanged - given)).sum())


class _Own:
    """A user's function. What it raises becomes one line."""

    def __init__(self, name: str):
        self._name, self._function = name, load_function(name)

    def __call__(self, logits: Array) -> Any:
        try:
            return self._function(logits)
        except Exception as err:  # a user's function may fail in any way
            raise UsageError(
                f"the metric {self._name} failed: {type(err).__name__}: {err}"
            ) from err
