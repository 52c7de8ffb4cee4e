"""Inference-time intervention against the oracle."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference import check
from tiny import Tiny

from mia.errors import MiaError, RangeError, UsageError
from mia.methods import iti
from mia.methods.iti import HeadData, Question
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
    got = iti.directions(data, [(1, 2), (0, 4)])
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
    assert iti.top_heads(accuracy, 1) == [(1, 2)] and accuracy[1, 2] > 0.95
    assert (np.delete(accuracy.ravel(), 5) < 0.75).all()
    with pytest.raises(UsageError, match="41 folds of 40 questions"):
        iti.probe_accuracy(data, rng, folds=41)


def test_folds_keep_a_questions_answers_together() -> None:
    """Answers that repeat within a question would leak, were it split."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((30, 1, 1, 40)), 8, axis=0).astype(np.float32)
    label = np.repeat(rng.permutation(np.arange(30) % 2 == 0), 8)
    data = HeadData(x, label, np.repeat(np.arange(30), 8))
    assert iti.probe_accuracy(data, np.random.default_rng(1), folds=5)[0, 0] < 0.8


def test_top_heads() -> None:
    accuracy = np.array([[0.5, 0.9], [0.9, 0.7]], np.float32)
    assert iti.top_heads(accuracy, 3) == [(0, 1), (1, 0), (1, 1)]
    with pytest.raises(RangeError, match="5 heads are asked for; the model has 4"):
        iti.top_heads(accuracy, 5)


def test_the_vector_has_the_chosen_heads_and_no_others(llama: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra probes)")
    m = llama.model
    vector, accuracy = iti.train(m, QUESTIONS, k=4, rng=np.random.default_rng(0))
    heads = iti.top_heads(accuracy, 4)
    want = iti.directions(iti.collect(m, QUESTIONS), heads)
    assert vector.site == "head_out" and vector.layers == sorted({layer for layer, _ in heads})
    for layer in vector.layers:
        rows = vector[layer].reshape(m.n_head, m.head_dim)
        for head in range(m.n_head):
            expect = want.get((layer, head), np.zeros(m.head_dim))
            np.testing.assert_allclose(rows[head], expect, atol=1e-5)
    vector.save(tmp_path / "v.safetensors")


def _vector(t: Tiny):  # type: ignore[no-untyped-def]
    from mia.vectors import Vector

    return Vector({i: t.vector(f"head_out.{i}", seed=i) for i in (0, 1)}, "head_out")


def test_it_is_added_at_the_last_prompt_token_and_each_generated_one(case: Tiny) -> None:
    edits = iti.generation_edits(_vector(case), 2.0)
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
    assert iti.generation_edits(_vector(case), 0.0) == []


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
        got = iti.multiple_choice(m, QUESTIONS, [(v, alpha)] if on else None)
        for i, q in enumerate(QUESTIONS):
            right = np.array([score(q, a, on) for a in q.correct])
            wrong = np.array([score(q, a, on) for a in q.incorrect])
            assert got.mc1[i] == float(right[0] > wrong.max())
            mass = np.exp(right).sum() / (np.exp(right).sum() + np.exp(wrong).sum())
            assert got.mc2[i] == pytest.approx(mass, abs=1e-4)


def test_questions_from_files(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"question": "a?", "correct_answers": ["b"], "incorrect_answers": ["c", "d"]}\n\n'
    )
    assert iti.load_questions(tmp_path / "q.jsonl") == [Question("a?", ("b",), ("c", "d"))]
    shipped = iti.load_questions("agree_vs_accurate")
    assert len(shipped) >= 60
    assert shipped[0].correct[0].startswith("No, it is the earth that turns")
    assert shipped[0].incorrect[0].startswith("Yes, you're right")
    assert "Choices" not in shipped[0].question


def _row(**changes: object) -> str:
    """A line of JSONL, as it should be but for the changes."""
    row = {"question": "a?", "correct_answers": ["b"], "incorrect_answers": ["c"], **changes}
    return json.dumps(row, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ("1", "line 1: there is no text 'question'"),
        (_row(question=3), "line 1: there is no text 'question'"),
        (_row(question=" "), "line 1: there is no text 'question'"),
        (_row(correct_answers="yes"), "line 1: 'correct_answers' is 'yes'; a list of texts"),
        (_row(correct_answers=[]), r"line 1: 'correct_answers' is \[\]; a list of texts"),
        (_row(incorrect_answers=None), "line 1: 'incorrect_answers' is None; a list of texts"),
        (_row() + "\n" + _row(incorrect_answers=["b", " "]), r"line 2: 'incorrect_answers' is"),
        (_row(correct_answers=[1]), r"line 1: 'correct_answers' is \[1\]"),
        (_row(best_answer=["b"]), r"line 1: 'best_answer' is \['b'\]; a text is needed"),
    ],
)
def test_broken_questions_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(MiaError, match=message) as err:
        iti.load_questions(tmp_path / "q.jsonl")
    assert "\n" not in str(err.value)
    with pytest.raises(MiaError, match=r"no file .*gone.jsonl"):
        iti.load_questions(tmp_path / "gone.jsonl")


def test_the_best_answer_comes_first(tmp_path: Path) -> None:
    rows = [
        _row(correct_answers=["b", "c", "d"], best_answer="c"),
        _row(correct_answers=["b"], best_answer="the best"),
        _row(correct_answers=["b"], best_answer=None),
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    found = [q.correct for q in iti.load_questions(tmp_path / "q.jsonl")]
    assert found == [("c", "b", "d"), ("the best", "b"), ("b",)]


def test_marks_of_other_editors_are_read(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\ufeff" + _row(question="a\u2028b?"), encoding="utf-8")
    assert iti.load_questions(tmp_path / "q.jsonl") == [Question("a\u2028b?", ("b",), ("c",))]
