"""Function vectors: Todd et al. 2023, Function Vectors in Large Language Models (arXiv 2310.15213).

    setup = TaskSetup(seed=10)
    report = train_many(model, ["antonym"], setup, files=["antonym.safetensors"])
    print(evaluate_tasks(model, ["antonym"], setup, SavedFunctionVector("antonym.safetensors")))

| paper                       | here                                                            |
|-----------------------------|-----------------------------------------------------------------|
| P_t, prompts of task t      | `IclExperiment.dummies(n)`, ten shots; only right answers count |
| a_lj(p)                     | `head_out.l`, head j, at the last token (before W_O)            |
| ā_lj^t, eq. 3               | `HeadStatistics.means`, (n_layer, n_head, head_dim)             |
| p̃, shuffled outputs         | `few_shot(…, wrong=True)`                                       |
| CIE, eq. 4                  | `IclExperiment.effects`, one prompt                             |
| AIE, eq. 5                  | `HeadStatistics.effects`, (n_layer, n_head); `train_many` takes |
|                             | the mean over its tasks                                         |
| A, top heads                | `FunctionVector.heads`, `mia.ranges.top_heads` of the effects   |
| v_t = Σ ā_lj, eq. 7         | `head_vector`: each mean through its columns of W_O             |
| added at layer l            | `FunctionVector.edits`: added to `resid_post.l`, last token     |
| decoded vocabulary, § 3.2   | `decode`                                                        |
| v_AD = v_AC + v_BD − v_BC   | `mia.methods.function_composition`                              |

Deviations: W_O has as many columns per head as the model's heads have dimensions (the
paper's GPT-J has n_embd / n_head); biases and norms after W_O are no part of v. The number
of heads and the layer are chosen on the dev part unless given (the paper fixes 10 to 100
heads by model size, and shows all layers). The paper's A is one set for all tasks; here it
is the task's own, or that of all tasks trained together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, Floats
from mia.errors import FileError, RangeError, UsageError
from mia.measure.estimates import accuracy
from mia.methods.function_vector_reports import (
    FunctionVector as FunctionVector,
    FunctionVectorRow,
    FunctionVectorScores as FunctionVectorScores,
    FunctionVectorTable,
    TrainedFunctionVectors,
)
from mia.methods.icl import (
    IclExperiment,
    Tasks,
    TaskSetup,
    best_of,
    each_task,
    experiment,
    mean_of_right,
)
from mia.methods.icl_reports import load_vector, vector_files, vector_metadata
from mia.ranges import Head, Ranges, by_layer as heads_by_layer, parse_layers, top_heads

if TYPE_CHECKING:
    from mia.model import Model


#: numbers of heads that are tried
HEAD_COUNTS = (10, 20, 40)
#: examples in a prompt, unless the setup says
SHOTS = 10


# -- training ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionVectorTraining:
    """How a function vector is trained. Of several numbers the best on dev is taken.

    Attributes:
        prompts: prompts that mean head outputs are over.
        effect_prompts: prompts with shuffled outputs that effects are over.
        n_heads: numbers of heads to sum.
        layers: the layers tried (`mia.ranges`); None for all.
        coeffs: how many times v is added.
    """

    prompts: int = 100
    effect_prompts: int = 25
    n_heads: Sequence[int] = HEAD_COUNTS
    layers: Ranges | None = None
    coeffs: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        _check_prompts(self.prompts, self.effect_prompts)


def _check_prompts(prompts: int, effect_prompts: int) -> None:
    if prompts < 1 or effect_prompts < 1:
        raise RangeError(
            f"prompts and effect_prompts must be at least 1, got {prompts} and {effect_prompts}"
        )


@dataclass(frozen=True, eq=False, slots=True)
class HeadStatistics:
    """What the heads do on a task.

    Attributes:
        means: mean outputs after examples, (n_layer, n_head, head_dim).
        effects: average indirect effects, (n_layer, n_head).
    """

    means: Array
    effects: Floats


def head_statistics(
    ex: IclExperiment, *, prompts: int = 100, effect_prompts: int = 25
) -> HeadStatistics:
    """Mean outputs of all heads, and their effects on prompts with shuffled outputs."""
    _check_prompts(prompts, effect_prompts)
    m = ex.model
    dummies = ex.dummies(prompts)
    with ex.step("heads of"):
        rows, right = ex.rows("head_out", dummies)
        means = mean_of_right(rows, right)  # (n_layer, n_head * head_dim)
        # effects are over queries that the model knows too, repeated if there are too few
        known = dict.fromkeys(p.query for p, ok in zip(dummies, right, strict=True) if ok)
        queries = list(known) or [p.query for p in dummies]
        asked = [queries[i % len(queries)] for i in range(effect_prompts)]
        effects = ex.effects(ex.few_shot(asked, wrong=True, what="effects"), means)
    return HeadStatistics(means.reshape(m.n_layer, m.n_head, -1), effects)


def head_vector(model: Model, means: Array, heads: Sequence[Head]) -> Array:
    """(n_embd,): what these heads' means (n_layer, n_head, head_dim) add to the residual."""
    total = np.zeros(model.n_embd, np.float32)
    dim = means.shape[2]
    for layer, numbers in sorted(heads_by_layer(heads).items()):
        w_o = model.weights.matrix(f"blk.{layer}.attn_output.weight")  # (n_embd, n_head * head_dim)
        for h in numbers:
            total += w_o[:, h * dim : (h + 1) * dim] @ means[layer, h]
    return total


