"""Inference-time intervention: Li et al. 2023 (arXiv 2306.03341).

| paper                     | here                                                         |
|---------------------------|--------------------------------------------------------------|
| x_l^h                     | `head_out.l`, head h, at the text's last token               |
| probe p_θ(x)              | logistic regression per head, its accuracy by cross-validation |
| K                         | `mia.ranges.top_heads(accuracy, K)`                          |
| θ_l^h, "mass mean shift"  | `directions`: mean of true minus mean of false, at length 1  |
| σ_l^h                     | standard deviation of x_l^h along θ                           |
| α                         | `coeff` of the steering                                      |
| eq. 2: + α σ θ            | `train`: a `Vector` of site `head_out`, zero at other heads  |

Where we deviate: probes are of the last token of question and answer only, folds keep a
question's answers together. `mia.methods.iti_evaluation` adds the vector and asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.arrays import Array, IntArray, norms
from mia.datasets.choices import Question, select_questions
from mia.datasets.selection import Selection
from mia.errors import UsageError
from mia.methods.ab_prompts import answer_tokens
from mia.progress import Progress, step
from mia.ranges import Head, check_n_heads, top_heads
from mia.request import Capture, Request
from mia.show.text import rounded
from mia.sites import Site
from mia.vectors import Vector
from mia.vectors.report import VectorReport

if TYPE_CHECKING:
    from mia.model import Model


def question_tokens(model: Model, question: str, *, bos: bool | None = None) -> list[int]:
    """The tokens before an answer: under the chat template, or as Q: and A:."""
    try:
        text = model.chat(question)
    except UsageError:
        text = f"Q: {question}\nA:"
    return model.tokenize(text, bos=bos)


# -- heads ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadData:
    """Head outputs at the last token of question and answer.

    Attributes:
        x: (n_texts, n_layer, n_head, head_dim) float32.
        label: (n_texts,) True for a right answer.
        group: (n_texts,) which question.
    """

    x: Array
    label: npt.NDArray[np.bool_]
    group: IntArray


def collect(
    model: Model,
    questions: Sequence[Question],
    *,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> HeadData:
    """Runs every answer after its question, and keeps all heads at the last token."""
    if not questions:
        raise UsageError("there are no questions to learn from")
    sites = [Site("head_out", i) for i in range(model.n_layer)]
    requests, label, group = [], [], []
    for g, q in enumerate(questions):
        begun = question_tokens(model, q.question, bos=bos)
        for right, answers in ((True, q.correct), (False, q.incorrect)):
            for answer in answers:
                tokens = begun + answer_tokens(model, begun, answer)
                requests.append(Request(tokens, captures=[Capture(sites, tokens=-1)], logits=None))
                label.append(right)
                group.append(g)
    results = model.run(requests, progress=progress)
    x = np.stack([np.concatenate([r.captures[s] for s in sites]) for r in results])
    x = x.reshape(len(results), model.n_layer, model.n_head, model.head_dim)
    return HeadData(x, np.asarray(label), np.asarray(group, np.intp))


def probe_accuracy(
    data: HeadData, rng: np.random.Generator, *, folds: int = 2, layers: Sequence[int] | None = None
) -> Array:
    """Accuracy of a logistic probe for every head by cross-validation, (n_layer, n_head).

    Raises:
        UsageError: scikit-learn is missing, or there are fewer questions than folds.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as err:
        raise UsageError("probes need scikit-learn: pip install 'mia[probes]'") from err
    n_groups = int(data.group.max()) + 1
    if not 2 <= folds <= n_groups:
        raise UsageError(f"cannot split {n_groups} questions into {folds} folds")
    fold_of = rng.permutation(n_groups) % folds
    held = fold_of[data.group]  # (n_texts,)
    n_layer, n_head = data.x.shape[1:3]
    out = np.zeros((n_layer, n_head), np.float32)
    for layer in range(n_layer) if layers is None else layers:
        for head in range(n_head):
            x = data.x[:, layer, head]  # (n_texts, head_dim)
            right = 0
            for fold in range(folds):
                test = held == fold
                fit = LogisticRegression(max_iter=2000).fit(x[~test], data.label[~test])
                right += int((fit.predict(x[test]) == data.label[test]).sum())
            out[layer, head] = right / len(x)
    return out


