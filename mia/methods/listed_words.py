"""The share of listed words in sampled texts, with and without steering.

print(listed_words(Model("smollm2"), "The film was", "love.gguf", "positive_words"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.datasets.shipped import read_lines
from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.estimates import Estimate, bootstrap, format_estimate
from mia.measure.metrics import word_share
from mia.methods.steer import (
    SteeredPrompt,
    SteeringOptions,
    Vectors,
    check_coeffs,
    steered_prompt,
)
from mia.progress import Progress, step
from mia.request import Request, Sampling
from mia.show.report import Report

if TYPE_CHECKING:
    from mia.model import Model


@dataclass(frozen=True, slots=True)
class WordShare:
    """The share of listed words in texts sampled with one coefficient.

    Attributes:
        coeff: 0 for the unsteered texts.
        share: the mean over texts.
        change: the mean difference from the unsteered text of the same seed.
    """

    coeff: float
    share: Estimate
    texts: list[str]
    change: Estimate | None = None

    def document(self) -> dict[str, Any]:
        change = {} if self.change is None else {"change": self.change.document()}
        return {
            "coeff": self.coeff,
            "share": self.share.document(),
            "texts": self.texts,
            **change,
        }


@dataclass(frozen=True, eq=False)
class WordShares(Report):
    """The share of listed words, unsteered and for each coefficient.

    Attributes:
        words: the word list's name.
        samples: texts per coefficient.
    """

    prompt: SteeredPrompt
    words: str
    samples: int
    seed: int
    shares: list[WordShare]

    def document(self) -> dict[str, Any]:
        return {
            **self.prompt.document(),
            "words": self.words,
            "samples": self.samples,
            "seed": self.seed,
            "measure": [s.document() for s in self.shares],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"coeff": s.coeff, "seed": self.seed + i, "text": text}
            for s in self.shares
            for i, text in enumerate(s.texts)
        ]

    def plain(self) -> str:
        lines = ["coeff   share of listed words [95 %]    change [95 %]"]
        for s in self.shares:
            change = "" if s.change is None else format_estimate(s.change.document())
            lines.append(f"{s.coeff:<7g} {format_estimate(s.share.document()):<31s} {change}")
        return "\n".join(lines)


def listed_words(
    model: Model,
    prompt: str | Sequence[int],
    vectors: Vectors,
    words: str,
    *,
    coeffs: Sequence[float] | None = None,
    how: SteeringOptions | None = None,
    samples: int = 20,
    n_predict: int = 32,
    sampling: Sampling | None = None,
) -> WordShares:
    """The share of listed words in sampled continuations, with and without steering.

    Args:
        words: a file with one word per line, or a shipped list (`positive_words`).
        samples: texts per coefficient, with seeds that follow `sampling.seed`.
        sampling: temperature 1 by default.

    Raises:
        UsageError: fewer than two samples, or samples that would all be the same.
    """
    how, sampling = how or SteeringOptions(), sampling or Sampling(temperature=1.0)
    if samples < 2:
        raise UsageError(f"samples must be at least 2, got {samples}")
    if sampling.temperature == 0:
        raise UsageError(
            "texts sampled at temperature 0 are all the same; give a temperature (1 is the "
            "model's own)"
        )
    coefficients = check_coeffs(how.operator, coeffs)
    steered = steered_prompt(model, prompt, vectors, how)
    listed = {w.strip().lower() for w in read_lines(words).values()}
    edits = [[], *(steered.edits(c) for c in coefficients)]
    with step("sampling") as bar:
        texts = [_sample(model, steered.ids, e, sampling, n_predict, samples, bar) for e in edits]
    values = np.array([[word_share(t, listed) for t in row] for row in texts])  # (1 + n, samples)
    rng = np.random.default_rng(sampling.seed)
    shares = []
    for c, row, sampled in zip([0.0, *coefficients], values, texts, strict=True):
        share = bootstrap(row, rng)
        change = bootstrap(row - values[0], rng) if c else None
        shares.append(WordShare(c, share, sampled, change))
    return WordShares(steered, words, samples, sampling.seed, shares)


def _sample(
    model: Model,
    ids: list[int],
    edits: Sequence[Edit],
    sampling: Sampling,
    n_predict: int,
    n: int,
    bar: Progress | None,
) -> list[str]:
    requests = [
        Request(
            ids,
            edits,
            logits=None,
            n_predict=n_predict,
            sampling=replace(sampling, seed=sampling.seed + i),
        )
        for i in range(n)
    ]
    return [model.text(r.tokens) for r in model.run(requests, progress=bar)]
