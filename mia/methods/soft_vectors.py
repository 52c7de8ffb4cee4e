"""Soft task vectors: every head blended with its mean over in-context prompts.

Sources: Hojel et al. 2024, Finding Visual Task Vectors (arXiv 2404.05729): REINFORCE on hard
gates; Soft Injection of Task Embeddings 2025 (arXiv 2507.20906) and jacknewsom/task_vectors:
one weight in [0, 1] for each head, by gradients.

| source                        | here                                                       |
|-------------------------------|------------------------------------------------------------|
| a_lj, task mean m             | `SoftVector.means`, (n_layer, n_head, head_dim)            |
| w, α, one weight per head     | `SoftVector.weights`, (n_layer, n_head)                    |
| h' = h(1 - w) + m·w           | `edits`: one `blend` per layer at the last token of a      |
|                               | zero-shot prompt                                           |
| z ~ Bernoulli(σ(θ)), Hojel   | `optimisers.Reinforce`: hard gates, ranked rewards, Adam   |
| gradient descent on w         | llama.cpp has no gradients: `optimisers.Evolution` or `Cma` |

One *evaluation* is one candidate w on one minibatch of training queries; its reward is
the mean log-probability of the right answer's first token. All candidates of a step are
the requests of one run. After every few steps the current w is tried on dev; the best one
there is kept, and training stops when none was better for `patience` such tries.

Where we deviate from Hojel: the reward is a log-probability, the gates' start is a run of
layers (`_best_start`), and what is kept are thresholded gates, or the soft weights themselves if
those do better on dev.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.errors import FileError, RangeError, UsageError
from mia.io.provenance import file_metadata
from mia.measure.estimates import Accuracy
from mia.methods.icl import IclExperiment, IclPrompt
from mia.methods.optimisers import OPTIMISERS
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

#: starts that are tried on further minibatches, and on how many
_STARTS, _START_ROUNDS = 8, 3
#: weights below this leave a head alone, so that its layer need not run again
_NONE = 1e-3


@dataclass(frozen=True, eq=False, slots=True)
class SoftVector:
    """A task as a blend of heads.

    Attributes:
        means: (n_layer, n_head, head_dim) head outputs with examples.
        weights: (n_layer, n_head) in [0, 1].
        metadata: where it came from.
    """

    means: Array
    weights: Floats
    metadata: Mapping[str, str] = field(default_factory=dict)

    def edits(self) -> list[Edit]:
        return blend_edits(self.means, self.weights)

    @property
    def n_active(self) -> int:
        return int((self.weights >= _NONE).sum())

    def save(self, path: str | Path) -> None:
        """Writes safetensors. Raises `FileError`."""
        from safetensors.numpy import save_file

        from mia.io.files import write_whole

        arrays = {"means": self.means, "weights": self.weights.astype(np.float32)}
        write_whole(
            path, lambda p: save_file(arrays, p, metadata={**self.metadata, "kind": "soft vector"})
        )


def load(path: str | Path) -> SoftVector:
    """Reads one. Raises `FileError` where the file is none."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as f:
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            metadata = dict(f.metadata() or {})
    except Exception as err:
        raise FileError(f"{path} is not a safetensors file: {err}") from err
    means, weights = arrays.get("means"), arrays.get("weights")
    if means is None or weights is None or means.ndim != 3 or means.shape[:2] != weights.shape:
        raise FileError(f"{path} is not a soft vector (mia soft-vector train makes one)")
    if not (np.isfinite(means).all() and (weights >= 0).all() and (weights <= 1).all()):
        raise FileError(f"{path} has weights outside [0, 1], or numbers that are not finite")
    return SoftVector(means.astype(np.float32), weights.astype(np.float64), metadata)


def check(soft: SoftVector, model: Model) -> None:
    """Raises `UsageError` where it does not fit a model."""
    have, need = soft.means.shape, (model.n_layer, model.n_head, model.head_dim)
    if have != need:
        raise UsageError(
            f"the soft vector is for {have[0]} layers of {have[1]} heads of {have[2]}; {model.name} "
            f"has {need[0]} of {need[1]} of {need[2]}"
        )


