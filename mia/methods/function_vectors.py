"""Function vectors: Todd et al. 2023, Function Vectors in Large Language Models (arXiv 2310.15213).

| paper                       | here                                                            |
|-----------------------------|-----------------------------------------------------------------|
| P_t, prompts of task t      | `IclExperiment.dummies(n)`, ten shots; those answered right count    |
| a_lj(p)                     | `head_out.l`, head j, at the last token (before W_O)             |
| ā_lj^t, eq. 3               | `FunctionVector.means`, (n_layer, n_head, head_dim)              |
| p̃, shuffled outputs         | `few_shot(…, wrong=True)`                                        |
| CIE, AIE, eq. 4-6           | `FunctionVector.effects`, (n_layer, n_head); `mean_effects` is   |
|                             | the mean over tasks                                              |
| A, top heads                | `heads`, `top_heads(effects, n)`                                 |
| v_t = Σ ā_lj, eq. 7         | `head_vector`: each mean through its columns of W_O              |
| added at layer l            | `edits`: added to `resid_post.l` at the last token               |
| decoded vocabulary, § 3.2   | `decode`                                                         |
| v_AD = v_AC + v_BD − v_BC   | `compose`                                                        |

Where we deviate: W_O has as many columns per head as the model's heads have dimensions
(the paper's GPT-J has n_embd / n_head); biases and norms after W_O are no part of v. The
number of heads and the layer are chosen on the dev part unless given (the paper fixes 10
to 100 heads by model size, and shows all layers). The paper's A is one set for all tasks;
here it is the task's own, or that of all tasks given together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.errors import RangeError
from mia.io.provenance import file_metadata
from mia.measure.estimates import Accuracy, accuracy
from mia.methods.icl import IclExperiment, mean_of_right
from mia.methods.task_vectors import best_of
from mia.sites import Site
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Head = tuple[int, int]

#: numbers of heads that are tried
HEAD_COUNTS = (10, 20, 40)


@dataclass(frozen=True, eq=False, slots=True)
class FunctionVector:
    """A task as a sum of heads.

    Attributes:
        vector: (n_embd,) v.
        layer, coeff: where it is added, and how many times.
        heads: (layer, head), best first.
        effects: (n_layer, n_head) AIE that chose them.
        means: (n_layer, n_head, head_dim).
        dev: accuracy on dev by layer, (n_layer,), with v added there.
    """

    vector: Array
    layer: int
    coeff: float
    heads: tuple[Head, ...]
    effects: Floats
    means: Array
    dev: Floats

    def edits(self, layer: int | None = None) -> list[Edit]:
        return add_edits(self.vector, self.layer if layer is None else layer, self.coeff)


def add_edits(v: Array, layer: int, coeff: float = 1.0) -> list[Edit]:
    """v added at the end of a block, at the last token of the prompt."""
    return [Edit(Site("resid_post", layer), "add", v, tokens=-1, coeff=coeff)]


# -- extraction --------------------------------------------------------------------


def head_statistics(
    ex: IclExperiment, *, prompts: int = 100, effect_prompts: int = 25
) -> tuple[Array, Floats]:
    """Mean head outputs (n_layer, n_head, head_dim) and their average indirect effects
    (n_layer, n_head)."""
    if prompts < 1 or effect_prompts < 1:
        raise RangeError(f"{prompts} and {effect_prompts} prompts are not possible; at least 1")
    m = ex.model
    shown = ex.dummies(prompts)
    rows, right = ex.rows("head_out", shown)
    means = mean_of_right(rows, right)  # (n_layer, n_head * head_dim)
    # effects too are of queries that the model knows, as many as there are
    known = dict.fromkeys(p.query for p, ok in zip(shown, right, strict=True) if ok)
    queries = list(known) or [p.query for p in shown]
    asked = [queries[i % len(queries)] for i in range(effect_prompts)]
    effects = ex.effects(ex.few_shot(asked, wrong=True, what="effects"), means)
    return means.reshape(m.n_layer, m.n_head, -1), effects


def top_heads(effects: Floats, n: int) -> tuple[Head, ...]:
    """(layer, head) of the n largest effects, largest first. Raises `RangeError`."""
    if not 1 <= n <= effects.size:
        raise RangeError(f"{n} heads are asked for; the model has {effects.size}")
    order = np.argsort(-effects, axis=None, kind="stable")[:n]
    layers, heads = np.unravel_index(order, effects.shape)
    return tuple(zip(layers.tolist(), heads.tolist(), strict=True))


def head_vector(model: Model, means: Array, heads: Sequence[Head]) -> Array:
    """(n_embd,): what these heads' means (n_layer, n_head, head_dim) add to the residual."""
    total = np.zeros(model.n_embd, np.float32)
    dim = means.shape[2]
    for layer in sorted({i for i, _ in heads}):
        w_o = model.weights.matrix(f"blk.{layer}.attn_output.weight")  # (n_embd, n_head * head_dim)
        for _, h in (x for x in heads if x[0] == layer):
            total += w_o[:, h * dim : (h + 1) * dim] @ means[layer, h]
    return total


def choose(
    ex: IclExperiment,
    means: Array,
    effects: Floats,
    *,
    counts: Sequence[int] = HEAD_COUNTS,
    layers: Sequence[int] | None = None,
    coeffs: Sequence[float] = (1.0,),
) -> FunctionVector:
    """The number of heads, the layer and the coefficient that do best without examples on dev."""
    m = ex.model
    tried = list(range(m.n_layer)) if layers is None else list(layers)
    counts = sorted({min(n, effects.size) for n in counts})
    vectors = [head_vector(m, means, top_heads(effects, n)) for n in counts]
    settings = [(v, c, i) for v in range(len(counts)) for c in coeffs for i in tried]
    scores = ex.scores(ex.zero_shot(ex.dev), [add_edits(vectors[v], i, c) for v, c, i in settings])
    right = scores.correct.mean(1)
    v, c, layer = settings[best_of(right, scores.logprob.mean(1))]
    dev = np.full(m.n_layer, np.nan)
    for (v2, c2, i), a in zip(settings, right, strict=True):
        if (v2, c2) == (v, c):
            dev[i] = a
    return FunctionVector(vectors[v], layer, c, top_heads(effects, counts[v]), effects, means, dev)