def directions(data: HeadData, heads: Sequence[Head]) -> dict[Head, Array]:
    """σθ of each head, (head_dim,): centre-of-mass direction at length 1, times the standard
    deviation of all activations along it."""
    out = {}
    for layer, head in heads:
        x = data.x[:, layer, head]
        theta = x[data.label].mean(0) - x[~data.label].mean(0)
        theta = theta / (norms(theta) or 1)
        out[Head(layer, head)] = ((x @ theta).std() * theta).astype(np.float32)
    return out


def train(
    model: Model,
    questions: Sequence[Question],
    *,
    k: int = 16,
    rng: np.random.Generator,
    folds: int = 2,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> tuple[Vector, Array]:
    """The vector to add at `head_out`, and every head's probe accuracy (n_layer, n_head)."""
    check_n_heads(k, model.n_layer, model.n_head)
    data = collect(model, questions, bos=bos, progress=progress)
    accuracy = probe_accuracy(data, rng, folds=folds)
    heads = top_heads(accuracy, k)
    by_layer: dict[int, Array] = {}
    for (layer, head), v in directions(data, heads).items():
        row = by_layer.setdefault(layer, np.zeros((model.n_head, model.head_dim), np.float32))
        row[head] = v
    facts = model.file_metadata(
        method="iti",
        n_questions=str(len(questions)),
        heads=[str(h) for h in heads],
        bos=model.wants_bos(bos),
    )
    vector = Vector({i: v.ravel() for i, v in by_layer.items()}, "head_out", facts)
    return vector, accuracy


# -- experiments ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ItiVector(VectorReport):
    """A vector of attention heads, and how well a probe of each head does.

    Attributes:
        accuracy: (n_layer, n_head) of every head's probe.
        heads: the chosen ones, best first.
        about: how they were chosen (seed, n_questions).
    """

    accuracy: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    heads: Sequence[Head] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            **super().document(),
            **self.about,
            "heads": [h.document() for h in self.heads],
            "accuracy": rounded(self.accuracy, 4),
        }

    def plain(self) -> str:
        a = self.accuracy
        lines = [f"probe accuracy of {a.size} heads: median {np.median(a):.2f}"]
        return "\n".join([*lines, *(f"  {h}  {a[h]:.3f}" for h in self.heads)])

    def plot(self, path: str | Path) -> None:
        from mia.show import plots

        figure = plots.heatmap(self.accuracy, x="head", y="layer", title="probe accuracy of heads")
        plots.save(figure, path)


def learn(
    model: Model,
    data: Selection[Question] | str | Path,
    *,
    n_heads: int = 16,
    folds: int = 2,
    bos: bool | None = None,
    seed: int = 0,
) -> ItiVector:
    """`train` on questions of a file, with provenance; `write` saves the vector (.safetensors).

    Args:
        data: a shipped set by name, a file, or some of its questions:
            `mia.datasets.choices.select_questions("agree_vs_accurate", "0..39")`.
        n_heads: K, how many heads.
        folds, seed: of the cross-validation.
    """
    data = data if isinstance(data, Selection) else select_questions(data)
    rng = np.random.default_rng(seed)
    with step("reading") as bar:
        vector, accuracy = train(
            model, data.items, k=n_heads, rng=rng, folds=folds, bos=bos, progress=bar
        )
    return ItiVector(
        vector.with_metadata(**data.metadata()),
        model.facts,
        accuracy=accuracy,
        heads=top_heads(accuracy, n_heads),
        about={"seed": seed, "n_questions": len(data.items)},
    )
