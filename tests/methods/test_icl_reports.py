"""What the reports of in-context methods share: files, notices about saved vectors, tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from letters import BEFORE, TASK

from mia import vectors
from mia.errors import FileError, UsageError
from mia.measure.estimates import Accuracy
from mia.methods import icl_reports
from mia.methods.icl import IclExperiment
from mia.notices import MiaWarning
from mia.vectors import Vector


def test_every_task_has_a_file_of_its_own(tmp_path: Path) -> None:
    pattern = str(tmp_path / "{name}_x.safetensors")
    files = icl_reports.vector_files(pattern, [TASK, BEFORE])
    assert files == [str(tmp_path / f"{n}_x.safetensors") for n in ("next", "before")]
    with pytest.raises(UsageError, match=r"2 tasks need 2 files, like \{name\}\.safetensors"):
        icl_reports.vector_files(str(tmp_path / "x.safetensors"), [TASK, BEFORE])
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        icl_reports.vector_files(str(tmp_path / "x.gguf"), [TASK])
    with pytest.raises(FileError, match="there is no folder"):
        icl_reports.vector_files(str(tmp_path / "no" / "x.safetensors"), [TASK])


def _saved(ex: IclExperiment, path: Path, **other: str) -> str:
    metadata = icl_reports.vector_metadata(ex, "task vector: of a test", layer="1")
    row = np.ones(ex.model.n_embd, np.float32)
    Vector({1: row}, "resid_post", {**metadata, **other}).save(path)
    return str(path)


def test_a_vector_of_the_same_task_is_read_without_a_notice(
    ex: IclExperiment, tmp_path: Path
) -> None:
    _saved(ex, tmp_path / "next.safetensors")
    vector, path = icl_reports.load_vector(tmp_path / "{name}.safetensors", ex, "task vector")
    assert path == str(tmp_path / "next.safetensors") and vector.layers == [1]
    assert vector.metadata["name"] == vector.metadata["task"] == "next"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"task": "some"}, "was made for the task some"),
        ({"seed": "9"}, "was made with another seed: test queries may overlap"),
        ({"pairs": "{}", "known_of": "3"}, "another pairs and known_of"),
        ({"model_sha256": "0", "model": "x"}, "was made with another model, x"),
    ],
)
def test_a_vector_made_elsewhere_is_noticed(
    ex: IclExperiment, tmp_path: Path, other: dict[str, str], message: str
) -> None:
    path = _saved(ex, tmp_path / "v.safetensors", **other)
    with pytest.warns(MiaWarning, match=message):
        icl_reports.load_vector(path, ex, "task vector")


def test_a_vector_of_another_method_or_width_is_refused(ex: IclExperiment, tmp_path: Path) -> None:
    path = _saved(ex, tmp_path / "v.safetensors")
    with pytest.raises(UsageError, match="is not a function vector; it is a task vector"):
        icl_reports.load_vector(path, ex, "function vector")
    vector = vectors.load(path)
    replace(vector, directions={1: vector[1][:-1]}).save(path)
    with pytest.raises(UsageError, match="the model's width at resid_post is"):
        icl_reports.load_vector(path, ex, "task vector")


def test_a_table_has_means_of_several_rows_and_curves_below() -> None:
    curve = {2: Accuracy(1, 4), 10: Accuracy(2, 4)}
    table = icl_reports.task_table(("task", "x"), [["a", "1"]], ["mean", "9"], {})
    assert table == "task  x\na     1"
    table = icl_reports.task_table(
        ("task", "x"), [["a", "1"], ["b", "2"]], ["mean", "9"], {"a": curve, "b": {10: curve[2]}}
    )
    assert table.split("\n") == [
        "task  x",
        "a     1",
        "b     2",
        "mean  9",
        "",
        "layer     a     b",
        "2      0.25     -",
        "10     0.50  0.25",
    ]


def test_accuracies_as_cells_records_and_means() -> None:
    rows: list[dict[str, Accuracy | None]] = [
        {"a": Accuracy(1, 3), "b": None},
        {"a": Accuracy(2, 3), "b": Accuracy(1, 1)},
    ]
    assert icl_reports.rows_mean(rows, ["a"]) == {"a": 0.5}
    assert icl_reports.cell(None) == "-"
    assert icl_reports.cell(Accuracy(0, 10)) == "0.00 [0.00, 0.28]"
    assert icl_reports.flat(rows[0]) == {
        "a": 1 / 3,
        "a_low": Accuracy(1, 3).interval[0],
        "a_high": Accuracy(1, 3).interval[1],
        "b": None,
        "b_low": None,
        "b_high": None,
    }
    assert icl_reports.accuracy_documents(rows[0]) == {"a": Accuracy(1, 3).document(), "b": None}


def test_curves_that_nobody_asked_for_are_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ask for accuracies by layer"):
        icl_reports.plot_curves(tmp_path / "x.svg", {"with the vector": {"a": {}}}, "by layer")
