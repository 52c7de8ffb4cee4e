"""Inference-time intervention: Li et al. 2023 (arXiv 2306.03341).

| paper                     | here                                                         |
|---------------------------|--------------------------------------------------------------|
| x_l^h                     | `head_out.l`, head h, at the text's last token               |
| probe p_θ(x)              | logistic regression per head, its accuracy by cross-validation |
| K                         | `top_heads(accuracy, K)`                                     |
| θ_l^h, "mass mean shift"  | `directions`: mean of true minus mean of false, at length 1  |
| σ_l^h                     | standard deviation of x_l^h along θ                           |
| α                         | `coeff` of the steering                                      |
| eq. 2: + α σ θ            | `train`: a `Vector` of site `head_out`, zero at other heads  |

The vector is added at the last token of the prompt and at each generated one; in
multiple choice at every token that is scored or decides a score (`answer_edits`), as
the authors' evaluation does. Where we deviate: probes are of the last token of
question and answer only, folds keep a question's answers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.datasets.shipped import read_rows
from mia.edits import Edit
from mia.errors import FileError, RangeError, UsageError
from mia.io.provenance import file_metadata
from mia.measure.losses import TokenLoss
from mia.methods import caa
from mia.request import Capture, Request
from mia.sites import Site
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with answers that are right, the best one first, and answers that are not."""

    question: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]


def load_questions(source: str | Path) -> list[Question]:
    """JSONL with `question`, `correct_answers`, `incorrect_answers` (lists, as TruthfulQA) and
    perhaps `best_answer`, or a set of A/B items (`mia.methods.caa.load_items`), whose matching
    answer is the incorrect one.

    Raises:
        FileError: no such file, a missing field, or nothing in it.
    """
    path = caa.find_items(source)
    if path.suffix.lower() != ".jsonl":
        return [_from_ab(item) for item in caa.load_items(source)]
    out = [_question(row, f"{path}, {where}") for where, row in read_rows(path)]
    if not out:
        raise FileError(f"{path} is empty; a question for each line is needed")
    return out


def _question(row: Any, where: str) -> Question:
    row = row if isinstance(row, dict) else {}
    question = row.get("question")
    if not _is_text(question):
        raise FileError(f"{where}: there is no text 'question'")
    answers = []
    for key in ("correct_answers", "incorrect_answers"):
        found = row.get(key)
        if not isinstance(found, list) or not found or not all(map(_is_text, found)):
            raise FileError(f"{where}: {key!r} is {found!r:.60}; a list of texts is needed")
        answers.append(found)
    best = row.get("best_answer")
    if best is not None:
        if not _is_text(best):
            raise FileError(f"{where}: 'best_answer' is {best!r:.60}; a text is needed")
        # MC1 asks for the first one
        answers[0] = [best, *(a for a in answers[0] if a.strip() != best.strip())]
    return Question(question, tuple(answers[0]), tuple(answers[1]))


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _from_ab(item: caa.Item) -> Question:
    question, matching, other = caa.choices(item)
    return Question(question, (other,), (matching,))


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
    group: npt.NDArray[np.intp]


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
                tokens = begun + caa.answer_tokens(model, begun, answer)
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
        raise UsageError(f"{folds} folds of {n_groups} questions are not possible")
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


def top_heads(accuracy: Array, k: int) -> list[tuple[int, int]]:
    """The k heads (layer, head) of highest accuracy, best first; ties by layer and head."""
    if not 1 <= k <= accuracy.size:
        raise RangeError(f"{k} heads are asked for; the model has {accuracy.size}")
    order = np.argsort(-accuracy.ravel(), kind="stable")[:k]
    return [(int(i) // accuracy.shape[1], int(i) % accuracy.shape[1]) for i in order]


def directions(data: HeadData, heads: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Array]:
    """σθ of each head, (head_dim,): centre-of-mass direction at length 1, times the standard
    deviation of all activations along it."""
    out = {}
    for layer, head in heads:
        x = data.x[:, layer, head]
        theta = x[data.label].mean(0) - x[~data.label].mean(0)
        theta = theta / (np.linalg.norm(theta) or 1)
        out[layer, head] = ((x @ theta).std() * theta).astype(np.float32)
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
    data = collect(model, questions, bos=bos, progress=progress)
    accuracy = probe_accuracy(data, rng, folds=folds)
    heads = top_heads(accuracy, k)
    by_layer: dict[int, Array] = {}
    for (layer, head), v in directions(data, heads).items():
        row = by_layer.setdefault(layer, np.zeros((model.n_head, model.head_dim), np.float32))
        row[head] = v
    facts = file_metadata(
        model,
        method="iti",
        n_questions=str(len(questions)),
        heads=[f"{a}.{b}" for a, b in heads],
        bos=model.wants_bos(bos),
    )
    vector = Vector({i: v.ravel() for i, v in by_layer.items()}, "head_out", facts)
    return vector, accuracy


# -- evaluation -----------------------------------------------------------------------


def generation_edits(vector: Vector, alpha: float) -> list[Edit]:
    """At the last token of the prompt, and at each generated one."""
    return vector.edits(coeff=alpha, tokens=-1, generated=True) if alpha else []


def answer_edits(vector: Vector, alpha: float, n_question: int) -> list[Edit]:
    """At each token that predicts a token of the answer, the last of the question included."""
    return vector.edits(coeff=alpha, tokens=slice(n_question - 1, None)) if alpha else []


@dataclass(frozen=True, eq=False)
class Scores:
    """Multiple choice as in TruthfulQA, by question.

    Attributes:
        mc1: (n_questions,) 1 where the likeliest answer is the first right one.
        mc2: (n_questions,) share of the right answers in the probability of all.
    """

    mc1: Array
    mc2: Array


def multiple_choice(
    model: Model,
    questions: Sequence[Question],
    edits_of: list[tuple[Vector, float]] | None = None,
    *,
    per_token: bool = False,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Scores answers by their summed log-probability, plain or with (vector, α).

    Args:
        per_token: by the mean instead of the sum, for answers of unequal length.
    """
    requests, sizes = [], []
    for q in questions:
        begun = question_tokens(model, q.question, bos=bos)
        n = len(begun)
        changes = [e for v, a in edits_of or [] for e in answer_edits(v, a, n)]
        for answer in (*q.correct, *q.incorrect):
            tokens = begun + caa.answer_tokens(model, begun, answer)
            metric = TokenLoss(np.asarray(tokens[n:]))
            at = slice(n - 1, len(tokens) - 1)
            requests.append(Request(tokens, changes, logits=at, metric=metric))
        sizes.append((len(q.correct), len(q.incorrect)))
    values = [
        -(r.value.mean() if per_token else r.value.sum())
        for r in model.run(requests, progress=progress)
    ]
    mc1, mc2, start = [], [], 0
    for n_right, n_wrong in sizes:
        s = np.asarray(values[start : start + n_right + n_wrong], np.float64)
        start += n_right + n_wrong
        p = np.exp(s - s.max())
        mc1.append(float(s[0] > s[n_right:].max()))
        mc2.append(float(p[:n_right].sum() / p.sum()))
    return Scores(np.asarray(mc1, np.float32), np.asarray(mc2, np.float32))