def choose(
    ex: IclExperiment, statistics: HeadStatistics, how: FunctionVectorTraining | None = None
) -> FunctionVector:
    """The number of heads, the layer and the coefficient that do best without examples on dev.

    Raises `RangeError` for a layer out of range, or no heads."""
    how = how or FunctionVectorTraining()
    m, effects = ex.model, statistics.effects
    layers = parse_layers("*" if how.layers is None else how.layers, m.n_layer)
    counts = sorted({min(n, effects.size) for n in how.n_heads})
    heads = [top_heads(effects, n) for n in counts]
    vectors = [head_vector(m, statistics.means, h) for h in heads]
    settings = [(v, c, i) for v in range(len(counts)) for c in how.coeffs for i in layers]
    variants = [FunctionVector(vectors[v], i, c).edits() for v, c, i in settings]
    with ex.step("heads and layer of"):
        scores = ex.scores(ex.zero_shot(ex.dev), variants)
    v, coeff, layer = settings[best_of(scores)]
    dev = np.full(m.n_layer, np.nan)
    for (v2, c2, i), a in zip(settings, scores.correct.mean(1), strict=True):
        if (v2, c2) == (v, coeff):
            dev[i] = a
    metadata = vector_metadata(
        ex,
        "function vector: to be added at the last token",
        layer=str(layer),
        coeff=str(coeff),
        heads=", ".join(map(str, heads[v])),
    )
    return FunctionVector(vectors[v], layer, coeff, heads[v], effects, dev, metadata)


def train(ex: IclExperiment, how: FunctionVectorTraining | None = None) -> FunctionVector:
    """Means, effects, heads, vector and layer of one task."""
    how = how or FunctionVectorTraining()
    statistics = head_statistics(ex, prompts=how.prompts, effect_prompts=how.effect_prompts)
    return choose(ex, statistics, how)


def train_many(
    model: Model,
    tasks: Tasks,
    setup: TaskSetup | None = None,
    how: FunctionVectorTraining | None = None,
    *,
    top_k: int = 8,
    files: str | Sequence[str] = (),
) -> TrainedFunctionVectors:
    """Trains a vector for each task, all of the heads with the largest mean effect over the tasks.

    Args:
        top_k: how many tokens to decode of each vector.
        files: one for each task, or one name with `{name}` in it; each is written as soon as its
            vector is trained.
    """
    how = how or FunctionVectorTraining()
    loaded = each_task(tasks)
    files = vector_files(files, loaded) if files else []
    exs = [experiment(model, t, setup, shots=SHOTS) for t in loaded]
    statistics = [
        head_statistics(ex, prompts=how.prompts, effect_prompts=how.effect_prompts) for ex in exs
    ]
    effects = np.mean([s.effects for s in statistics], 0)  # (n_layer, n_head)
    vectors = []
    for n, (ex, s) in enumerate(zip(exs, statistics, strict=True)):
        vectors.append(choose(ex, HeadStatistics(s.means, effects), how))
        if files:
            vectors[n].as_vector().save(files[n])
    return TrainedFunctionVectors(
        model.facts,
        [ex.facts for ex in exs],
        vectors,
        effects,
        [decode(model, v.vector, top_k) for v in vectors],
        files,
    )


