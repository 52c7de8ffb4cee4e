"""Task vectors: Hendel et al. 2023, In-Context Learning Creates Task Vectors (arXiv 2310.15916).

| paper                 | here                                                                  |
|-----------------------|-----------------------------------------------------------------------|
| S, demonstrations     | examples, `IclExperiment.shots` of them                                   |
| x', dummy query       | `dummies` of them, from the training part, none among the examples    |
| A, learning           | the prompt's last token up to block L: `resid_post.L` there           |
| θ(S), task vector     | `TaskVector.vector[L]`, the mean over the dummies                      |
| f(x; θ), application  | `edits`: θ in the place of `resid_post.L` at the last token of a       |
|                       | zero-shot prompt                                                      |
| L chosen on dev       | `extract`: best of all layers on the dev part                         |
| conflicting tasks     | `conflict`, section 5.2                                               |

Where we deviate: the paper takes a new S and a single x' for each test query; here θ is
the mean over several x' that are answered right, and serves all test queries. Several
sets S are tried, and means over the best of them; the dev part chooses among these
together with the layer. Our layer counts from zero and means the end of that block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.datasets.tasks import draw
from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.io.provenance import file_metadata
from mia.measure.estimates import Accuracy, accuracy, pooled
from mia.methods.icl import IclExperiment, IclPrompt, mean_of_right
from mia.sites import Site
from mia.vectors import Vector

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

#: layers at which every set of examples is tried
_FINALISTS = 5
#: numbers of sets whose means are tried
_MEANS = (2, 3, 4, 6, 8, 12)


@dataclass(frozen=True, eq=False, slots=True)
class TaskVector:
    """A task as a residual.

    Attributes:
        vector: θ at every layer tried, site `resid_post`.
        layer: the one chosen on dev.
        dev: accuracy on dev by layer, (n_layers,), in the order of `vector.layers`.
        dev_by_set: the best over layers for each set of examples, (n_sets,).
        sets: those that `vector` is the mean over.
    """

    vector: Vector
    layer: int
    dev: Floats
    dev_by_set: Floats
    sets: tuple[int, ...]

    def edits(self, layer: int | None = None) -> list[Edit]:
        """θ in the place of the last token's residual."""
        i = self.layer if layer is None else layer
        return [Edit(Site("resid_post", i), "replace", self.vector[i], tokens=-1)]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy on the test part: without examples, with them, and with the vector instead.

    Attributes:
        vector_given_icl: with the vector, of the queries that are answered right with
            examples (Todd et al. 2023 count so); None where there are none.
        by_layer: with the vector of each layer, where that was asked for.
        asked, known: inputs of the test part, and those answered right with examples.
    """

    zero_shot: Accuracy
    icl: Accuracy
    vector: Accuracy
    vector_given_icl: Accuracy | None
    layer: int
    by_layer: dict[int, Accuracy]
    asked: frozenset[str]
    known: frozenset[str]


def pool(found: Sequence[Evaluation]) -> Evaluation:
    """Several test parts as one; `layer` is the first's. Their queries may overlap."""
    asked = frozenset().union(*(e.asked for e in found))
    known = frozenset().union(*(e.known for e in found))
    given = [e.vector_given_icl for e in found if e.vector_given_icl is not None]
    return Evaluation(
        pooled([e.zero_shot for e in found], len(asked)),
        pooled([e.icl for e in found], len(asked)),
        pooled([e.vector for e in found], len(asked)),
        pooled(given, len(known)) if given else None,
        found[0].layer,
        {
            i: pooled([e.by_layer[i] for e in found], len(asked))
            for i in found[0].by_layer
            if all(i in e.by_layer for e in found)
        },
        asked,
        known,
    )


