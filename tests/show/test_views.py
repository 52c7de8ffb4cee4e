"""Documents as parts of a page: the numbers of each are where they belong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, run
from one_prompt import PROMPT

from mia.errors import UsageError
from mia.show.page import BarList, Curve, HeatMap, LensGrid, Manifest, Of, Paragraph, Part, Table
from mia.show.views import is_known, result_page, result_parts

TOKENS = [{"index": i, "id": i, "text": t} for i, t in enumerate([" a", "</b>", " c"])]
ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}


def _sweep(**more: Any) -> dict[str, Any]:
    return {
        "change": "zero",
        "site": "resid_post",
        "tokens": TOKENS,
        "answer": [TOKENS[0]],
        "against": [],
        "axes": [
            {"name": "layer", "values": [3, 4], "labels": ["3", "4"]},
            {"name": "token", "values": [0, 2], "labels": [" a", " c"]},
        ],
        "metric": "logprob",
        "unit": "nats",
        "values": [[-1.0, -2.0], [None, -5.0]],
        "low": [[-0.5, -1.5], [None, -4.5]],
        "high": [[0.5, -0.5], [None, -3.5]],
        "unchanged": -1.0,
        "source": None,
        "noise_floor": 0.25,
        "null": 12,
        "runs": 4,
        **more,
    }


def _of(parts: list[Part], kind: type) -> list[Any]:
    return [p for p in parts if isinstance(p, kind)]


def test_a_sweep_over_two_axes_is_a_map_of_effects() -> None:
    parts = result_parts(_sweep())
    (map_,) = _of(parts, HeatMap)
    np.testing.assert_array_equal(map_.values, [[0, -1], [np.nan, -4]])
    np.testing.assert_array_equal(map_.high, [[0.5, -0.5], [np.nan, -3.5]])
    assert map_.columns.full(1) == 'token 2 " c"' and map_.rows.full(1) == "layer 4"
    assert (map_.floor, map_.unit, map_.command) == (0.25, "nats", ())
    (bars,) = _of(parts, BarList)
    assert [(b.label, b.value) for b in bars.bars] == [
        ('layer 4, token 2 " c"', -4),
        ('layer 3, token 2 " c"', -1),
        ('layer 3, token 0 " a"', 0),
    ]
    summary = _of(parts, Paragraph)[1].words
    assert "means over 4 runs" in summary and "1 of 3 cells lie within it" in summary


def test_a_sweep_over_one_axis_is_a_curve() -> None:
    axis = [{"name": "coeff", "values": [0.5, 2.0], "labels": ["0.5", "2.0"]}]
    d = _sweep(axes=axis, values=[1.0, 2.0], low=[1.0, 2.5], high=[3.0, 3.5])
    (curve,) = _of(result_parts(d), Curve)
    assert curve.lines[0].y.tolist() == [2, 3] and curve.lines[0].high.tolist() == [3, 3.5]
    assert list(curve.x.values) == [0.5, 2.0] and not curve.x.labels and curve.floor == 0.25


def test_a_sweep_over_three_axes_is_several_maps_of_one_scale() -> None:
    axes = [{"name": n, "values": [0, 1], "labels": ["0", "1"]} for n in ("site", "layer", "head")]
    values = np.arange(8.0).reshape(2, 2, 2)
    maps = _of(
        result_parts(_sweep(axes=axes, values=values.tolist(), low=None, high=None)), HeatMap
    )
    assert [m.title for m in maps] == ["change of logprob, site 0", "change of logprob, site 1"]
    np.testing.assert_array_equal(maps[1].values, values[1] + 1)
    assert [m.top for m in maps] == [8, 8]


def test_other_known_documents_have_their_views() -> None:
    top = [{"layer": 1, "head": 0, "value": -2.0}]
    kinds: dict[str, Mapping[str, Any]] = {
        "HeatMap": {"drop": [[1.0], [None]], "logprob": -1.0, "ablated_at": "all", "answer": TOKENS,
                    "top": top},
        "Curve": {"sweep": {"on": {"ratio": [ESTIMATE]}}, "layers": [3]},
        "Table": {"perplexity": 3.0, "n_scored": 4},
    }  # fmt: skip
    for kind, d in kinds.items():
        assert kind in [type(p).__name__ for p in result_parts(d)], kind
    steered = {"steered": [{"coeff": 2.0, "output": "x"}], "output": "x", "baseline": "y"}
    (table,) = _of(result_parts(steered), Table)
    assert table.rows == [["baseline", "y"], ["2", "x"]]


def test_attention_of_many_heads_is_where_their_weight_goes() -> None:
    n = 4
    rng = np.random.default_rng(0)
    w = rng.random((5, 6, n, n)) * np.tri(n)
    w /= w.sum(-1, keepdims=True)
    tokens = [{"index": i, "id": i, "text": "t"} for i in range(n)]
    d = {"weights": w.tolist(), "layers": list(range(5)), "heads": list(range(6)), "tokens": tokens}
    first, before, itself = _of(result_parts(d), HeatMap)
    np.testing.assert_allclose(first.values, w[:, :, 1:, 0].mean(-1))
    np.testing.assert_allclose(before.values, (w[..., 1, 0] + w[..., 2, 1] + w[..., 3, 2]) / 3)
    np.testing.assert_allclose(itself.values, (w[..., 1, 1] + w[..., 2, 2] + w[..., 3, 3]) / 3)
    one = {**d, "weights": w[:1, :2].tolist(), "layers": [0], "heads": [0, 1]}
    maps = _of(result_parts(one), HeatMap)
    assert [m.title for m in maps] == ["layer 0, head 0", "layer 0, head 1"]
    np.testing.assert_array_equal(np.isnan(maps[1].values), ~np.tri(n, dtype=bool))


def test_any_other_is_its_records_and_the_rest() -> None:
    d = {
        "rows": [{"a": 1, "share": ESTIMATE}, {"b": [1, 2]}],
        "mean": {"x": 3},
        "model": {"name": "m"},
    }
    table, rest = result_parts(d)
    assert isinstance(table, Table) and isinstance(rest, Manifest)
    assert list(table.columns) == ["a", "share", "b"]
    assert table.rows == [[1, "0.5 [0.25, 0.75]", None], [None, None, "1 | 2"]]
    assert rest.entries == {"mean": {"x": 3}}
    assert "m" in result_page(d) and is_known(d) and not is_known({"a": 1})


@pytest.mark.parametrize(
    "d",
    [
        _sweep(values=[[1.0]]),
        _sweep(axes=[{"name": "layer", "values": 3}]),
        _sweep(unchanged="x"),
        _sweep(values=[[10**400, 1], [1, 1]]),
        _sweep(low=[1.0], high=[2.0]),
        {"lens": [{"site": "a", "token_index": 0, "top": []}, {}]},
        {"lens": 3},
        {"weights": [[1]], "layers": [0], "heads": [0], "tokens": TOKENS},
        {"steered": [{"coeff": "x", "output": 1}], "output": ""},
        {"drop": 3, "logprob": "x", "ablated_at": 1, "answer": 1, "top": 1},
        {"sweep": {"a": {"ratio": []}}, "layers": [1, 2]},
    ],
)
def test_entries_that_do_not_belong_together_are_refused(d: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match="its entries do not belong together"):
        result_parts(d)


@pytest.fixture
def folder(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIA_MODEL", str(tiny("llama").model.facts.path))
    return tmp_path


def test_real_documents_have_the_views_of_their_numbers(folder: Path) -> None:
    lens = document("logit-lens", "l_out", "-p", PROMPT, "-k", "2")
    (grid,) = _of(result_parts(lens), LensGrid)
    n = len(lens["tokens"])
    assert (
        np.shape(grid.values) == (3, n)
        and grid.values[1, 2] == lens["lens"][n + 2]["top"][0]["prob"]
    )
    assert grid.others[0][1][1, 2] == lens["lens"][n + 2]["entropy"]
    shares = document("attribute", "-p", PROMPT, "--answer", " of")
    curve, heads = result_parts(shares)[3:5]
    assert isinstance(curve, Curve) and isinstance(heads, HeatMap)
    np.testing.assert_array_equal(heads.values, shares["heads"])
    np.testing.assert_array_equal(curve.lines[1].y, shares["mlp"])
    scores = document("heads", "-p", PROMPT)
    maps = {m.title: m for m in _of(result_parts(scores), HeatMap)}
    np.testing.assert_array_equal(maps["entropy"].values, scores["scores"]["entropy"])


def test_a_cell_has_the_command_that_computes_it(folder: Path) -> None:
    """What a cell's command prints is the cell's number."""
    run("sweep", "-p", PROMPT, "--zero", "--answer", " of", "-o", "s.json", "-q")
    run("ablate", "-p", PROMPT, "--answer", " of", "-o", "a.json", "-q")
    from mia.io.runs import parse_run
    from mia.methods.rerun import again

    for file, place, number in (("s.json", (2, 4), "values"), ("a.json", (1, 3), "drop")):
        d = json.loads(Path(file).read_text())
        (map_,) = _of(result_parts(d, None, again(parse_run(d["run"]))), HeatMap)
        words = "".join(str(place[w]) if isinstance(w, Of) else w for w in map_.command)
        alone = document(*_words(words))
        found = np.array(alone[number], dtype=float)
        found = found[np.isfinite(found)]
        assert found.size == 1
        assert found[0] == pytest.approx(np.array(d[number], dtype=float)[place], abs=1e-4)


def _words(line: str) -> list[str]:
    import shlex

    name, *words = shlex.split(line)
    assert name == "mia"
    return words
