"""Inference-time intervention against the oracle."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference import check
from tiny import Tiny

from mia.datasets.choices import Question, select_questions
from mia.errors import RangeError, UsageError
from mia.methods import iti, iti_evaluation
from mia.methods.iti import HeadData
from mia.notices import MiaWarning
from mia.ranges import Head, top_heads
from mia.request import Capture, Request

QUESTIONS = [
    Question("The cat is red?", ("yes",), ("no and no",)),
    Question("The sky is blue?", ("no", "red"), ("yes",)),
    Question("capital of France?", ("Paris",), ("Rome", "Italy")),
    Question("capital of Italy?", ("Rome",), ("Paris",)),
]


@pytest.fixture
def data(llama: Tiny) -> HeadData:
    return iti.collect(llama.model, QUESTIONS)


def test_every_head_at_the_last_token_of_the_answer(llama: Tiny, data: HeadData) -> None:
    m = llama.model
    assert data.x.shape == (10, m.n_layer, m.n_head, m.head_dim)
    assert data.label.tolist() == [True, False, True, True, False, True, False, False, True, False]
    assert data.group.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    for row, text in ((1, "Q: The cat is red?\nA: no and no"), (3, "Q: The sky is blue?\nA: red")):
        sites = llama.oracle.run(m.tokenize(text))
        for layer in range(m.n_layer):
            want = sites[f"head_out.{layer}"][-1].reshape(m.n_head, m.head_dim)
            np.testing.assert_allclose(data.x[row, layer], want, atol=1e-4)


def test_directions_are_centre_of_mass_times_deviation(data: HeadData) -> None:
    got = iti.directions(data, [Head(1, 2), Head(0, 4)])
    for (layer, head), v in got.items():
        x = data.x[:, layer, head].astype(np.float64)
        theta = x[data.label].mean(0) - x[~data.label].mean(0)
        theta /= np.linalg.norm(theta)
        np.testing.assert_allclose(v, np.std(x @ theta) * theta, atol=1e-5)


def test_probes_find_the_head_that_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    rng = np.random.default_rng(0)
    label = np.tile([True, False], 40)
    x = rng.standard_normal((80, 2, 3, 4)).astype(np.float32)
    x[:, 1, 2, 0] += np.where(label, 4, -4)
    data = HeadData(x, label, np.repeat(np.arange(40), 2))
    accuracy = iti.probe_accuracy(data, np.random.default_rng(1), folds=4)
    assert accuracy.shape == (2, 3)
    assert top_heads(accuracy, 1) == [(1, 2)] and accuracy[1, 2] > 0.95
    assert (np.delete(accuracy.ravel(), 5) < 0.75).all()
    with pytest.raises(UsageError, match="cannot split 40 questions into 41 folds"):
        iti.probe_accuracy(data, rng, folds=41)


def test_folds_keep_a_questions_answers_together() -> None:
    """Answers that repeat within a question would leak, were it split."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((30, 1, 1, 40)), 8, axis=0).astype(np.float32)
    label = np.repeat(rng.permutation(np.arange(30) % 2 == 0), 8)
    data = HeadData(x, label, np.repeat(np.arange(30), 8))
    assert iti.probe_accuracy(data, np.random.default_rng(1), folds=5)[0, 0] < 0.8


