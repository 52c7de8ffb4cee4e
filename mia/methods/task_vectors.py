"""Task vectors: Hendel et al. 2023, In-Context Learning Creates Task Vectors (arXiv 2310.15916).

    setup = TaskSetup(seed=10)
    report = train_many(model, ["antonym"], setup, files=["antonym.safetensors"])
    print(evaluate_tasks(model, ["antonym"], setup, SavedTaskVector("antonym.safetensors")))

| paper                 | here                                                                  |
|-----------------------|-----------------------------------------------------------------------|
| S, demonstrations     | examples, `IclExperiment.shots` of them                               |
| x', dummy query       | `TaskVectorTraining.dummies` of them, from the training part, none    |
|                       | among the examples                                                    |
| A, learning           | the prompt's last token up to block L: `resid_post.L` there           |
| θ(S), task vector     | `TaskVector.vector[L]`, the mean over the dummies                     |
| f(x; θ), application  | `TaskVector.edits`: θ in place of `resid_post.L` at the last token of |
|                       | a zero-shot prompt                                                    |
| L chosen on dev       | `train`: best of all layers on the dev part                           |
| conflicting tasks     | `conflict`, section 5.2                                               |

Deviations: the paper takes a new S and a single x' for each test query. Here θ is the mean
over several x' that are answered right, and serves all test queries. Several sets S are
tried, and means over the best of them; set and layer are chosen together on the dev part.
Layers count from zero; layer L means the end of block L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, Floats
from mia.datasets.tasks import Task, draw
from mia.errors import RangeError, UsageError
from mia.measure.estimates import accuracy
from mia.methods.icl import (
    IclExperiment,
    IclPrompt,
    Match,
    Tasks,
    TaskSetup,
    each_task,
    experiment,
    mean_of_right,
)
from mia.methods.icl_reports import load_vector, vector_files, vector_metadata
from mia.methods.task_vector_reports import (
    Conflict,
    ConflictScores,
    TaskVector as TaskVector,
    TaskVectorRow,
    TaskVectorScores as TaskVectorScores,
    TaskVectorTable,
    TrainedTaskVectors,
    pool as pool,
    replacement,
)
from mia.ranges import Ranges, parse_layers
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.model import Model


#: layers at which every set of examples is tried
_FINALISTS = 5
#: numbers of sets whose means are tried
_MEANS = (2, 3, 4, 6, 8, 12)


# -- training ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskVectorTraining:
    """How a task vector is trained.

    Attributes:
        sets: how many sets of examples are tried.
        dummies: queries that each set's θ is the mean over.
        layers: the layers tried (`mia.ranges`); None for all.
    """

    sets: int = 16
    dummies: int = 8
    layers: Ranges | None = None

    def __post_init__(self) -> None:
        if self.sets < 1 or self.dummies < 1:
            raise RangeError(
                f"sets and dummies must be at least 1, got {self.sets} and {self.dummies}"
            )


def train(ex: IclExperiment, how: TaskVectorTraining | None = None) -> TaskVector:
    """θ of a task, with layer and sets of examples chosen on the dev part.

    All layers are tried with the mean over all sets. Then every set is tried at the best five
    layers, and so are the means over the best two, three, four … sets.

    Raises `RangeError` for a layer out of range."""
    how = how or TaskVectorTraining()
    model, sets = ex.model, how.sets
    layers = parse_layers("*" if how.layers is None else how.layers, model.n_layer)
    with ex.step("vector of"):
        by_set = _thetas(ex, sets, how.dummies)  # (n_sets, n_layer, n_embd)
        zero = ex.zero_shot(ex.dev)
        first = _on_dev(ex, zero, by_set.mean(0, keepdims=True), layers)[0]  # (n_layers, 2)
        finalists = [layers[n] for n in _best_first(first)[:_FINALISTS]]
        of_sets = _on_dev(ex, zero, by_set, finalists)  # (n_sets, n_finalists, 2)
        ranked = _best_first(of_sets.max(1))
        counts = [k for k in _MEANS if k < sets] + [sets] * (sets > 1)
        means = np.array([by_set[ranked[:k]].mean(0) for k in counts])
        means = means.reshape(-1, *by_set.shape[1:])  # (n_counts, n_layer, n_embd)
        of_means = _on_dev(ex, zero, means, finalists)
        scores = np.concatenate([of_sets, of_means])
        c, n = divmod(_best_first(scores.reshape(-1, 2))[0], len(finalists))
        theta, layer = np.concatenate([by_set, means])[c], finalists[n]
        dev = _on_dev(ex, zero, theta[None], layers)[0, :, 0]
    metadata = vector_metadata(
        ex,
        "task vector: resid_post at the last token, to be replaced",
        layer=str(layer),
        sets=str(sets),
        dummies=str(how.dummies),
    )
    vector = Vector({i: theta[i] for i in layers}, "resid_post", metadata)
    used = ranked[: counts[c - sets]] if c >= sets else [c]
    return TaskVector(vector, layer, dev, of_sets[:, :, 0].max(1), tuple(used))


def _on_dev(
    ex: IclExperiment, zero: Sequence[IclPrompt], thetas: Array, layers: Sequence[int]
) -> Floats:
    """(n_thetas, n_layers, 2): accuracy and mean log-probability on dev."""
    if not len(thetas):
        return np.empty((0, len(layers), 2))
    scores = ex.scores(zero, [[replacement(theta[i], i)] for theta in thetas for i in layers])
    both = np.stack([scores.correct.mean(1), scores.logprob.mean(1)], 1)
    return both.reshape(len(thetas), len(layers), 2)


def _best_first(both: Floats) -> list[int]:
    """Places of (n, 2) accuracies and log-probabilities, best first."""
    return np.lexsort((both[:, 1], both[:, 0]))[::-1].tolist()


def _thetas(ex: IclExperiment, sets: int, dummies: int) -> Array:
    """(n_sets, n_layer, n_embd): means over the dummies that are answered right, or over all
    if none is."""
    rng = ex.rng("sets")
    prompts = [
        ex.same_examples(draw(ex.train, ex.shots, rng), dummies, f"set {s}") for s in range(sets)
    ]
    rows, right = ex.rows("resid_post", [p for of_set in prompts for p in of_set])
    ends = np.cumsum([len(p) for p in prompts])[:-1]
    parts = zip(np.split(rows, ends), np.split(right, ends), strict=True)
    return np.stack([mean_of_right(part, ok) for part, ok in parts])


def train_many(
    model: Model,
    tasks: Tasks,
    setup: TaskSetup | None = None,
    how: TaskVectorTraining | None = None,
    *,
    files: str | Sequence[str] = (),
) -> TrainedTaskVectors:
    """Trains a vector for each task.

    Args:
        files: one for each task, or one name with `{name}` in it; each is written as soon as its
            vector is trained.
    """
    loaded = each_task(tasks)
    files = vector_files(files, loaded) if files else []
    facts, thetas = [], []
    for n, task in enumerate(loaded):
        ex = experiment(model, task, setup)
        theta = train(ex, how)
        if files:
            theta.vector.save(files[n])
        facts.append(ex.facts)
        thetas.append(theta)
    return TrainedTaskVectors(model.facts, facts, thetas, files)


# -- evaluation --------------------------------------------------------------------


def evaluate(
    ex: IclExperiment, theta: TaskVector, *, by_layer: bool = False, match: Match = "first"
) -> TaskVectorScores:
    """Accuracies of one task, on its test part."""
    layers = theta.vector.layers if by_layer else [theta.layer]
    variants = [[], *(theta.edits(i) for i in layers)]
    with ex.step("evaluating"):
        zero, *with_vector = ex.right(ex.zero_shot(ex.test), variants, match=match)
        icl = ex.right(ex.few_shot(ex.test), match=match)[0]
    right = dict(zip(layers, with_vector, strict=True))
    given = right[theta.layer][icl]
    return TaskVectorScores(
        accuracy(zero),
        accuracy(icl),
        accuracy(right[theta.layer]),
        accuracy(given) if len(given) else None,
        theta.layer,
        {i: accuracy(c) for i, c in right.items()} if by_layer else {},
        frozenset(q.input for q in ex.test),
        frozenset(q.input for q, ok in zip(ex.test, icl, strict=True) if ok),
    )


def load(vector: Vector, layer: int | None = None) -> TaskVector:
    """A saved vector, at the layer that its file names unless another is given.

    Raises `UsageError` if no layer is known, or the vector does not have it."""
    named = vector.metadata.get("layer", "")
    if layer is None and not (named.isdecimal() and len(named) < 10):
        raise UsageError(f"{vector.name} does not say its layer; give one of its layers")
    i = int(named) if layer is None else layer
    vector[i]  # raises if it has no such layer
    empty = np.zeros(0)
    return TaskVector(vector, i, empty, empty, ())


@dataclass(frozen=True, slots=True)
class SavedTaskVector:
    """A vector file to evaluate; `{name}` in it stands for the task's name.

    Attributes:
        layer: where to put it; None for the layer that the file names.
    """

    file: str | Path
    layer: int | None = None


def evaluate_tasks(
    model: Model,
    tasks: Tasks,
    setup: TaskSetup | None = None,
    how: TaskVectorTraining | SavedTaskVector | None = None,
    *,
    repeats: int = 1,
    match: Match = "first",
    by_layer: bool = False,
) -> TaskVectorTable:
    """Accuracies without examples, with them, and with the vector in their place.

    Args:
        how: trains a vector for each split, or names a file.
        repeats: pool this many splits, of following seeds.
        by_layer: the vector of every layer too.

    Raises `UsageError` for repeats of a saved vector: other splits have other test queries."""
    if isinstance(how, SavedTaskVector) and repeats > 1:
        raise UsageError("repeats train a vector for each split; a saved vector has one")
    rows = []
    for task in each_task(tasks):
        first = experiment(model, task, setup)
        scores = []
        for repeat in range(repeats):
            ex = first.with_seed(first.seed + repeat) if repeat else first
            if isinstance(how, SavedTaskVector):
                theta = load(load_vector(how.file, ex, "task vector")[0], how.layer)
            else:
                theta = train(ex, how)
            scores.append(evaluate(ex, theta, by_layer=by_layer, match=match))
        rows.append(
            TaskVectorRow(first.facts, first.task.family, pool(scores), [s.layer for s in scores])
        )
    return TaskVectorTable(model.facts, match, rows)


# -- conflict ----------------------------------------------------------------------


def conflict(
    model: Model,
    task: str | Path | Task,
    other: str | Path | Task,
    setup: TaskSetup | None = None,
    how: TaskVectorTraining | None = None,
) -> Conflict:
    """Puts the vector of another task into prompts with examples of a task: which one wins?

    Raises as `put_into`."""
    ex, source = (experiment(model, t, setup) for t in (task, other))
    theta = train(source, how)
    with_vector, without = put_into(ex, theta, source)
    return Conflict(model.facts, ex.facts, source.task.name, theta.layer, with_vector, without)


def put_into(
    ex: IclExperiment, theta: TaskVector, source: IclExperiment
) -> tuple[ConflictScores, ConflictScores]:
    """Accuracies with another task's θ in prompts with this task's examples, and without it.

    Args:
        source: what θ was trained with. Queries are the inputs that both tasks have, without
            this task's training part and all pairs that θ was trained or chosen with.

    Raises `UsageError` if the tasks share no such input, or only inputs whose answers begin
    with the same token."""
    used = {p.input for p in (*source.train, *source.dev)}
    answers = {p.input: p for p in source.task.pairs if p.input not in used}
    queries = [
        q
        for q in (*ex.test, *ex.dev)
        if q.input in answers and not set(ex.answers(q)) & set(ex.answers(answers[q.input]))
    ]
    if not queries:
        raise UsageError(
            f"{ex.task.name} and {source.task.name} have no inputs in common outside the training "
            "and dev parts whose answers differ"
        )
    prompts = ex.few_shot(queries, what="conflict")
    others = [
        IclPrompt(p.examples, answers[q.input], p.tokens, ex.answers(answers[q.input]))
        for p, q in zip(prompts, queries, strict=True)
    ]
    n = len(queries)
    with ex.step("conflict of"):
        correct = ex.scores([*prompts, *others], [[], theta.edits()]).correct  # (2, 2 n)
    without, with_vector = (ConflictScores(accuracy(c[:n]), accuracy(c[n:])) for c in correct)
    return with_vector, without
