"""Vectors as reports: norms, nearest tokens, files."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import Tiny

from mia.errors import FileError, UsageError
from mia.notices import MiaWarning
from mia.vectors import Vector, load
from mia.vectors.report import VectorReport, inspect


def test_the_report_of_a_file_has_what_is_in_it(tmp_path: Path) -> None:
    v = Vector({i: np.full(4, i + 1.0) for i in range(3)}, metadata={"name": "v"})
    report = VectorReport(v)
    assert report.plain().splitlines()[1] == "  1  |v|     4.000"
    with pytest.warns(MiaWarning) as notices:
        written = report.write(tmp_path / "v.gguf")
    assert [str(n.message).split(":")[0] for n in notices] == [
        "layer 0 is left out",
        f"wrote {tmp_path / 'v.gguf'}",
    ]
    assert [r["layer"] for r in written.document()["layers"]] == load(tmp_path / "v.gguf").layers
    with pytest.warns(MiaWarning, match="wrote"):
        kept = report.write(tmp_path / "v.gguf", layer_zero=True)
    assert [r["layer"] for r in kept.rows()] == [0, 1, 2] == load(tmp_path / "v.gguf").layers
    assert kept.document()["file"] == str(tmp_path / "v.gguf")


def test_save_writes_the_vector_or_its_document(tmp_path: Path) -> None:
    report = VectorReport(Vector({1: np.ones(4, np.float32)}))
    report.save(tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text()) == report.document()
    with pytest.warns(MiaWarning, match="wrote"):
        report.save(tmp_path / "v.safetensors")
    assert load(tmp_path / "v.safetensors").layers == [1]
    with pytest.raises(FileError, match=r"must end in \.json, .*\.gguf, \.safetensors"):
        report.save(tmp_path / "v.txt")


def test_the_nearest_tokens_are_the_lens_best_and_worst(llama: Tiny) -> None:
    m = llama.model
    v = Vector({1: llama.vector("resid_post.1"), 2: llama.vector("resid_post.2", seed=2)})
    details = inspect(v, m, k=2)
    scores = llama.oracle.lens(v[2][None])[0]
    assert details.toward[1] == [m.piece(int(i)) for i in np.argsort(-scores)[:2]]
    assert details.away[1] == [m.piece(int(i)) for i in np.argsort(scores)[:2]]
    assert details.rows()[1]["toward"] == details.toward[1]
    assert details.plain().splitlines()[0] == "site: resid_post"
    assert not inspect(v).toward and "toward" not in inspect(v).rows()[0]
    heads = Vector({1: np.ones(m.n_head * m.head_dim, np.float32)}, "head_out")
    assert not inspect(heads, m).toward
    with pytest.raises(UsageError, match="directions of 7"):
        inspect(Vector({1: np.ones(7, np.float32)}), m)
