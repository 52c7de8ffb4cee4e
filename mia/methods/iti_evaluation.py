"""Evaluation of inference-time intervention: Li et al. 2023 (arXiv 2306.03341).

| paper      | here                                                                     |
|------------|--------------------------------------------------------------------------|
| α          | `alphas`, the coefficient of the steering                                |
| MC1, MC2   | `McScores`, multiple choice as in TruthfulQA                             |

The vector is added at the last token of the prompt and at each generated one; in multiple
choice at every token that is scored or decides a score (`answer_edits`), as the authors'
evaluation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.datasets.choices import Question, select_questions
from mia.datasets.selection import Selection
from mia.edits import Edit
from mia.errors import UsageError
from mia.io.provenance import warn_of_same_items
from mia.measure.estimates import Estimate, bootstrap, format_estimate
from mia.measure.losses import TokenLoss
from mia.methods.ab_prompts import answer_tokens
from mia.methods.iti import question_tokens
from mia.progress import Progress, step
from mia.request import Request
from mia.show.report import Report
from mia.vectors import Vector
from mia.vectors.expression import named

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model


def generation_edits(vector: Vector, alpha: float) -> list[Edit]:
    """At the last token of the prompt, and at each generated one."""
    return vector.edits(coeff=alpha, tokens=-1, generated=True) if alpha else []


def answer_edits(vector: Vector, alpha: float, n_question: int) -> list[Edit]:
    """At each token that predicts a token of the answer, the last of the question included."""
    return vector.edits(coeff=alpha, tokens=slice(n_question - 1, None)) if alpha else []


@dataclass(frozen=True, eq=False)
class McScores:
    """Multiple choice as in TruthfulQA, by question.

    Attributes:
        mc1: (n_questions,) 1 if the likeliest answer is the first right one.
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
) -> McScores:
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
            tokens = begun + answer_tokens(model, begun, answer)
            metric = TokenLoss(np.asarray(tokens[n:]))
            predicting = slice(n - 1, len(tokens) - 1)
            requests.append(Request(tokens, changes, logits=predicting, metric=metric))
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
    return McScores(np.asarray(mc1, np.float32), np.asarray(mc2, np.float32))


# -- the experiment ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ItiScore:
    """Multiple choice at one α: means over questions, and the change of MC2 from α = 0."""

    alpha: float
    mc1: Estimate
    mc2: Estimate
    mc2_change: Estimate

    def document(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "mc1": self.mc1.document(),
            "mc2": self.mc2.document(),
            "mc2_change": self.mc2_change.document(),
        }


@dataclass(frozen=True, eq=False)
class ItiEvaluation(Report):
    """Multiple choice (MC1, MC2) with and without intervention, and generated answers.

    Attributes:
        vector, data: what they were asked for as.
        about: how the questions were asked (n_questions, items, bos, per_token, seed).
        answers: of each question the text at each α, if any were generated.
    """

    facts: ModelFacts
    vector: str
    data: str
    about: dict[str, Any]
    scores: list[ItiScore]
    answers: list[dict[str, Any]] | None = None

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "vector": self.vector,
            "data": self.data,
            **self.about,
            "scores": [s.document() for s in self.scores],
            **({} if self.answers is None else {"answers": self.answers}),
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"alpha": s.alpha, "score": name, **getattr(s, name).document()}
            for s in self.scores
            for name in ("mc1", "mc2", "mc2_change")
        ]

    def plain(self) -> str:
        lines = ["alpha  MC1 [95 %]              MC2 [95 %]              change of MC2 [95 %]"]
        for s in self.scores:
            estimates = (s.mc1, s.mc2, s.mc2_change)
            cells = [format_estimate(e.document(), sign="+") for e in estimates]
            lines.append(f"{s.alpha:<6g} {cells[0]}  {cells[1]}  {cells[2]}")
        for answer in self.answers or ():
            lines += ["", answer["question"]]
            lines += [f"  {row['alpha']:<6g} {row['text']}" for row in answer["answers"]]
        return "\n".join(lines)


def evaluate(
    model: Model,
    vector: Vector | str,
    data: Selection[Question] | str | Path,
    *,
    alphas: Sequence[float] = (15.0,),
    per_token: bool = False,
    n_answers: int = 0,
    n_predict: int = 32,
    bos: bool | None = None,
    seed: int = 0,
) -> ItiEvaluation:
    """Multiple choice with a vector at each α, and without it.

    Args:
        vector: a vector, a file, or arithmetic. Notices say if it was made with another model,
            or from the same items.
        data: a shipped set by name, a file, or some of its questions:
            `mia.datasets.choices.select_questions("agree_vs_accurate", "40..")`.
        per_token: score answers by their mean log-probability instead of the sum.
        n_answers: also generate answers to this many questions, of `n_predict` tokens.
        seed: of the intervals, by bootstrap over questions.

    Raises:
        UsageError: fewer than two questions, or a vector that is not at head_out or does not fit.
    """
    data = data if isinstance(data, Selection) else select_questions(data)
    if len(data.items) < 2:
        raise UsageError("one question has no interval; give at least two items")
    v, name = named(vector, model.facts)
    if v.site != "head_out":
        raise UsageError(f"{name} is a vector at {v.site}; ITI needs one at head_out")
    model.check_vector(v, name)
    warn_of_same_items(v.sources, name, data.paths[0], data.indices)
    alphas = [0.0, *(float(a) for a in alphas if a)]
    by_alpha = []
    for a in alphas:
        with step(f"alpha {a:g}") as bar:
            by_alpha.append(
                multiple_choice(
                    model, data.items, [(v, a)], per_token=per_token, bos=bos, progress=bar
                )
            )
    rng = np.random.default_rng(seed)
    scores = [
        ItiScore(
            a, bootstrap(s.mc1, rng), bootstrap(s.mc2, rng), bootstrap(s.mc2 - by_alpha[0].mc2, rng)
        )
        for a, s in zip(alphas, by_alpha, strict=True)
    ]
    about = {
        "n_questions": len(data.items),
        "items": data.range,
        "bos": model.wants_bos(bos),
        "per_token": per_token,
        "seed": seed,
    }
    asked = data.items[:n_answers]
    answers = _generated(model, v, asked, alphas, n_predict, bos) if n_answers else None
    return ItiEvaluation(model.facts, name, data.name, about, scores, answers)


def _generated(
    model: Model,
    vector: Vector,
    questions: Sequence[Question],
    alphas: Sequence[float],
    n_predict: int,
    bos: bool | None,
) -> list[dict[str, Any]]:
    """Answers to each question at each α, as a document has them."""
    requests = [
        Request(
            question_tokens(model, q.question, bos=bos),
            generation_edits(vector, a),
            logits=None,
            n_predict=n_predict,
        )
        for q in questions
        for a in alphas
    ]
    with step("answering") as bar:
        texts = iter([model.text(r.tokens) for r in model.run(requests, progress=bar)])
    return [
        {"question": q.question, "answers": [{"alpha": a, "text": next(texts)} for a in alphas]}
        for q in questions
    ]
