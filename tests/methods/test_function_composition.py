"""Algebra of function vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
from letters import NEXT, SETUP
from tiny import Tiny

from mia.datasets.tasks import Composition
from mia.errors import RangeError
from mia.methods import function_composition as fc, function_vectors as fv
from mia.methods.icl import IclExperiment, experiment
from mia.ranges import top_heads


def test_a_vector_composed_of_one_task_is_that_task(ex: IclExperiment) -> None:
    statistics = fv.head_statistics(ex, prompts=3, effect_prompts=2)
    result = fc.compose(ex, [statistics] * 4, n_heads=3)
    np.testing.assert_allclose(result.composed.vector, result.direct.vector, atol=1e-5)
    assert result.cosine == pytest.approx(1)
    assert result.composed_scores == result.direct_scores


def test_a_composed_vector_is_the_sum_of_its_parts(ex: IclExperiment) -> None:
    rng = np.random.default_rng(3)
    m = ex.model
    statistics = [
        fv.HeadStatistics(
            rng.standard_normal((m.n_layer, m.n_head, m.head_dim)).astype(np.float32),
            rng.standard_normal((m.n_layer, m.n_head)),
        )
        for _ in range(4)
    ]
    result = fc.compose(ex, statistics, n_heads=2)
    heads = top_heads(np.mean([s.effects for s in statistics], 0), 2)
    ac, bc, bd, ad = (fv.head_vector(m, s.means, heads) for s in statistics)
    np.testing.assert_allclose(result.composed.vector, ac + bd - bc, atol=1e-6)
    np.testing.assert_array_equal(result.direct.vector, ad)
    assert result.composed_scores == fv.evaluate(ex, result.composed)
    assert result.composed.dev[result.composed.layer] == result.composed.dev.max()


def test_heads_of_a_task_are_measured_once(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = str(tmp_path / "next.json"), str(tmp_path / "before.json")
    Path(a).write_text(json.dumps(NEXT))
    Path(b).write_text(json.dumps({y: x for x, y in NEXT.items()}))
    measured = []
    plain = fv.head_statistics

    def counted(ex: IclExperiment, **how: int) -> fv.HeadStatistics:
        measured.append(ex.task.name)
        return plain(ex, **how)

    monkeypatch.setattr(fc, "head_statistics", counted)
    compositions = [Composition("one", a, b, b, a), Composition("two", b, a, a, b)]
    table = fc.compose_tasks(
        llama.model, compositions, SETUP, n_heads=3, prompts=3, effect_prompts=2, top_k=2
    )
    assert measured == ["next", "before"]
    document = table.document()
    first, second = document["rows"]
    assert (first["composition"], first["task"], second["task"]) == ("one", "next", "before")
    statistics = plain(experiment(llama.model, a, SETUP), prompts=3, effect_prompts=2)
    assert first["direct"] == first["composed"]  # v(a) + v(b) - v(b)
    assert first["layers"]["direct"] == first["layers"]["composed"]
    assert first["cosine"] == 1 and len(first["decoded"]["composed"]["norm"]) == 2
    assert np.isfinite(statistics.effects).all()
    assert table.plain().splitlines()[2].split()[:2] == ["two", "before"]
    assert [r["composition"] for r in table.rows()] == ["one", "two"]
    with pytest.raises(RangeError, match="n_heads must be 1 to 18, got 99"):
        fc.compose_tasks(llama.model, compositions, SETUP, n_heads=99)
