"""Soft vectors: blended runs against the oracle, training, files, and the reports."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from letters import BEFORE, FORMAT, SETUP, TASK, probability
from reference import TOLERANCE
from tiny import Tiny

from mia import vectors
from mia.edits import Edit
from mia.errors import FileError, RangeError, UsageError
from mia.methods import soft_vectors as sv, task_vectors as tv
from mia.methods.icl import IclExperiment, IclPrompt, TaskSetup
from mia.notices import MiaWarning
from mia.sites import Site


def test_blended_runs_agree_with_the_oracle(case: Tiny) -> None:
    m = case.model
    ex = IclExperiment(m, TASK, TaskSetup(format=FORMAT, shots=2))
    rng = np.random.default_rng(6)
    means = rng.standard_normal((m.n_layer, m.n_head, m.head_dim)).astype(np.float32)
    weights = rng.random((m.n_layer, m.n_head))
    weights[1] = 0  # a layer that is left alone
    prompts = ex.zero_shot(ex.test[:3])
    edits = sv.blend_edits(means, weights)
    assert [e.site for e in edits] == [Site("head_out", i) for i in range(m.n_layer) if i != 1]
    logprobs = ex.scores(prompts, [edits]).logprob[0]

    def blend(layer: int) -> Any:
        w = weights[layer].repeat(m.head_dim)

        def apply(x: np.ndarray) -> np.ndarray:
            x[-1] = x[-1] * (1 - w) + means[layer].ravel() * w
            return x

        return apply

    for p, logprob in zip(prompts, logprobs, strict=True):
        changes = {f"head_out.{i}": blend(i) for i in range(m.n_layer)}
        truth = case.oracle.run(p.tokens, changes)["logits"][-1]
        assert np.exp(logprob) == pytest.approx(probability(truth, p.answers), abs=TOLERANCE)


def test_training_keeps_within_its_evaluations_and_repeats_itself(ex: IclExperiment) -> None:
    how = sv.SoftVectorTraining(
        evaluations=90, population=8, batch=4, every=2, prompts=4, patience=50
    )
    done, again = sv.train(ex, how), sv.train(ex, how)
    assert done.evaluations <= 90 and done.curve == again.curve
    np.testing.assert_array_equal(done.soft.weights, again.soft.weights)
    assert done.curve[-1].evaluations == done.evaluations
    assert done.dev == ex.accuracy(ex.zero_shot(ex.dev), done.soft.edits()).value
    assert done.dev >= max(s.dev for s in done.curve if s.dev is not None)
    with pytest.raises(UsageError, match="unknown optimiser 'sgd'; known: reinforce, es, cma"):
        sv.SoftVectorTraining("sgd")  # type: ignore[arg-type]


def test_training_starts_from_the_best_run_of_layers(
    ex: IclExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = ex.model
    target = np.zeros((m.n_layer, m.n_head))
    target[1:2] = 0.75
    asked: list[int] = []

    def rewards(_: Any, means: np.ndarray, prompts: Any, candidates: np.ndarray) -> np.ndarray:
        asked.append(len(candidates))
        return -((candidates - target.ravel()) ** 2).sum(1)

    monkeypatch.setattr(sv, "_rewards", rewards)
    means = np.zeros((m.n_layer, m.n_head, m.head_dim), np.float32)
    for most, rounds in ((2000, 4), (30, 2), (9, 1)):
        asked.clear()
        start, spent = sv._best_start(
            ex, means, ex.zero_shot(ex.train), sv.SoftVectorTraining(evaluations=most), ex.rng("x")
        )
        assert spent == sum(asked) <= most and len(asked) == rounds
        if most > 9:
            np.testing.assert_array_equal(start.reshape(target.shape), target)


def test_soft_vectors_survive_a_file(ex: IclExperiment, tmp_path: Path) -> None:
    m = ex.model
    rng = np.random.default_rng(8)
    means = rng.standard_normal((m.n_layer, m.n_head, m.head_dim)).astype(np.float32)
    soft = sv.SoftVector(means, np.round(rng.random((m.n_layer, m.n_head)), 3), {"name": "x"})
    soft.save(tmp_path / "s.safetensors")
    back = sv.load(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(back.means, means)
    np.testing.assert_allclose(back.weights, soft.weights, atol=1e-7)
    assert back.metadata["name"] == "x"
    sv.check(back, m)
    with pytest.raises(UsageError, match="is for 2 layers of"):
        sv.check(sv.SoftVector(means[:2], soft.weights[:2]), m)
    vectors.Vector({0: means[0, 0]}).save(tmp_path / "v.safetensors")
    with pytest.raises(FileError, match=r"is a vector .*; a soft vector is needed"):
        sv.load(tmp_path / "v.safetensors")


def test_sparse_weights_are_the_largest_that_are_enough(
    ex: IclExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.linspace(0.1, 0.9, ex.model.n_layer * ex.model.n_head)
    means = np.zeros((ex.model.n_layer, ex.model.n_head, ex.model.head_dim), np.float32)
    soft = sv.SoftVector(means, weights.reshape(means.shape[:2]))

    def scores(prompts: list[IclPrompt], variants: list[list[Edit]]) -> Any:
        """Right as soon as three heads are blended."""
        active = [sum(int((np.asarray(e.coeff) > 0).sum()) for e in v) for v in variants]
        correct = np.repeat([[n >= 3] for n in active], len(prompts), 1)
        return type("Scores", (), {"correct": correct})

    monkeypatch.setattr(ex, "scores", scores)
    sparse = sv.sparsify(ex, soft)
    assert sparse.n_active == 3
    np.testing.assert_array_equal(sparse.weights.ravel()[-3:], weights[-3:])
    with pytest.raises(RangeError, match=r"keep 1\.5 is not in"):
        sv.sparsify(ex, soft, keep=1.5)


# -- reports -----------------------------------------------------------------------


def test_a_training_reports_its_curve_and_saves_its_vector(
    ex: IclExperiment, tmp_path: Path
) -> None:
    file = tmp_path / "s.safetensors"
    how = sv.SoftVectorTraining(evaluations=90, population=8, batch=4, every=2, prompts=4)
    report = sv.train(ex, how, file=file)
    saved = sv.load(file)
    np.testing.assert_array_equal(saved.means, report.soft.means)
    assert saved.metadata["evaluations"] == str(report.evaluations)
    document = report.document()
    assert (document["task"], document["file"]) == ("next", str(file))
    assert document["training"]["population"] == 8
    assert document["n_active"] == report.soft.n_active
    assert np.shape(document["weights"]) == (3, 6)
    assert [p["evaluations"] for p in document["curve"]] == [s.evaluations for s in report.curve]
    lines = report.plain().splitlines()
    assert len(lines) == 1 + sum(s.dev is not None for s in report.curve) > 1
    assert lines[-1].startswith(f"next: {report.dev:.2f} on dev after {report.evaluations} ")
    assert lines[-1].endswith(f" heads; {file}")
    assert sv.train(ex, how).plain().splitlines()[-1].endswith(" heads")


def test_a_saved_vector_is_evaluated_beside_what_is_asked_for(
    ex: IclExperiment, tmp_path: Path
) -> None:
    m = ex.model
    file = str(tmp_path / "s.safetensors")
    soft = sv.train(ex, sv.SoftVectorTraining(evaluations=40, prompts=3), file=file).soft
    plain = sv.evaluate_task(m, TASK, file, SETUP)
    assert [v.name for v in plain.vectors] == ["soft vector"] and plain.task_vector is None
    assert plain.vectors[0].scores == sv.evaluate(ex, soft)
    table = sv.evaluate_task(m, TASK, file, SETUP, keep=0.5, compare=True, match="exact")
    sparse = sv.sparsify(ex, soft, keep=0.5)
    assert table.vectors[1].soft.n_active == sparse.n_active
    assert table.task_vector == tv.evaluate(ex, tv.train(ex), match="exact").vector
    document = table.document()
    assert [r["name"] for r in document["rows"]] == ["soft vector", "sparse"]
    assert (document["file"], document["match"], document["task"]) == (file, "exact", "next")
    lines = [line.split("  ")[0] for line in table.plain().splitlines()]
    assert lines == [
        "next, n = 6",
        f"soft vector ({soft.n_active} heads)",
        f"sparse ({sparse.n_active} heads)",
        "task vector",
        "in-context",
        "zero-shot",
    ]
    assert [r["prompts"] for r in table.rows()] == lines[1:]
    with pytest.warns(MiaWarning, match="was made for the task next"):
        sv.evaluate_task(m, BEFORE, file, SETUP)


def test_a_soft_vector_of_another_model_is_refused_before_any_run(
    ex: IclExperiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = str(tmp_path / "s.safetensors")
    means = np.zeros((2, 6, ex.model.head_dim), np.float32)
    sv.SoftVector(means, np.zeros((2, 6))).save(file)
    monkeypatch.setattr(sv, "experiment", None)
    with pytest.raises(UsageError, match="is for 2 layers of 6 heads"):
        sv.evaluate_task(ex.model, TASK, file, SETUP)
    with pytest.raises(UsageError, match="is for 2 layers of 6 heads"):
        sv.evaluate(ex, sv.load(file))