def extract(
    ex: IclExperiment,
    *,
    prompts: int = 100,
    effect_prompts: int = 25,
    counts: Sequence[int] = HEAD_COUNTS,
    layers: Sequence[int] | None = None,
    coeffs: Sequence[float] = (1.0,),
) -> FunctionVector:
    """Means, effects, heads, vector and layer of one task."""
    means, effects = head_statistics(ex, prompts=prompts, effect_prompts=effect_prompts)
    return choose(ex, means, effects, counts=counts, layers=layers, coeffs=coeffs)


def as_vector(ex: IclExperiment, fv: FunctionVector) -> Vector:
    """For a file: v at its layer, with its heads and provenance."""
    metadata = {
        "name": ex.task.name,
        "method": "function vector: to be added at the last token",
        "layer": str(fv.layer),
        "coeff": str(fv.coeff),
        "heads": json.dumps(fv.heads),
        **{k: v if isinstance(v, str) else json.dumps(v) for k, v in ex.facts.items()},
        **file_metadata(ex.model),
    }
    return Vector({fv.layer: fv.vector}, "resid_post", metadata)


# -- evaluation --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy on the test part: `wrong` are prompts whose examples have shuffled outputs.

    Attributes:
        vector_given_icl: without examples, with the vector, of the queries that are answered right
            with examples, which are all that Todd et al. count; None where there are none.
        by_layer: layer -> (without examples, with shuffled ones), with the vector.
    """

    zero_shot: Accuracy
    icl: Accuracy
    wrong: Accuracy
    zero_shot_vector: Accuracy
    vector_given_icl: Accuracy | None
    wrong_vector: Accuracy
    by_layer: dict[int, tuple[Accuracy, Accuracy]]


def evaluate(
    ex: IclExperiment, v: Array, layer: int, coeff: float = 1.0, *, by_layer: bool = False
) -> Evaluation:
    layers = list(range(ex.model.n_layer)) if by_layer else [layer]
    variants = [[], *(add_edits(v, i, coeff) for i in layers)]
    zero = ex.scores(ex.zero_shot(ex.test), variants)
    wrong = ex.scores(ex.few_shot(ex.test, wrong=True), variants)
    icl = ex.scores(ex.few_shot(ex.test)).correct[0]
    at = layers.index(layer) + 1
    given = zero.correct[at][icl]
    curve = {i: (zero.accuracy(n + 1), wrong.accuracy(n + 1)) for n, i in enumerate(layers)}
    return Evaluation(
        zero.accuracy(),
        accuracy(icl),
        wrong.accuracy(),
        zero.accuracy(at),
        accuracy(given) if len(given) else None,
        wrong.accuracy(at),
        curve if by_layer else {},
    )


def decode(model: Model, v: Array, k: int = 10) -> dict[str, list[dict[str, Any]]]:
    """The tokens that v points to: `raw` through the unembedding alone, `norm` through the final
    norm as well."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, read in (("raw", model.lens.unembed(v, k)), ("norm", model.lens.read(v, k))):
        out[name] = [
            {"id": t, "text": model.piece(t), "logit": round(z, 4), "prob": round(p, 6)}
            for t, z, p in zip(
                read.ids[0].tolist(), read.logits[0].tolist(), read.probs[0].tolist(), strict=True
            )
        ]
    return out


# -- composition -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed vector beside the one extracted directly, on the composed task."""

    direct: FunctionVector
    vector: Array
    layer: int
    cosine: float
    evaluation: Evaluation
    direct_evaluation: Evaluation


def compose(
    ac: IclExperiment,
    bc: IclExperiment,
    bd: IclExperiment,
    ad: IclExperiment,
    *,
    n_heads: int = 40,
    known: Mapping[str, tuple[Array, Floats]] | None = None,
) -> Composed:
    """v(AD) = v(AC) + v(BD) - v(BC), all through the heads with the largest mean effect over the
    four tasks. Both vectors' layers are chosen on dev of AD.

    Args:
        known: by task name, what `head_statistics` has found already.
    """
    known = known or {}
    found = [known.get(ex.task.name) or head_statistics(ex) for ex in (ac, bc, bd, ad)]
    effects = np.mean([e for _, e in found], 0)
    heads = top_heads(effects, n_heads)
    v_ac, v_bc, v_bd, v_ad = (head_vector(ad.model, means, heads) for means, _ in found)
    v = v_ac + v_bd - v_bc
    layers = range(ad.model.n_layer)
    zero = ad.zero_shot(ad.dev)
    chosen = []
    for x in (v_ad, v):
        scores = ad.scores(zero, [add_edits(x, i) for i in layers])
        chosen.append((best_of(scores.correct.mean(1), scores.logprob.mean(1)), scores))
    (at_direct, scores), (at, _) = chosen
    direct = FunctionVector(
        v_ad, at_direct, 1.0, heads, effects, found[3][0], scores.correct.mean(1)
    )
    cosine = float(v @ v_ad / (np.linalg.norm(v) * np.linalg.norm(v_ad)))
    return Composed(direct, v, at, cosine, evaluate(ad, v, at), evaluate(ad, v_ad, at_direct))
