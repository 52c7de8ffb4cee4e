"""Doctor: what it reports of a model and a machine, and what it advises."""

from pathlib import Path

import pytest
from tiny import Tiny
from tiny_gguf import write_tiny

from mia.llama import library_info as llama_info
from mia.model import Model
from mia.models.doctor import doctor


def test_a_model_that_runs_well_needs_nothing(llama: Tiny) -> None:
    report = doctor(llama.model)
    document = report.document()
    assert (document["weight_types"], document["kv_type"], document["threads"]) == (
        ["f32"],
        "f32",
        1,
    )
    assert document["model"]["architecture"] == "llama"
    assert report.plain().splitlines()[2] == "llama: llama, weights f32, KV cache f32, 1 threads"
    assert report.rows()[0]["weight_types"] == "f32"


def test_types_without_a_matrix_kernel_are_named(tmp_path: Path) -> None:
    with Model(write_tiny(tmp_path / "slow.gguf", "llama", qtype="Q4_1"), threads=1) as m:
        report = doctor(m)
    assert "q4_1" in report.weight_types
    (advice,) = [a for a in report.advice if "q4_1" in a]
    assert advice.startswith("q4_1 weights have no matrix-matrix kernel on a CPU")
    assert advice.endswith("mia models convert slow f32 FILE")
    assert f"- {advice}" in report.plain().splitlines()


def test_a_broken_build_and_a_slow_callback_are_named(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {**llama_info(), "features": "AMX_INT8 = 1", "callback": "Python"}
    monkeypatch.delenv("MIA_NATIVE", raising=False)
    monkeypatch.setattr("mia.llama.library_info", lambda: library)
    monkeypatch.setattr("mia.llama.probe.extra_buffers_safe", lambda: False)
    report = doctor(llama.model)
    assert ["AMX crashes" in a for a in report.advice] == [True, False]
    assert "C compiler" in report.advice[1] and "extra buffers (AMX, repacking): off" in str(report)
    monkeypatch.setenv("MIA_NATIVE", "0")  # asked for
    assert len(doctor(llama.model).advice) == 1
