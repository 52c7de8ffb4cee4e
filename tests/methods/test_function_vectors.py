"""Function vectors: heads through W_O, choices on dev, decoding, and the reports."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from letters import BEFORE, FORMAT, SETUP, TASK
from reference import TOLERANCE
from tiny import Tiny

from mia import vectors
from mia.errors import RangeError, UsageError
from mia.methods import function_vectors as fv
from mia.methods.icl import IclExperiment, TaskSetup, experiment
from mia.model import Model
from mia.notices import MiaWarning
from mia.ranges import Head, top_heads

SMALL = fv.FunctionVectorTraining(prompts=3, effect_prompts=2, n_heads=[3])


def test_all_heads_through_w_o_are_what_attention_adds(llama: Tiny) -> None:
    m = llama.model
    ex = IclExperiment(m, TASK, TaskSetup(format=FORMAT, shots=2))
    prompts = ex.dummies(4)
    means = ex.means("head_out", prompts).reshape(m.n_layer, m.n_head, -1)
    every = [Head(1, h) for h in range(m.n_head)]
    truth = np.mean([llama.oracle.run(p.tokens)["attn_out.1"][-1] for p in prompts], 0)
    np.testing.assert_allclose(fv.head_vector(m, means, every), truth, atol=TOLERANCE)
    parts = [fv.head_vector(m, means, [h]) for h in every]
    np.testing.assert_allclose(np.sum(parts, 0), truth, atol=TOLERANCE)


def test_extraction_is_its_steps(ex: IclExperiment) -> None:
    how = fv.FunctionVectorTraining(prompts=4, effect_prompts=2, n_heads=[2, 3])
    vector = fv.train(ex, how)
    statistics = fv.head_statistics(ex, prompts=4, effect_prompts=2)
    np.testing.assert_array_equal(vector.effects, statistics.effects)
    assert vector.heads == top_heads(vector.effects, len(vector.heads))
    assert len(vector.heads) in (2, 3)
    v = fv.head_vector(ex.model, statistics.means, vector.heads)
    np.testing.assert_array_equal(vector.vector, v)
    zero = ex.zero_shot(ex.dev)
    assert vector.dev[vector.layer] == ex.accuracy(zero, vector.edits()).value == vector.dev.max()
    e = fv.evaluate(ex, vector, by_layer=True)
    assert e.by_layer[vector.layer] == (e.zero_shot_vector, e.wrong_vector)
    assert e.wrong == ex.accuracy(ex.few_shot(ex.test, wrong=True))


def test_decoding_with_and_without_the_final_norm(llama: Tiny) -> None:
    v = llama.vector()
    table = llama.oracle.weights["output.weight"]
    decoded = fv.decode(llama.model, v, 5)
    raw = np.argsort(-(table @ v))[:5].tolist()
    weighted = np.argsort(-(table @ (v * llama.oracle.weights["output_norm.weight"])))[:5].tolist()
    assert [t["id"] for t in decoded["raw"]] == raw != weighted
    assert [t["id"] for t in decoded["norm"]] == weighted


def test_only_the_layers_and_coefficients_asked_for_are_tried(ex: IclExperiment) -> None:
    statistics = fv.head_statistics(ex, prompts=3, effect_prompts=1)
    how = replace(SMALL, layers=[0, 2], coeffs=[0.5, 3.0])
    vector = fv.choose(ex, statistics, how)
    assert vector.layer in (0, 2) and vector.coeff in (0.5, 3.0)
    assert np.isnan(vector.dev).tolist() == [False, True, False]
    assert vector.edits()[0].coeff == vector.coeff
    with pytest.raises(RangeError, match="layer 3 is out of range"):
        fv.choose(ex, statistics, replace(SMALL, layers=[3]))
    with pytest.raises(RangeError, match="must be at least 1, got 0 and 2"):
        replace(SMALL, prompts=0)


# -- several tasks -----------------------------------------------------------------


def test_tasks_trained_together_share_their_heads(llama: Tiny, tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.safetensors") for name in ("next", "before")]
    report = fv.train_many(llama.model, [TASK, BEFORE], SETUP, SMALL, top_k=4, files=files)
    exs = [experiment(llama.model, t, SETUP) for t in (TASK, BEFORE)]
    statistics = [fv.head_statistics(e, prompts=3, effect_prompts=2) for e in exs]
    mean = np.mean([s.effects for s in statistics], 0)
    np.testing.assert_array_equal(report.effects, mean)
    for vector, s, file in zip(report.vectors, statistics, files, strict=True):
        assert vector.heads == top_heads(mean, 3)
        np.testing.assert_array_equal(
            vector.vector, fv.head_vector(llama.model, s.means, vector.heads)
        )
        saved = vectors.load(file)
        assert saved.layers == [vector.layer]
        assert saved.metadata["heads"] == ", ".join(f"{i}.{h}" for i, h in vector.heads)
    document = report.document()
    row = document["vectors"][1]
    assert (row["task"], row["file"], row["coeff"]) == ("before", files[1], 1.0)
    assert row["heads"][0].keys() == {"layer", "head", "effect"} and len(row["heads"]) == 3
    assert np.shape(document["effects"]) == (3, 6) and len(row["decoded"]["raw"]) == 4
    lines = report.plain().splitlines()
    assert len(lines) == 8 and lines[0].endswith(f"on dev; {files[0]}")
    assert lines[1].startswith("  heads: ") and lines[3].startswith("  decoded, with final norm: ")


def test_ten_shots_unless_the_setup_says(llama: Tiny) -> None:
    setup = replace(SETUP, shots=None)
    (task,) = fv.train_many(llama.model, [TASK], setup, SMALL).tasks
    assert task["shots"] == 10


def test_a_table_is_its_evaluations_and_their_means(llama: Tiny) -> None:
    table = fv.evaluate_tasks(llama.model, [TASK, BEFORE], SETUP, SMALL, by_layer=True)
    scores = []
    for task, row in zip((TASK, BEFORE), table.tasks, strict=True):
        ex = experiment(llama.model, task, SETUP)
        vector = fv.train(ex, SMALL)
        scores.append(fv.evaluate(ex, vector, by_layer=True))
        assert (row.scores, row.layer, row.coeff) == (scores[-1], vector.layer, 1.0)
    document = table.document()
    wrong = sum(s.wrong_vector.value for s in scores) / 2
    assert document["mean"]["wrong_vector"] == pytest.approx(wrong, abs=1e-4)
    assert "vector_given_icl" not in document["mean"]
    by_layer = document["rows"][0]["by_layer"]
    assert by_layer["2"]["wrong_vector"] == scores[0].by_layer[2][1].document()
    assert [r["icl"] for r in table.rows()] == [s.icl.value for s in scores]
    lines = table.plain().splitlines()
    assert "where ICL is right" in lines[0] and lines[3].startswith("mean ")
    assert "next, shuffled" in lines[5] and len(lines) == 9


def test_a_saved_vector_is_added_as_its_file_says_or_otherwise(llama: Tiny, tmp_path: Path) -> None:
    file = str(tmp_path / "v.safetensors")
    how = replace(SMALL, coeffs=[2.0])
    trained = fv.train_many(llama.model, [TASK], SETUP, how, files=[file]).vectors[0]
    ex = experiment(llama.model, TASK, SETUP)
    for layer, coeff in ((None, None), (0, -1.0)):
        saved = fv.SavedFunctionVector(file, layer, coeff)
        (row,) = fv.evaluate_tasks(llama.model, [TASK], SETUP, saved).tasks
        put = trained if layer is None else replace(trained, layer=0, coeff=-1.0)
        assert (row.layer, row.coeff, row.scores) == (put.layer, put.coeff, fv.evaluate(ex, put))
    with pytest.warns(MiaWarning, match="was made for the task next"):
        fv.evaluate_tasks(llama.model, [BEFORE], SETUP, saved)
    rows = np.ones((2, llama.model.n_embd), np.float32)
    vectors.Vector(dict(enumerate(rows))).save(file)
    with pytest.raises(UsageError, match="has 2 layers; a function vector has one"):
        fv.evaluate_tasks(llama.model, [TASK], SETUP, saved)


@pytest.mark.slow
def test_a_vector_helps_on_smollm2(smollm2: Model) -> None:
    ex = experiment(smollm2, "present_past", TaskSetup(n_test=16, n_dev=8))
    how = fv.FunctionVectorTraining(prompts=5, effect_prompts=1, n_heads=[40], layers=range(8, 20))
    scores = fv.evaluate(ex, fv.train(ex, how))
    assert scores.zero_shot_vector.value > scores.zero_shot.value


@pytest.mark.parametrize("files", [["a.safetensors"], ["a.safetensors"] * 2, "a.safetensors"])
def test_each_task_needs_a_file_of_its_own(llama: Tiny, files: str | list[str]) -> None:
    with pytest.raises(UsageError, match="2 tasks need 2 files"):
        fv.train_many(llama.model, [TASK, BEFORE], SETUP, SMALL, files=files)