def extract(
    ex: IclExperiment,
    *,
    sets: int = 16,
    dummies: int = 8,
    layers: Sequence[int] | None = None,
) -> TaskVector:
    """θ of a task, its layer and set of examples chosen on the dev part.

    All layers are tried with the mean over all sets; each set then at the best five of them,
    and so are the means over the best two, four, eight … sets.

    Args:
        sets: how many sets of examples are tried.
        dummies: queries that each set's θ is the mean over.
        layers: those tried; by default all.

    Raises:
        RangeError: fewer than one set or dummy, or a layer out of range.
    """
    model = ex.model
    if sets < 1 or dummies < 1:
        raise RangeError(
            f"{sets} sets of {dummies} dummy queries are not possible; at least 1 of 1"
        )
    tried = list(range(model.n_layer)) if layers is None else list(layers)
    for i in tried:
        if not 0 <= i < model.n_layer:
            raise RangeError(
                f"layer {i} is out of range; {model.name} has 0 to {model.n_layer - 1}"
            )
    each = _thetas(ex, sets, dummies)  # (n_sets, n_layer, n_embd)
    zero = ex.zero_shot(ex.dev)
    first = _on_dev(ex, zero, each.mean(0, keepdims=True), tried)[0]  # (n_tried, 2)
    few = [tried[n] for n in _best_first(first)[:_FINALISTS]]
    by_set = _on_dev(ex, zero, each, few)  # (n_sets, n_few, 2)
    ranked = _best_first(by_set.max(1))
    counts = [k for k in _MEANS if k < sets] + [sets] * (sets > 1)
    means = np.array([each[ranked[:k]].mean(0) for k in counts]).reshape(-1, *each.shape[1:])
    candidates = np.concatenate([each, means])
    found = np.concatenate([by_set, _on_dev(ex, zero, means, few)]) if len(means) else by_set
    c, n = divmod(_best_first(found.reshape(-1, 2))[0], len(few))
    theta, layer = candidates[c], few[n]
    dev = _on_dev(ex, zero, theta[None], tried)[0, :, 0]
    used = ranked[: counts[c - sets]] if c >= sets else [c]
    metadata = {
        "name": ex.task.name,
        "method": "task vector: resid_post at the last token, to be replaced",
        "layer": str(layer),
        "sets": str(sets),
        "dummies": str(dummies),
        **{k: v if isinstance(v, str) else json.dumps(v) for k, v in ex.facts.items()},
        **file_metadata(model),
    }
    vector = Vector({i: theta[i] for i in tried}, "resid_post", metadata)
    return TaskVector(vector, layer, dev, by_set[:, :, 0].max(1), tuple(used))


def _replace(theta: Array, layer: int) -> list[Edit]:
    """θ (n_layer, n_embd) of one layer in the place of the last token's residual."""
    return [Edit(Site("resid_post", layer), "replace", theta[layer], tokens=-1)]


def _on_dev(
    ex: IclExperiment, zero: Sequence[IclPrompt], thetas: Array, layers: Sequence[int]
) -> Floats:
    """(n_thetas, n_layers, 2): accuracy and mean log-probability on dev."""
    if not len(thetas):
        return np.empty((0, len(layers), 2))
    scores = ex.scores(zero, [_replace(theta, i) for theta in thetas for i in layers])
    both = np.stack([scores.correct.mean(1), scores.logprob.mean(1)], 1)
    return both.reshape(len(thetas), len(layers), 2)


def _best_first(both: Floats) -> list[int]:
    """Places of (n, 2) accuracies and log-probabilities, best first."""
    return np.lexsort((both[:, 1], both[:, 0]))[::-1].tolist()


def _thetas(ex: IclExperiment, sets: int, dummies: int) -> Array:
    """(n_sets, n_layer, n_embd): means over the dummies that are answered right, or over all
    where none is."""
    rng = ex.rng("sets")
    prompts = [
        ex.same_examples(draw(ex.train, ex.shots, rng), dummies, f"set {s}") for s in range(sets)
    ]
    rows, right = ex.rows("resid_post", [p for of_set in prompts for p in of_set])
    ends = np.cumsum([len(p) for p in prompts])[:-1]
    parts = zip(np.split(rows, ends), np.split(right, ends), strict=True)
    return np.stack([mean_of_right(part, ok) for part, ok in parts])


