"""Task vectors: what they are made of, what is counted, and the reports."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from letters import BEFORE, FORMAT, SETUP, TASK
from tiny import Tiny

from mia import vectors
from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.methods import task_vectors as tv
from mia.methods.icl import AnswerScores, IclExperiment, IclPrompt, TaskSetup, experiment
from mia.methods.task_vector_reports import Conflict
from mia.model import Model
from mia.notices import MiaWarning

SMALL = tv.TaskVectorTraining(sets=1, dummies=2)


def test_a_task_vector_is_the_mean_residual_of_right_dummies(ex: IclExperiment) -> None:
    theta = tv.train(ex, tv.TaskVectorTraining(sets=3, dummies=4))
    assert theta.vector.layers == list(range(ex.model.n_layer))
    assert theta.dev.shape == (ex.model.n_layer,) and theta.dev_by_set.shape == (3,)
    assert theta.dev[theta.layer] == theta.dev_by_set.max() or len(theta.sets) > 1
    by_set = tv._thetas(ex, 3, 4)
    used = by_set[list(theta.sets)].mean(0)
    for i in theta.vector.layers:
        np.testing.assert_allclose(theta.vector[i], used[i], rtol=1e-6)
    again = tv.train(ex, tv.TaskVectorTraining(sets=3, dummies=4))
    np.testing.assert_array_equal(again.vector[theta.layer], theta.vector[theta.layer])
    with pytest.raises(RangeError, match="layer 3 is out of range"):
        tv.train(ex, tv.TaskVectorTraining(layers=[3]))
    with pytest.raises(RangeError, match="must be at least 1, got 0 and 8"):
        tv.TaskVectorTraining(sets=0)


def test_only_right_dummies_count(ex: IclExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 1, 2)
    right = np.array([False, True, True, False, False, False])
    monkeypatch.setattr(ex, "rows", lambda *_: (rows, right))
    np.testing.assert_array_equal(tv._thetas(ex, 2, 3)[:, 0], [[3, 4], [8, 9]])


def test_evaluation_counts_what_the_runs_say(ex: IclExperiment) -> None:
    theta = tv.train(ex, tv.TaskVectorTraining(sets=2, dummies=3))
    e = tv.evaluate(ex, theta, by_layer=True)
    zero = ex.zero_shot(ex.test)
    assert e.zero_shot == ex.accuracy(zero)
    assert e.vector == e.by_layer[theta.layer] == ex.accuracy(zero, theta.edits())
    assert e.icl == ex.accuracy(ex.few_shot(ex.test))
    exact = tv.evaluate(ex, theta, match="exact")
    assert exact.vector.correct <= e.vector.correct


def test_conflict_asks_what_both_tasks_know(ex: IclExperiment) -> None:
    source = IclExperiment(ex.model, BEFORE, TaskSetup(format=FORMAT, shots=2))
    theta = tv.train(source, SMALL)
    with_vector, without = tv.put_into(ex, theta, source)
    used = {p.input for p in (*source.train, *source.dev)}
    asked = [q for q in (*ex.test, *ex.dev) if q.input not in used]
    assert with_vector.examples.n == with_vector.vector.n == len(asked) > 2
    assert without.examples == ex.accuracy(ex.few_shot(asked, what="conflict"))
    with pytest.raises(UsageError, match="next and next have no inputs in common"):
        tv.put_into(ex, theta, ex)  # the same answers


def test_pooled_test_parts_count_a_query_once(ex: IclExperiment) -> None:
    theta = tv.train(ex, SMALL)
    one = tv.evaluate(ex, theta, by_layer=True)
    both = tv.pool([one, one])
    assert (both.icl.n, both.icl.distinct) == (12, 6)
    assert both.vector.correct == 2 * one.vector.correct and both.icl.interval == one.icl.interval
    assert both.by_layer[0].document()["distinct"] == 6
    other = replace(one, asked=frozenset("uvwxyz"))
    assert one.asked.isdisjoint("xy") or (tv.pool([one, other]).icl.distinct or 12) < 12


def test_conflict_counts_answers_of_both_tasks(
    ex: IclExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = IclExperiment(ex.model, BEFORE, TaskSetup(format=FORMAT, shots=2))
    theta = tv.train(source, SMALL)
    answers = {p.input: p for p in BEFORE.pairs}

    def scores(prompts: list[IclPrompt], variants: list[list[Edit]]) -> AnswerScores:
        """Without the vector the answer of the examples is right, with it that of the vector."""
        assert variants[0] == [] and len(variants) == 2
        of_vector = np.array([p.query == answers[p.query.input] for p in prompts])
        assert all(p.answers == ex.answers(p.query) for p in prompts)
        return AnswerScores(np.array([~of_vector, of_vector]), np.zeros((2, len(prompts))))

    monkeypatch.setattr(ex, "scores", scores)
    with_vector, without = tv.put_into(ex, theta, source)
    assert (with_vector.examples.value, with_vector.vector.value) == (0, 1)
    assert (without.examples.value, without.vector.value) == (1, 0)
    report = Conflict(ex.model.facts, ex.facts, "before", 1, with_vector, without)
    document = report.document()
    assert document["with_vector"] == with_vector.document()
    assert document["without"] == without.document()
    cells = [line.split("  ")[-1] for line in report.plain().splitlines()[1:]]
    assert cells == [str(with_vector.examples), str(with_vector.vector)]
    assert [r["with_vector"] for r in report.rows()] == [0, 1]


# -- several tasks -----------------------------------------------------------------


def test_training_saves_a_file_for_each_task(llama: Tiny, tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.safetensors") for name in ("next", "before")]
    report = tv.train_many(llama.model, [TASK, BEFORE], SETUP, SMALL, files=files)
    rows = report.document()["vectors"]
    assert [(r["task"], r["file"], r["sets"]) for r in rows] == [
        ("next", files[0], [0]),
        ("before", files[1], [0]),
    ]
    for file, theta, row in zip(files, report.vectors, rows, strict=True):
        saved = vectors.load(file)
        assert saved.metadata["layer"] == str(theta.layer) == str(row["layer"])
        np.testing.assert_array_equal(saved[theta.layer], theta.vector[theta.layer])
        assert row["dev"][str(theta.layer)] == round(float(theta.dev[theta.layer]), 4)
    first, second = report.plain().splitlines()
    assert first.startswith("next: layer ") and first.endswith(f"on dev; {files[0]}")
    unsaved = tv.train_many(llama.model, [BEFORE], SETUP, SMALL)
    assert unsaved.plain() == second.removesuffix(f"; {files[1]}")


def test_a_table_is_its_evaluations_and_their_means(llama: Tiny) -> None:
    table = tv.evaluate_tasks(llama.model, [TASK, BEFORE], SETUP, SMALL, by_layer=True)
    scores = []
    for task, row in zip((TASK, BEFORE), table.tasks, strict=True):
        ex = experiment(llama.model, task, SETUP)
        scores.append(tv.evaluate(ex, tv.train(ex, SMALL), by_layer=True))
        assert row.scores == scores[-1] and row.task == ex.facts
    document = table.document()
    assert document["mean"]["icl"] == pytest.approx(
        (scores[0].icl.value + scores[1].icl.value) / 2, abs=1e-4
    )
    assert document["rows"][0]["vector"] == scores[0].vector.document()
    assert list(document["rows"][0]["by_layer"]) == ["0", "1", "2"]
    assert (document["rows"][0]["repeats"], document["match"]) == (1, "first")
    records = table.rows()
    assert [r["task"] for r in records] == ["next", "before"]
    assert records[1]["vector_low"] == scores[1].vector.interval[0]
    lines = table.plain().splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["task", "next", "before", "mean"]
    assert lines[5].split() == ["layer", "next", "before"] and len(lines) == 9


def test_repeats_pool_splits_of_following_seeds(llama: Tiny) -> None:
    setup = replace(SETUP, seed=5)
    (row,) = tv.evaluate_tasks(llama.model, [TASK], setup, SMALL, repeats=2).tasks
    exs = [experiment(llama.model, TASK, replace(setup, seed=s)) for s in (5, 6)]
    parts = [tv.evaluate(e, tv.train(e, SMALL)) for e in exs]
    assert row.scores == tv.pool(parts) and row.task["seed"] == 5
    assert list(row.layers) == [p.layer for p in parts]
    with pytest.raises(UsageError, match="repeats train a vector for each split"):
        tv.evaluate_tasks(llama.model, [TASK], SETUP, tv.SavedTaskVector("x"), repeats=2)


def test_a_saved_vector_is_tried_where_its_file_says_or_elsewhere(
    llama: Tiny, tmp_path: Path
) -> None:
    pattern = str(tmp_path / "{name}.safetensors")
    files = [str(tmp_path / "next.safetensors")]
    trained = tv.train_many(llama.model, [TASK], SETUP, SMALL, files=files).vectors[0]
    ex = experiment(llama.model, TASK, SETUP)
    for layer in (None, (trained.layer + 1) % 3):
        saved = tv.SavedTaskVector(pattern, layer)
        (row,) = tv.evaluate_tasks(llama.model, [TASK], SETUP, saved).tasks
        put = replace(trained, layer=trained.layer if layer is None else layer)
        assert row.scores == tv.evaluate(ex, put) and row.layers == [put.layer]
    with pytest.warns(MiaWarning, match="was made with another seed"):
        tv.evaluate_tasks(llama.model, [TASK], replace(SETUP, seed=1), saved)


def test_a_conflict_trains_the_other_tasks_vector(llama: Tiny) -> None:
    report = tv.conflict(llama.model, TASK, BEFORE, SETUP, SMALL)
    ex, source = (experiment(llama.model, t, SETUP) for t in (TASK, BEFORE))
    theta = tv.train(source, SMALL)
    with_vector, without = tv.put_into(ex, theta, source)
    document = report.document()
    assert (document["task"], document["examples"], document["vector"]) == (
        "next",
        "next",
        "before",
    )
    assert document["layer"] == theta.layer
    assert document["with_vector"]["vector"] == with_vector.vector.document()
    assert document["without"]["examples"] == without.examples.document()
    lines = report.plain().splitlines()
    assert lines[0].endswith("examples alone  with the vector of before") and len(lines) == 3
    assert [(r["task"], r["of"]) for r in report.rows()] == [
        ("next", "examples"),
        ("before", "vector"),
    ]


@pytest.mark.slow
def test_a_vector_does_on_smollm2_what_examples_do(smollm2: Model) -> None:
    ex = experiment(smollm2, "present_past", TaskSetup(n_test=24, n_dev=12))
    how = tv.TaskVectorTraining(sets=2, dummies=4, layers=range(16, 24))
    scores = tv.evaluate(ex, tv.train(ex, how))
    assert scores.zero_shot.value <= 0.25 and scores.vector.value >= 0.6


def test_one_task_by_itself_is_a_list_of_one(llama: Tiny, tmp_path: Path) -> None:
    file = str(tmp_path / "next.safetensors")
    alone = tv.train_many(llama.model, TASK, SETUP, SMALL, files=file)
    assert (
        alone.document()
        == tv.train_many(llama.model, [TASK], SETUP, SMALL, files=[file]).document()
    )
    table = tv.evaluate_tasks(llama.model, TASK, SETUP, SMALL)
    assert [r["task"] for r in table.rows()] == ["next"]
    with pytest.raises(RangeError, match="layer 3 is out of range"):
        tv.train_many(llama.model, TASK, SETUP, tv.TaskVectorTraining(layers=[3]))


@pytest.mark.parametrize("files", [["a.safetensors"], ["a.safetensors"] * 2, "a.safetensors"])
def test_each_task_needs_a_file_of_its_own(llama: Tiny, files: str | list[str]) -> None:
    with pytest.raises(UsageError, match="2 tasks need 2 files"):
        tv.train_many(llama.model, [TASK, BEFORE], SETUP, SMALL, files=files)