def decode(model: Model, v: Array, k: int = 10) -> dict[str, list[dict[str, Any]]]:
    """The tokens that v points to: `raw` through the unembedding alone, `norm` through the final
    norm as well."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, read in (("raw", model.lens.unembed(v, k)), ("norm", model.lens.read(v, k))):
        out[name] = [
            {**model.described(t), "logit": round(z, 4), "prob": round(p, 6)}
            for t, z, p in zip(
                read.ids[0].tolist(), read.logits[0].tolist(), read.probs[0].tolist(), strict=True
            )
        ]
    return out


# -- evaluation --------------------------------------------------------------------


def evaluate(
    ex: IclExperiment, fv: FunctionVector, *, by_layer: bool = False
) -> FunctionVectorScores:
    """Accuracies of one task, on its test part."""
    layers = list(range(ex.model.n_layer)) if by_layer else [fv.layer]
    variants = [[], *(fv.edits(i) for i in layers)]
    with ex.step("evaluating"):
        zero = ex.scores(ex.zero_shot(ex.test), variants)
        wrong = ex.scores(ex.few_shot(ex.test, wrong=True), variants)
        icl = ex.scores(ex.few_shot(ex.test)).correct[0]
    chosen = layers.index(fv.layer) + 1
    given = zero.correct[chosen][icl]
    curve = {i: (zero.accuracy(n), wrong.accuracy(n)) for n, i in enumerate(layers, 1)}
    return FunctionVectorScores(
        zero.accuracy(),
        accuracy(icl),
        wrong.accuracy(),
        zero.accuracy(chosen),
        wrong.accuracy(chosen),
        accuracy(given) if len(given) else None,
        curve if by_layer else {},
    )


@dataclass(frozen=True, slots=True)
class SavedFunctionVector:
    """A vector file to evaluate; `{name}` in it stands for the task's name.

    Attributes:
        layer, coeff: where it is added, and how many times; None for what the file says.
    """

    file: str | Path
    layer: int | None = None
    coeff: float | None = None

    def load(self, ex: IclExperiment) -> FunctionVector:
        """Raises `UsageError` if the file holds no function vector, or one of another model, and
        `FileError` if its coefficient is no number."""
        vector, path = load_vector(self.file, ex, "function vector")
        if len(vector.layers) != 1:
            raise UsageError(f"{path} has {len(vector.layers)} layers; a function vector has one")
        named = vector.layers[0]
        layer = named if self.layer is None else self.layer
        coeff = _saved_coeff(vector.metadata, path) if self.coeff is None else self.coeff
        return FunctionVector(vector[named], layer, coeff, metadata=vector.metadata)


def _saved_coeff(metadata: Mapping[str, str], path: str) -> float:
    text = metadata.get("coeff", "1")
    with contextlib.suppress(ValueError):
        if math.isfinite(coeff := float(text)):
            return coeff
    raise FileError(f"{path}: its coeff is {text!r:.60}, not a number")


def evaluate_tasks(
    model: Model,
    tasks: Tasks,
    setup: TaskSetup | None = None,
    how: FunctionVectorTraining | SavedFunctionVector | None = None,
    *,
    by_layer: bool = False,
) -> FunctionVectorTable:
    """Accuracies without examples and after shuffled ones, each with and without the vector.

    Args:
        how: trains a vector for each task, of its own heads, or names a file.
        by_layer: the vector added at every layer too.
    """
    rows = []
    for task in each_task(tasks):
        ex = experiment(model, task, setup, shots=SHOTS)
        fv = how.load(ex) if isinstance(how, SavedFunctionVector) else train(ex, how)
        scores = evaluate(ex, fv, by_layer=by_layer)
        rows.append(FunctionVectorRow(ex.facts, ex.task.family, fv.layer, fv.coeff, scores))
    return FunctionVectorTable(model.facts, rows)
