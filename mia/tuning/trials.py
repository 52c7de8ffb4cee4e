"""Trials: settings measured on a model, many in one run, and kept in a record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.datasets.shipped import read_text
from mia.edits import Edit
from mia.errors import FileError, NotFiniteError, UsageError
from mia.io.records import Line, Records
from mia.measure.losses import DivergenceFrom, log_softmax
from mia.measure.noise import nudge
from mia.request import Request, Result
from mia.sites import Site
from mia.tuning.scores import Edits, Score, no_edits
from mia.tuning.settings import Setting, Trial
from mia.values import shown
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

#: changes by 1e-5 that measure the noise floor
NULL = 4


@dataclass(frozen=True)
class Neutral:
    """The text that KL is measured on: windows of it, spread evenly.

    Attributes:
        text: a file, or a shipped text.
        tokens: how many are read in all.
        window: tokens of a window, with the BOS if there is one.
        bos: put a BOS in front of each; None for the model's default.
    """

    text: str = "neutral"
    tokens: int = 256
    window: int = 64
    bos: bool | None = None

    def windows(self, model: Model) -> list[list[int]]:
        """Token ids of each window. Raises `UsageError` where the text has less than two tokens."""
        ids = model.tokenize(read_text(self.text), bos=False)
        size = min(self.window, model.n_ctx, self.tokens)
        if len(ids) < 2 or size < 2:
            raise UsageError(f"a KL on {self.text} needs two tokens at least")
        head = [model.bos_token] if model.wants_bos(self.bos) else []
        body = min(size - len(head), len(ids))
        n = max(min(self.tokens // size, len(ids) // body), 1)
        starts = np.linspace(0, len(ids) - body, n).astype(int).tolist()
        return [[*head, *ids[start : start + body]] for start in starts]

    def document(self, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"text": self.text, "windows": len(windows), "tokens": sum(map(len, windows))}


class Trials:
    """Measures settings of one vector.

    Attributes:
        plain: the score of the plain model, as it is measured (less may be better).
        score_floor, kl_floor: the most that changes by 1e-5 moved the score, and their largest KL.
    """

    def __init__(
        self,
        model: Model,
        vector: Vector,
        score: Score,
        windows: Sequence[Sequence[int]],
        records: Records,
        *,
        keep_norm: bool = False,
    ):
        self._model, self._vector, self._score = model, vector, score
        self._keep_norm, self._records = keep_norm, records
        self._n_rounds = 0
        plain = model.run([*score.requests(no_edits), *(Request(w, logits="all") for w in windows)])
        n = len(plain) - len(windows)
        self.plain = score.value(plain[:n])
        self._windows: list[tuple[Sequence[int], DivergenceFrom]] = []
        for tokens, result in zip(windows, plain[n:], strict=True):
            assert result.logits is not None
            base = log_softmax(result.logits).astype(np.float32)
            self._windows.append((tokens, DivergenceFrom(base)))
        self.score_floor, self.kl_floor = self._floor()

    def _floor(self) -> tuple[float, float]:
        layers = self._vector.layers
        spread = [layers[int((i + 0.5) * len(layers) / NULL)] for i in range(NULL)]
        edits = [partial(_nudged, layer, seed) for seed, layer in enumerate(spread)]
        moved = self._measured(edits)
        return max(abs(s - self.plain) for s, _ in moved), max(kl for _, kl in moved)

    def run(self, settings: Sequence[Setting], progress: Progress | None = None) -> list[Trial]:
        """One round: of the record if it has it, else measured and put there."""
        texts = [str(s) for s in settings]
        number, self._n_rounds = self._n_rounds, self._n_rounds + 1
        known = self._records.rounds
        if number >= len(known) or [line.get("setting") for line in known[number]] != texts:
            self._records.keep(number)
            rows = self._measure(settings, progress)
            self._records.add(
                [
                    {"setting": text, "score": _json(score), "kl": _json(kl)}
                    for text, (score, kl) in zip(texts, rows, strict=True)
                ]
            )
        return [
            Trial(
                s,
                self._score.sign * _number(line, "score", math.nan),
                _number(line, "kl", math.inf),
            )
            for s, line in zip(settings, known[number], strict=True)
        ]

    def _measure(
        self, settings: Sequence[Setting], progress: Progress | None
    ) -> list[tuple[float, float]]:
        edits = [partial(s.edits, self._vector, keep_norm=self._keep_norm) for s in settings]
        try:
            return self._measured(edits, progress)
        except NotFiniteError:
            return [self._alone(e) for e in edits]  # one of them breaks the model

    def _alone(self, edits: Edits) -> tuple[float, float]:
        try:
            return self._measured([edits])[0]
        except NotFiniteError:
            return math.nan, math.inf

    def _measured(
        self, edits: Sequence[Edits], progress: Progress | None = None
    ) -> list[tuple[float, float]]:
        """Score and KL under each of some edits, all in one run."""
        requests: list[Request] = []
        for each in edits:
            requests += self._score.requests(each)
            requests += [Request(w, each(), logits="all", metric=kl) for w, kl in self._windows]
        results = self._model.run(requests, progress=progress)
        n = len(results) // max(len(edits), 1)
        return [self._pair(results[i : i + n]) for i in range(0, len(results), n)]

    def _pair(self, results: Sequence[Result]) -> tuple[float, float]:
        n = len(results) - len(self._windows)
        sizes = [len(tokens) for tokens, _ in self._windows]
        kl = np.average([r.value for r in results[n:]], weights=sizes)
        return self._score.value(results[:n]), float(kl)


def _nudged(layer: int, seed: int) -> list[Edit]:
    return [Edit(Site("resid_post", layer), nudge(seed))]


def _json(value: float) -> float | None:
    """A number of a record; JSON has none that is not finite."""
    return value if math.isfinite(value) else None


def _number(line: Line, key: str, missing: float) -> float:
    """A number of a record's line. Raises `FileError` if it is none."""
    value = line.get(key, "missing")
    if value is None:
        return missing
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FileError(f"the record has a line whose {key} is no number: {shown(value)}")
    return float(value)