def test_the_vector_has_the_chosen_heads_and_no_others(llama: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    m = llama.model
    vector, accuracy = iti.train(m, QUESTIONS, k=4, rng=np.random.default_rng(0))
    heads = top_heads(accuracy, 4)
    want = iti.directions(iti.collect(m, QUESTIONS), heads)
    assert vector.site == "head_out" and vector.layers == sorted({layer for layer, _ in heads})
    for layer in vector.layers:
        rows = vector[layer].reshape(m.n_head, m.head_dim)
        for head in range(m.n_head):
            expect = want.get(Head(layer, head), np.zeros(m.head_dim))
            np.testing.assert_allclose(rows[head], expect, atol=1e-5)
    vector.save(tmp_path / "v.safetensors")


def _vector(t: Tiny):  # type: ignore[no-untyped-def]
    from mia.vectors import Vector

    return Vector({i: t.vector(f"head_out.{i}", seed=i) for i in (0, 1)}, "head_out")


def test_it_is_added_at_the_last_prompt_token_and_each_generated_one(case: Tiny) -> None:
    edits = iti_evaluation.generation_edits(_vector(case), 2.0)
    request = Request(
        case.prompt(), edits, [Capture("head_out", generated=True)], "all", n_predict=5
    )
    got = case.model.run([request])[0]
    check(got, request, case.oracle)

    def add(layer: int):  # type: ignore[no-untyped-def]
        def change(x: np.ndarray) -> np.ndarray:
            x[len(request.tokens) - 1 :] += 2.0 * _vector(case)[layer]
            return x

        return change

    ids = [*request.tokens, *got.tokens[:-1]]
    want = case.oracle.run(ids, {f"head_out.{i}": add(i) for i in (0, 1)})
    np.testing.assert_allclose(got["head_out.1"], want["head_out.1"], atol=1e-4)
    assert iti_evaluation.generation_edits(_vector(case), 0.0) == []


def test_in_multiple_choice_the_scored_tokens_are_steered_too(llama: Tiny) -> None:
    m, v, alpha = llama.model, _vector(llama), 1.5

    def score(q: Question, answer: str, on: bool) -> float:
        begun = iti.question_tokens(m, q.question)
        ids = m.tokenize(f"Q: {q.question}\nA: {answer}")
        assert ids[: len(begun)] == begun

        def add(layer: int):  # type: ignore[no-untyped-def]
            def change(x: np.ndarray) -> np.ndarray:
                x[len(begun) - 1 :] += alpha * v[layer]
                return x

            return change

        edits = {f"head_out.{i}": add(i) for i in v.layers} if on else {}
        x = llama.oracle.run(ids, edits)["logits"]
        x = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return float(sum(x[i - 1, ids[i]] for i in range(len(begun), len(ids))))

    for on in (False, True):
        got = iti_evaluation.multiple_choice(m, QUESTIONS, [(v, alpha)] if on else None)
        for i, q in enumerate(QUESTIONS):
            right = np.array([score(q, a, on) for a in q.correct])
            wrong = np.array([score(q, a, on) for a in q.incorrect])
            assert got.mc1[i] == float(right[0] > wrong.max())
            mass = np.exp(right).sum() / (np.exp(right).sum() + np.exp(wrong).sum())
            assert got.mc2[i] == pytest.approx(mass, abs=1e-4)


# -- experiments ------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        {"question": q.question, "correct_answers": q.correct, "incorrect_answers": q.incorrect}
        for q in QUESTIONS
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "q.jsonl"


def test_what_is_learned_names_its_heads(llama: Tiny, file: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    report = iti.learn(llama.model, select_questions(file), n_heads=3, seed=5)
    vector, accuracy = iti.train(llama.model, QUESTIONS, k=3, rng=np.random.default_rng(5))
    for layer in vector.layers:
        np.testing.assert_array_equal(report.vector[layer], vector[layer])
    heads = top_heads(accuracy, 3)
    document = report.document()
    assert document["heads"] == [{"layer": h.layer, "head": h.head} for h in heads]
    assert report.vector.metadata["heads"] == json.dumps([f"{h.layer}.{h.head}" for h in heads])
    assert report.vector.metadata["items"] == "0..3"
    assert report.plain().splitlines()[1].startswith(f"  {heads[0]}  ")
    with pytest.raises(RangeError, match="n_heads must be 1 to 18, got 99"):
        iti.learn(llama.model, select_questions(file), n_heads=99)


def test_an_evaluation_has_every_alpha_beside_none(llama: Tiny, file: Path) -> None:
    v, data = _vector(llama), select_questions(file, "1..")
    report = iti_evaluation.evaluate(
        llama.model, v, data, alphas=[1.5], n_answers=1, n_predict=3, seed=2
    )
    plain, steered = (
        iti_evaluation.multiple_choice(llama.model, QUESTIONS[1:], [(v, a)]) for a in (0.0, 1.5)
    )
    assert [s.alpha for s in report.scores] == [0, 1.5]
    assert report.scores[1].mc2.value == pytest.approx(steered.mc2.mean(), abs=1e-5)
    change = (steered.mc2 - plain.mc2).mean()
    assert report.scores[1].mc2_change.value == pytest.approx(change, abs=1e-5)
    (answer,) = report.document()["answers"]
    assert answer["question"] == QUESTIONS[1].question and len(answer["answers"]) == 2
    with pytest.raises(UsageError, match="give at least two items"):
        iti_evaluation.evaluate(llama.model, v, select_questions(file, "1"))


def test_questions_that_were_learned_from_are_noticed(llama: Tiny, file: Path) -> None:
    data = select_questions(file)
    learned = _vector(llama).with_metadata(**data.metadata())
    with pytest.warns(MiaWarning, match=r"trained on items 2..3 of this evaluation"):
        iti_evaluation.evaluate(llama.model, learned, select_questions(file, "2.."))
