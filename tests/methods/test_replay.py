"""Comparing two documents: what agrees, by how much the rest moved."""

import math
from typing import Any

import pytest

from mia.methods.replay import ReplayReport, compare

OLD = {
    "lens": [{"top": [{"id": 3, "logit": 2.0, "prob": 0.5}, {"id": 4, "logit": -40.0, "prob": 0.1}]}],
    "text": "a",
    "model": {"n_layer": 3, "mia": "0.0.1"},
    "metadata": {"mia": "0.0.1", "model": "m", "site": "resid_post"},
    "run": {"anything": 1},
}  # fmt: skip


def moved(name: str, *by: float) -> dict[str, Any]:
    """OLD with the numbers of one field moved, and all that is not compared changed."""
    tops = OLD["lens"][0]["top"]  # type: ignore[index]
    top = [{**t, name: t[name] + d} for t, d in zip(tops, by, strict=True)]
    made_by = {"mia": "2", "model": "n", "site": "resid_post"}
    model = {"n_layer": 3, "mia": "2"}
    return {"lens": [{"top": top}], "text": "a", "model": model, "metadata": made_by, "run": {}}


def drifts(report: ReplayReport) -> list[str]:
    return [f.field for f in report.fields if f.differ]


def test_the_same_is_exact() -> None:
    report = compare(OLD, moved("logit", 0, 0), 0)
    assert (report.verdict, report.n_differences, drifts(report)) == ("exact", 0, [])
    kinds = {f.field: (f.kind, f.n) for f in report.fields}
    assert kinds == {
        "lens.[].top.[].id": ("texts and ids", 2),
        "lens.[].top.[].logit": ("logits", 2),
        "lens.[].top.[].prob": ("probabilities", 2),
        "text": ("texts and ids", 1),
        "model.n_layer": ("texts and ids", 1),
        "metadata.site": ("texts and ids", 1),
    }


def test_drift_is_absolute_and_relative() -> None:
    report = compare(OLD, moved("logit", 0.5, -4.0), 0.25)
    (drift,) = (f for f in report.fields if f.differ)
    assert (drift.largest, drift.mean, drift.differ) == (4.0, 2.25, 2)
    assert drift.largest_relative == 0.5 / 2.5
    assert drift.mean_relative == pytest.approx((0.5 / 2.5 + 4 / 44) / 2)
    # -40 -> -44 is within a quarter of its size, 2 -> 2.5 of 2.5
    assert drift.agrees and report.verdict == "within tolerance" and not report.failed
    assert compare(OLD, moved("logit", 0.5, -4.0), 0.0909).n_differences == 2
    report = compare(OLD, moved("logit", 0.5, -4.0), 0.1)
    assert [d["path"] for d in report.differences] == ["lens.0.top.0.logit"] and report.failed


def test_a_probability_may_move_a_quarter_of_what_a_logit_may() -> None:
    assert compare(OLD, moved("prob", 0.02, 0), 0.1).verdict == "within tolerance"
    assert compare(OLD, moved("prob", 0.03, 0), 0.1).verdict == "different"


def test_ids_are_equal_or_not() -> None:
    report = compare(OLD, moved("id", 0, 1), 1e9)
    assert report.verdict == "different" and report.differences == [
        {"path": "lens.0.top.1.id", "saved": 4, "now": 5}
    ]


@pytest.mark.parametrize("now", [math.nan, math.inf, "2.0", None, True, [2.0], {}])
def test_what_is_no_number_does_not_agree(now: Any) -> None:
    report = compare({"x": 2.0}, {"x": now}, 1e9)
    assert report.verdict == "different"
    report.plain()
    assert all(v is None or math.isfinite(v) for row in report.rows() for v in row.values()
               if not isinstance(v, str))  # fmt: skip


def test_documents_of_other_shapes() -> None:
    report = compare({"a": [1.0, 2.0], "b": {"c": 1}}, {"a": [1.0], "d": []}, 0)
    assert [(d["path"], d["saved"], d["now"]) for d in report.differences] == [
        ("a.1", 2.0, "(absent)"),
        ("b.c", 1, "(absent)"),
        ("d", "(absent)", []),
    ]


def test_only_the_first_differences_are_listed() -> None:
    report = compare({"x": [0.0] * 50}, {"x": [1.0] * 50}, 0)
    assert len(report.differences) == 10 and report.n_differences == 50
    assert report.plain().endswith("… and 40 more")


def test_deep_documents_are_walked() -> None:
    deep: Any = 1.0
    for _ in range(5000):
        deep = [deep]
    assert compare({"x": deep}, {"x": deep}, 0).verdict == "exact"