def blend_edits(means: Array, weights: Floats) -> list[Edit]:
    """Head outputs at the last token blended with means by weights (n_layer, n_head); layers
    without any weight are left alone."""
    out = []
    for layer in np.flatnonzero((weights >= _NONE).any(1)).tolist():
        value, w = means[layer].reshape(-1), np.clip(weights[layer], 0, 1)
        out.append(Edit(Site("head_out", layer), "blend", value, tokens=-1, coeff=w))
    return out


# -- training ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Training:
    """How to train.

    Attributes:
        evaluations: candidates times minibatches, at most.
        population: candidates of a step.
        batch: training queries of a minibatch, the same for all candidates of a step.
        every: steps between two tries on dev; patience: tries without a better one.
        prompts: prompts with examples that the means are over.
        start: w that a head begins with; None for the best of several on training queries.
    """

    optimiser: str = "reinforce"
    evaluations: int = 2000
    population: int = 32
    batch: int = 16
    every: int = 5
    patience: int = 5
    prompts: int = 100
    start: float | None = None

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise UsageError(
                f"unknown optimiser {self.optimiser!r}; known: {', '.join(OPTIMISERS)}"
            )
        for name in ("evaluations", "population", "batch", "every", "patience", "prompts"):
            if getattr(self, name) < 1:
                raise RangeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.start is not None and not 0 <= self.start <= 1:
            raise RangeError(f"start {self.start} is not in [0, 1]")


@dataclass(frozen=True, slots=True)
class Step:
    """A point of the learning curve. `dev` and `dev_logprob` are None between two tries."""

    evaluations: int
    reward: float
    best_reward: float
    dev: float | None = None
    dev_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    soft: SoftVector
    curve: tuple[Step, ...]
    evaluations: int
    dev: float


