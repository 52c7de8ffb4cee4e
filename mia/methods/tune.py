"""A search for the setting of an intervention: operator, layers, strength, within a KL budget.

    tuned = tune(Model("smollm2"), "The film was", "love.gguf", Words("positive_words"))
    print(tuned)
    model.steered(tuned.steering())

Two aims are weighed: a score on prompts (`mia.tuning.scores`), and the mean KL divergence of the
next-token distributions from the plain model's on neutral text. The result is the Pareto front of
the settings that were tried, and the setting of the best score within the budget.

Source: Bradford, Schweidtmann & Lapkin 2018 (TSEMO), for what is tried next.

| in the paper                 | here                                                    |
|------------------------------|---------------------------------------------------------|
| decision variables           | `Setting`: operator, consecutive layers, coefficient    |
| objectives                   | the score, and log KL                                   |
| Gaussian processes           | `mia.tuning.gaussian.Process`, one for each             |
| spectral sampling            | draws at the settings of a list, by a Cholesky factor   |
| hypervolume, reference point | `mia.tuning.pareto`; the plain model's score, the budget |

The intervention acts on every token, of prompts, neutral text and what is generated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.datasets.prompts import Prompt
from mia.errors import UsageError
from mia.io.records import Records
from mia.methods.steering import CANDIDATES
from mia.methods.tune_reports import Tuned
from mia.progress import Progress, step
from mia.ranges import Ranges, compact
from mia.tuning.scores import Answer, Words
from mia.tuning.search import ROUND, Search
from mia.tuning.settings import Setting, Trial, all_settings
from mia.tuning.trials import Neutral, Trials
from mia.values import number
from mia.vectors import Vector
from mia.vectors.expression import named

if TYPE_CHECKING:
    from mia.model import Model

#: the share of all settings that is tried by default, and the least number
_SHARE, _LEAST = 0.2, 48
#: settings of a round where all are tried
_ALL_ROUND = 64


@dataclass(frozen=True)
class Space:
    """What is searched: every operator, at every run of so many consecutive layers, with every
    coefficient.

    Attributes:
        operators: as `mia.Steering` knows them.
        layers: those that a run may contain (`mia.ranges`); None for all that the vector has.
        widths: how many consecutive layers.
        coeffs: of operators that take one.
    """

    operators: Sequence[str] = ("add", "project_out")
    layers: Ranges | None = None
    widths: Sequence[int] = (1, 4)
    coeffs: Sequence[float] = CANDIDATES

    def settings(self, vector: Vector, n_layer: int, name: str) -> list[Setting]:
        """Raises `UsageError` or `RangeError`."""
        layers = vector.layers_among(self.layers, n_layer, name)
        return all_settings(layers, self.operators, self.widths, self.coeffs)


def tune(
    model: Model,
    prompts: str | Sequence[int] | Sequence[Prompt],
    vector: Vector | str,
    score: Answer | Words,
    *,
    kl_budget: float = 0.3,
    space: Space | None = None,
    runs: int | None = None,
    neutral: Neutral | None = None,
    keep_norm: bool = False,
    seed: int = 0,
    record: str | Path | None = None,
) -> Tuned:
    """Searches for settings of a high score and a low KL. Many are tried in each run of the model.

    Args:
        prompts: a text, token ids, or several `Prompt`s, over which the score is a mean.
        vector: a file, arithmetic or a `Vector`.
        score: what to make large.
        kl_budget: the most that the mean KL may be, in nats per token.
        space: what may be tried.
        runs: how many settings are tried; by default a fifth of all, at least 48. All of them, if
            that is as many as there are.
        keep_norm: keep the norm of each row that is changed.
        seed: of what is tried.
        record: a file of lines that trials are written to as they are made. Where it exists, the search
            goes on from there.

    Raises:
        UsageError: a vector that does not fit the model, an unknown operator or metric, a metric
            that lacks an answer, nothing to try.
        FileError: the record is of another search, or cannot be written.
    """
    if not number(kl_budget, "KL budget") > 0:
        raise UsageError(f"a KL budget of {kl_budget} is not positive")
    space, neutral = space or Space(), neutral or Neutral()
    v, name = named(vector, model.facts)
    model.check_vector(v, name)
    settings = space.settings(v, model.n_layer, name)
    n = _runs(runs, len(settings))
    measured = score.score(model, _prompts(prompts))
    windows = neutral.windows(model)
    about = {
        "vector": {"name": name, "site": v.site, "layers": compact(v.layers)},
        "normalize": keep_norm,
        "score": measured.about,
        "neutral": neutral.document(windows),
        "kl_budget": kl_budget,
        "space": _described(settings),
        "runs": n,
        "seed": seed,
    }
    records = Records(record, _manifest(model, v, windows, about))
    with step("searching") as bar:
        trials = Trials(model, v, measured, windows, records, keep_norm=keep_norm)
        plain = measured.sign * trials.plain
        search = Search(
            settings,
            budget=kl_budget,
            plain=plain,
            runs=n,
            round_size=ROUND if n < len(settings) else _ALL_ROUND,
            rng=np.random.default_rng(seed),
        )
        tried: dict[int, Trial] = {}
        while chosen := search.next(tried):
            done = len(tried)
            share = None if bar is None else _share(bar, done, len(chosen), n)
            tried |= zip(chosen, trials.run([settings[i] for i in chosen], share), strict=True)
    return Tuned(
        facts=model.facts,
        vector=v,
        about=about,
        score_name=measured.name,
        unit=measured.unit,
        sign=measured.sign,
        unchanged=plain,
        score_floor=trials.score_floor,
        kl_floor=trials.kl_floor,
        budget=kl_budget,
        n_settings=len(settings),
        trials=list(tried.values()),
    )


def _runs(runs: int | None, n: int) -> int:
    if runs is None:
        runs = max(round(_SHARE * n), _LEAST)
    if runs < 1:
        raise UsageError(f"{runs} runs; at least 1")
    return min(runs, n)


def _share(bar: Progress, done: int, chosen: int, n: int) -> Progress:
    """The progress of a round of some settings, of n in all."""
    return lambda i, of: bar(done * of + chosen * i, n * of)


def _prompts(given: str | Sequence[int] | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(given, str):
        return [Prompt(given)]
    several = [p for p in given if isinstance(p, Prompt)]
    if several and len(several) == len(given):
        return several
    return [Prompt([p for p in given if not isinstance(p, Prompt)])]


def _described(settings: Sequence[Setting]) -> dict[str, Any]:
    """What a document says of all that could be tried."""
    return {
        "settings": len(settings),
        "operators": list(dict.fromkeys(s.operator for s in settings)),
        "layers": compact(sorted({i for s in settings for i in s.layers})),
        "widths": sorted({len(s.layers) for s in settings}),
        "coeffs": sorted({s.coeff for s in settings if s.takes_coeff}),
    }


def _manifest(
    model: Model, vector: Vector, windows: Sequence[Sequence[int]], about: dict[str, Any]
) -> dict[str, Any]:
    """What a record is of: nothing that could change a number is left out but the machine."""
    digest = hashlib.sha256()
    for layer in vector.layers:
        digest.update(f"{layer} ".encode() + vector[layer].tobytes())
    texts = hashlib.sha256(repr([list(w) for w in windows]).encode())
    facts = model.facts.document()
    del facts["name"], facts["file"]  # the same model elsewhere
    return {
        "record": "tune",
        "model": facts,
        "kv_type": model.kv_type,
        "directions_sha256": digest.hexdigest(),
        "neutral_sha256": texts.hexdigest(),
        **about,
    }
