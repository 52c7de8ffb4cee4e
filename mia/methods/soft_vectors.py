"""Soft task vectors: every head blended with its mean over in-context prompts.

    ex = experiment(model, "antonym", TaskSetup(seed=10))
    report = train(ex, file="antonym.safetensors")
    print(evaluate_task(model, "antonym", "antonym.safetensors", TaskSetup(seed=10)))

Sources: Hojel et al. 2024, Finding Visual Task Vectors (arXiv 2404.05729): REINFORCE on hard
gates; Soft Injection of Task Embeddings 2025 (arXiv 2507.20906) and jacknewsom/task_vectors:
one weight in [0, 1] for each head, by gradients.

| source                        | here                                                       |
|-------------------------------|------------------------------------------------------------|
| a_lj, task mean m             | `SoftVector.means`, (n_layer, n_head, head_dim)            |
| w, α, one weight per head     | `SoftVector.weights`, (n_layer, n_head)                    |
| h' = h(1 - w) + m·w           | `SoftVector.edits`: one `blend` per layer at the last      |
|                               | token of a zero-shot prompt                                |
| z ~ Bernoulli(σ(θ)), Hojel    | `optimisers.Reinforce`: hard gates, ranked rewards, Adam   |
| gradient descent on w         | llama.cpp has no gradients: `optimisers.Evolution` or `Cma` |

One *evaluation* is one candidate w on one minibatch of training queries. Its reward is the
mean log-probability of the right answer's first token. All candidates of a step are the
requests of one run. After every few steps the current w is tried on dev. The best w on dev
is kept, and training stops after `patience` tries without a better one.

Deviations from Hojel: the reward is a log-probability, the gates start in a run of layers
(`_best_start`), and what is kept are thresholded gates, or the soft weights themselves if
those do better on dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, Floats, IntArray
from mia.datasets.tasks import Task
from mia.errors import FileError, RangeError, UsageError
from mia.io.files import read_safetensors
from mia.io.kinds import refuse_other_kind
from mia.methods import task_vectors
from mia.methods.icl import IclExperiment, IclPrompt, Match, TaskSetup, experiment
from mia.methods.icl_reports import check_saved, vector_metadata
from mia.methods.optimisers import OPTIMISERS
from mia.methods.soft_vector_reports import (
    SoftVector as SoftVector,
    SoftVectorRow,
    SoftVectorScores as SoftVectorScores,
    SoftVectorTable,
    SoftVectorTraining as SoftVectorTraining,
    Step as Step,
    TrainedSoftVector,
    blend_edits as blend_edits,
)
from mia.progress import step
from mia.vectors.files import as_float32

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress


#: starts that are tried on further minibatches, and on how many
_STARTS, _START_ROUNDS = 8, 3


def load(path: str | Path) -> SoftVector:
    """Reads a soft vector. Raises `FileError` if the file holds none."""
    refuse_other_kind(path, "soft vector")
    arrays, metadata = read_safetensors(path)
    means, weights = arrays.get("means"), arrays.get("weights")
    if means is None or weights is None or means.ndim != 3 or means.shape[:2] != weights.shape:
        raise FileError(f"{path} is not a soft vector (mia.methods.soft_vectors.train makes one)")
    means = as_float32(means)  # what is too large becomes infinite
    if not (np.isfinite(means).all() and (weights >= 0).all() and (weights <= 1).all()):
        raise FileError(f"{path} has weights outside [0, 1], or numbers that are not finite")
    return SoftVector(means, weights.astype(np.float64), metadata)


def check(soft: SoftVector, model: Model) -> None:
    """Raises `UsageError` if a soft vector does not fit a model."""
    have, need = soft.means.shape, (model.n_layer, model.n_head, model.head_dim)
    if have != need:
        raise UsageError(
            f"the soft vector is for {have[0]} layers of {have[1]} heads of {have[2]}; {model.name} "
            f"has {need[0]} of {need[1]} of {need[2]}"
        )


# -- training ----------------------------------------------------------------------


def train(
    ex: IclExperiment,
    how: SoftVectorTraining | None = None,
    *,
    file: str | Path | None = None,
) -> TrainedSoftVector:
    """Learns one weight per head. Examples and training queries come from the training part.

    Args:
        file: where to save the soft vector, .safetensors.
    """
    how = how or SoftVectorTraining()
    m = ex.model
    with ex.step("mean head outputs of"):
        means = ex.means("head_out", ex.dummies(how.prompts)).reshape(m.n_layer, m.n_head, -1)
    keeper = _Keeper(ex, means, ex.zero_shot(ex.dev))
    with step(f"training {ex.task.name}") as bar:
        curve, spent = _search(ex, means, keeper, how, bar)
    metadata = vector_metadata(
        ex,
        f"soft vector: head_out at the last token, blended; {how.optimiser}",
        evaluations=str(spent),
    )
    soft = SoftVector(means, keeper.weights.reshape(m.n_layer, m.n_head), metadata)
    if file is not None:
        soft.save(file)
    return TrainedSoftVector(
        m.facts,
        ex.facts,
        how,
        soft,
        tuple(curve),
        spent,
        keeper.best[0],
        None if file is None else str(file),
    )


def _search(
    ex: IclExperiment,
    means: Array,
    keeper: _Keeper,
    how: SoftVectorTraining,
    progress: Progress | None,
) -> tuple[list[Step], int]:
    """The learning curve, and how many evaluations were spent. `keeper` has the best weights."""
    queries = ex.zero_shot(ex.train)
    rng = ex.rng(f"soft {how.optimiser}")
    spent = 0
    if how.start is None:
        start, spent = _best_start(ex, means, queries, how, rng)
    else:
        start = np.full(means.shape[0] * means.shape[1], how.start)
    keeper.offer([start])
    optimiser = OPTIMISERS[how.optimiser](start, rng, population=how.population)
    curve: list[Step] = []
    failures = n_steps = 0
    while failures < how.patience:
        candidates = optimiser.ask()
        if spent + len(candidates) > how.evaluations:
            break
        batch = rng.permutation(len(queries))[: how.batch].tolist()
        rewards = _rewards(ex, means, [queries[i] for i in batch], candidates)
        optimiser.tell(rewards)
        spent += len(candidates)
        n_steps += 1
        on_dev: tuple[float, float] | None = None
        if n_steps % how.every == 0:
            on_dev, better = keeper.offer(optimiser.current())
            failures = 0 if better else failures + 1
        curve.append(Step(spent, float(rewards.mean()), float(rewards.max()), *(on_dev or ())))
        if progress is not None:
            progress(spent, how.evaluations)
    if n_steps % how.every:
        keeper.offer(optimiser.current())
    return curve, spent


class _Keeper:
    """The best weights on dev so far: by accuracy, then by log-probability."""

    def __init__(self, ex: IclExperiment, means: Array, dev: list[IclPrompt]):
        self.ex, self.means, self.dev = ex, means, dev
        self.best = (-1.0, -np.inf)
        self.weights: Floats = np.empty(0)

    def offer(self, candidates: Sequence[Floats]) -> tuple[tuple[float, float], bool]:
        """(accuracy, log-probability) of the best candidate, and whether it is the best so far."""
        scores = self.ex.scores(
            self.dev, [blend_edits(self.means, self._shaped(w)) for w in candidates]
        )
        pairs = [
            (float(c), float(p))
            for c, p in zip(scores.correct.mean(1), scores.logprob.mean(1), strict=True)
        ]
        top = max(range(len(pairs)), key=lambda i: pairs[i])
        better = pairs[top] > self.best
        if better:
            self.best, self.weights = pairs[top], candidates[top].copy()
        return pairs[top], better

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
    how: SoftVectorTraining,
    rng: np.random.Generator,
) -> tuple[Floats, int]:
    """Weights that are equal in a run of layers and 0 outside of it, and how many evaluations it
    took to find them. Runs and weights are tried on training queries: all on one minibatch, the
    best of them on more. Task vectors suggest such a start: the residual at one layer can hold
    the task, and the layers above read the query."""
    n_layer, n_head = means.shape[:2]
    firsts = sorted({round(n_layer * f / 5) for f in range(3)})
    ends = sorted({max(1, round(n_layer * f / 15)) for f in range(7, 16)})
    runs = [(a, b, w) for a in firsts for b in ends if a < b for w in (0.5, 0.75, 1.0)]
    grids = np.zeros((len(runs), n_layer, n_head))
    for grid, (a, b, w) in zip(grids, runs, strict=True):
        grid[a:b] = w
    candidates = grids.reshape(len(runs), -1)

    def rewards(which: IntArray) -> Floats:
        batch = rng.permutation(len(queries))[: how.batch].tolist()
        return _rewards(ex, means, [queries[i] for i in batch], candidates[which])

    best = np.arange(len(runs))[: how.evaluations]
    totals, spent = rewards(best), len(best)
    for _ in range(_START_ROUNDS):
        kept = np.argsort(-totals, kind="stable")[:_STARTS]
        if spent + len(kept) > how.evaluations:
            break
        best, totals = best[kept], totals[kept] + rewards(best[kept])
        spent += len(kept)
    return candidates[best[totals.argmax()]], spent


# -- evaluation --------------------------------------------------------------------


def sparsify(ex: IclExperiment, soft: SoftVector, *, keep: float = 0.95) -> SoftVector:
    """The fewest heads, of the largest weights, that keep a share of the accuracy on dev."""
    if not 0 < keep <= 1:
        raise RangeError(f"keep {keep} is not in (0, 1]")
    order = np.argsort(-soft.weights, axis=None, kind="stable")
    n = soft.n_active
    if not n:
        return soft
    counts = sorted({min(n, round(2 ** (i / 2))) for i in range(2 * n.bit_length() + 1)})
    candidates = []
    for count in counts:
        w = np.zeros(soft.weights.size)
        w[order[:count]] = soft.weights.ravel()[order[:count]]
        candidates.append(w.reshape(soft.weights.shape))
    with ex.step("fewest heads of"):
        scores = ex.scores(ex.zero_shot(ex.dev), [blend_edits(soft.means, w) for w in candidates])
    right = scores.correct.mean(1)
    enough = next(i for i, a in enumerate(right) if a >= keep * right[-1])
    metadata = {**soft.metadata, "sparsified": f"{counts[enough]} of {n} heads, {keep:g} of dev"}
    return SoftVector(soft.means, candidates[enough], metadata)


def evaluate(ex: IclExperiment, soft: SoftVector, *, match: Match = "first") -> SoftVectorScores:
    """Accuracies of one task, on its test part.

    Raises `UsageError` if the soft vector does not fit the model."""
    check(soft, ex.model)
    zero = ex.zero_shot(ex.test)
    with ex.step("evaluating"):
        return SoftVectorScores(
            ex.accuracy(zero, match=match),
            ex.accuracy(ex.few_shot(ex.test), match=match),
            ex.accuracy(zero, soft.edits(), match=match),
        )


def evaluate_task(
    model: Model,
    task: str | Path | Task,
    file: str | Path,
    setup: TaskSetup | None = None,
    *,
    keep: float | None = None,
    compare: bool = False,
    match: Match = "first",
) -> SoftVectorTable:
    """Accuracies without examples, with them, and with a saved soft vector in their place.

    Args:
        keep: also with the fewest heads that keep this share of the accuracy on dev.
        compare: also with a task vector, trained here (`mia.methods.task_vectors`).

    Raises `UsageError` if the file is from an incompatible model."""
    soft = load(file)
    check(soft, model)
    ex = experiment(model, task, setup)
    check_saved(soft.metadata, str(file), ex, "soft vector")
    rows = [SoftVectorRow("soft vector", soft, evaluate(ex, soft, match=match))]
    if keep is not None:
        sparse = sparsify(ex, soft, keep=keep)
        rows.append(SoftVectorRow("sparse", sparse, evaluate(ex, sparse, match=match)))
    plain = None
    if compare:
        plain = task_vectors.evaluate(ex, task_vectors.train(ex), match=match).vector
    return SoftVectorTable(model.facts, ex.facts, match, str(file), rows, plain)