def train(
    ex: IclExperiment,
    how: Training | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Learns one weight per head. Examples and training queries come from the training part."""
    how = how or Training()
    m = ex.model
    means = ex.means("head_out", ex.dummies(how.prompts)).reshape(m.n_layer, m.n_head, -1)
    dev = ex.zero_shot(ex.dev)
    queries = ex.zero_shot(ex.train)
    rng = ex.rng(f"soft {how.optimiser}")
    keeper = _Keeper(ex, means, dev)
    spent = 0
    if how.start is None:
        start, spent = _best_start(ex, means, queries, how, rng)
    else:
        start = np.full(m.n_layer * m.n_head, how.start)
    keeper.offer([start])
    optimiser = OPTIMISERS[how.optimiser](start, rng, population=how.population)
    curve: list[Step] = []
    waited = step = 0
    while waited < how.patience:
        candidates = optimiser.ask()
        if spent + len(candidates) > how.evaluations:
            break
        chosen = rng.permutation(len(queries))[: how.batch].tolist()
        rewards = _rewards(ex, means, [queries[i] for i in chosen], candidates)
        optimiser.tell(rewards)
        spent += len(candidates)
        step += 1
        tried: tuple[float, float] | None = None
        if step % how.every == 0:
            tried, better = keeper.offer(optimiser.current())
            waited = 0 if better else waited + 1
        curve.append(Step(spent, float(rewards.mean()), float(rewards.max()), *(tried or ())))
        if progress is not None:
            progress(spent, how.evaluations)
    if step % how.every:
        keeper.offer(optimiser.current())
    facts = {
        "name": ex.task.name,
        "method": f"soft vector: head_out at the last token, blended; {how.optimiser}",
        "evaluations": str(spent),
        **{k: v if isinstance(v, str) else json.dumps(v) for k, v in ex.facts.items()},
        **file_metadata(m),
    }
    soft = SoftVector(means, keeper.weights.reshape(m.n_layer, m.n_head), facts)
    return Trained(soft, tuple(curve), spent, keeper.best[0])


class _Keeper:
    """The best weights on dev so far: by accuracy, then by log-probability."""

    def __init__(self, ex: IclExperiment, means: Array, dev: list[IclPrompt]):
        self.ex, self.means, self.dev = ex, means, dev
        self.best = (-1.0, -np.inf)
        self.weights: Floats = np.empty(0)

    def offer(self, offered: Sequence[Floats]) -> tuple[tuple[float, float], bool]:
        """(accuracy, log-probability) of the best offered, and whether it is the best so far."""
        scores = self.ex.scores(
            self.dev, [blend_edits(self.means, self._shaped(w)) for w in offered]
        )
        found = [
            (float(c), float(p))
            for c, p in zip(scores.correct.mean(1), scores.logprob.mean(1), strict=True)
        ]
        top = max(range(len(found)), key=lambda i: found[i])
        better = found[top] > self.best
        if better:
            self.best, self.weights = found[top], offered[top].copy()
        return found[top], better

    def _shaped(self, w: Floats) -> Floats:
        return w.reshape(self.means.shape[:2])


def _rewards(
    ex: IclExperiment, means: Array, prompts: list[IclPrompt], candidates: Floats
) -> Floats:
    """(n_candidates,) mean log-probability of the right answers."""
    shape = means.shape[:2]
    variants = [blend_edits(means, w.reshape(shape)) for w in candidates]
    return ex.scores(prompts, variants).logprob.mean(1)


def _best_start(
    ex: IclExperiment,
    means: Array,
    queries: list[IclPrompt],
    how: Training,
    rng: np.random.Generator,
) -> tuple[Floats, int]:
    """Weights that are the same in a run of layers and nothing outside of it, and how many
    evaluations it took to find them. Which layers, and how much, is tried on training queries:
    all on one minibatch, the best few on more. Task vectors say why: the residual at one layer
    can hold the task, and what is above reads the query."""
    n_layer, n_head = means.shape[:2]
    firsts = sorted({round(n_layer * f / 5) for f in range(3)})
    ends = sorted({max(1, round(n_layer * f / 15)) for f in range(7, 16)})
    runs = [(a, b, w) for a in firsts for b in ends if a < b for w in (0.5, 0.75, 1.0)]
    grids = np.zeros((len(runs), n_layer, n_head))
    for grid, (a, b, w) in zip(grids, runs, strict=True):
        grid[a:b] = w
    candidates = grids.reshape(len(runs), -1)

    def rewards(which: npt.NDArray[np.intp]) -> Floats:
        chosen = rng.permutation(len(queries))[: how.batch].tolist()
        return _rewards(ex, means, [queries[i] for i in chosen], candidates[which])

    best = np.arange(len(runs))[: how.evaluations]
    found, spent = rewards(best), len(best)
    for _ in range(_START_ROUNDS):
        kept = np.argsort(-found, kind="stable")[:_STARTS]
        if spent + len(kept) > how.evaluations:
            break
        best, found = best[kept], found[kept] + rewards(best[kept])
        spent += len(kept)
    return candidates[best[found.argmax()]], spent


# -- afterwards --------------------------------------------------------------------


def sparsify(ex: IclExperiment, soft: SoftVector, *, keep: float = 0.95) -> SoftVector:
    """The fewest heads, of the largest weights, that keep a share of the accuracy on dev."""
    if not 0 < keep <= 1:
        raise RangeError(f"keep {keep} is not in (0, 1]")
    order = np.argsort(-soft.weights, axis=None, kind="stable")
    n = soft.n_active
    if not n:
        return soft
    counts = sorted({min(n, round(2 ** (i / 2))) for i in range(2 * n.bit_length() + 1)})
    variants = []
    for count in counts:
        w = np.zeros(soft.weights.size)
        w[order[:count]] = soft.weights.ravel()[order[:count]]
        variants.append(w.reshape(soft.weights.shape))
    scores = ex.scores(ex.zero_shot(ex.dev), [blend_edits(soft.means, w) for w in variants])
    right = scores.correct.mean(1)
    enough = next(i for i, a in enumerate(right) if a >= keep * right[-1])
    metadata = {**soft.metadata, "sparsified": f"{counts[enough]} of {n} heads, {keep:g} of dev"}
    return SoftVector(soft.means, variants[enough], metadata)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy on the test part."""

    zero_shot: Accuracy
    icl: Accuracy
    soft: Accuracy


def evaluate(ex: IclExperiment, soft: SoftVector, *, match: str = "first") -> Evaluation:
    """Raises `UsageError` where the soft vector does not fit the model."""
    check(soft, ex.model)
    zero = ex.zero_shot(ex.test)
    return Evaluation(
        ex.accuracy(zero, match=match),
        ex.accuracy(ex.few_shot(ex.test), match=match),
        ex.accuracy(zero, soft.edits(), match=match),
    )