def best_of(accuracies: Floats, logprobs: Floats) -> int:
    """The place of the best accuracy; of several the one with the best mean log-probability."""
    return int(np.lexsort((logprobs, accuracies))[-1])


def load(vector: Vector, layer: int | None = None) -> TaskVector:
    """A saved vector, at the layer that its file names unless another is given.

    Raises `UsageError` where no layer is known."""
    named = vector.metadata.get("layer", "")
    if layer is None and not named.isdigit():
        raise UsageError(f"{vector.name} does not say its layer; give one of its layers")
    i = int(named) if layer is None else layer
    vector[i]  # a clear error where it has no such layer
    empty = np.zeros(0)
    return TaskVector(vector, i, empty, empty, ())


def evaluate(
    ex: IclExperiment, theta: TaskVector, *, by_layer: bool = False, match: str = "first"
) -> Evaluation:
    """The table's row of a task, on its test part."""
    zero = ex.zero_shot(ex.test)
    layers = theta.vector.layers if by_layer else [theta.layer]
    plain, *with_vector = ex.right(zero, [[], *(theta.edits(i) for i in layers)], match=match)
    icl = ex.right(ex.few_shot(ex.test), match=match)[0]
    found = dict(zip(layers, with_vector, strict=True))
    given = found[theta.layer][icl]
    return Evaluation(
        accuracy(plain),
        accuracy(icl),
        accuracy(found[theta.layer]),
        accuracy(given) if len(given) else None,
        theta.layer,
        {i: accuracy(c) for i, c in found.items()} if by_layer else {},
        frozenset(q.input for q in ex.test),
        frozenset(q.input for q, ok in zip(ex.test, icl, strict=True) if ok),
    )


# -- conflict ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conflict:
    """Examples of one task, vector of another (Hendel et al., section 5.2).

    Attributes:
        shown, put: accuracy at the task of the examples and at the task of the vector, with
            the vector; `shown_plain`, `put_plain`: the same without it.
    """

    shown: Accuracy
    put: Accuracy
    shown_plain: Accuracy
    put_plain: Accuracy


def conflict(ex: IclExperiment, theta: TaskVector, other: IclExperiment) -> Conflict:
    """Puts another task's θ into prompts with this task's examples.

    Args:
        other: what θ was extracted with; asked about are the inputs that both tasks have, outside
            of this task's training part and of all that θ was made or chosen with.

    Raises `UsageError` where the tasks share no such input, or nothing but answers that
    begin alike."""
    used = {p.input for p in (*other.train, *other.dev)}
    answers = {p.input: p for p in other.task.pairs if p.input not in used}
    queries = [
        q
        for q in (*ex.test, *ex.dev)
        if q.input in answers and not set(ex.answers(q)) & set(ex.answers(answers[q.input]))
    ]
    if not queries:
        raise UsageError(
            f"{ex.task.name} and {other.task.name} have no inputs in common outside the training "
            "and dev parts whose answers differ"
        )
    shown = ex.few_shot(queries, what="conflict")
    put = [
        IclPrompt(p.examples, answers[q.input], p.tokens, ex.answers(answers[q.input]))
        for p, q in zip(shown, queries, strict=True)
    ]
    n = len(queries)
    scores = ex.scores([*shown, *put], [[], theta.edits()])

    def part(variant: int, a: int) -> Accuracy:
        return accuracy(scores.correct[variant, a : a + n])

    return Conflict(part(1, 0), part(1, n), part(0, 0), part(0, n))


def as_row(ex: IclExperiment, e: Evaluation) -> dict[str, Any]:
    """An evaluation as an entry of a document."""
    row: dict[str, Any] = {
        "task": ex.task.name,
        "family": ex.task.family,
        "layer": e.layer,
        "zero_shot": e.zero_shot.document(),
        "icl": e.icl.document(),
        "vector": e.vector.document(),
        "vector_given_icl": None if e.vector_given_icl is None else e.vector_given_icl.document(),
    }
    if e.by_layer:
        row["by_layer"] = {str(i): a.document() for i, a in e.by_layer.items()}
    return row
