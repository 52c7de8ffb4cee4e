"""Doctor: green on what is sound, and the right line in red on each of many broken set-ups."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny import Tiny
from tiny_gguf import write_tiny

from mia.engine import graph
from mia.engine.blocks import Part
from mia.errors import EngineError
from mia.lenses import LogitLens
from mia.llama import LlamaModel, library_info as llama_info
from mia.model import Model
from mia.models import doctor as doctor_module, examination
from mia.models.doctor import Doctor, doctor
from mia.models.findings import Finding


def line(report: Doctor, what: str) -> Finding:
    (finding,) = [f for f in report.findings if f.what == what]
    return finding


def of_level(report: Doctor, level: str) -> list[str]:
    return [f.what for f in report.findings if f.level == level]


# -- sound ---------------------------------------------------------------------------------


def test_a_sound_model_is_green(case: Tiny) -> None:
    report = doctor(case.model)
    assert of_level(report, "fail") == of_level(report, "warn") == [], report.plain()
    assert not report.failed and report.document()["healthy"]
    assert line(report, "sites").text == "16 of 16 kinds verified on numbers"
    numbers = line(report, "noise floor").numbers
    assert numbers is not None and numbers["nats"] < 1e-3 and numbers["changes"] == 24
    moved = line(report, "identity").numbers
    assert moved is not None and moved["nats"] < 1e-5


def test_a_recurrent_model_is_green_and_says_what_it_lacks(tiny: Callable[[str], Tiny]) -> None:
    report = doctor(tiny("mamba").model)
    assert of_level(report, "fail") == []
    assert "this architecture has no attn_out, attn_pattern" in line(report, "sites").text


def test_the_report_in_lines_records_and_a_document(llama: Tiny) -> None:
    report = doctor(llama.model)
    lines = report.plain().splitlines()
    assert lines[0].startswith("ok    llama.cpp    llama-cpp-python 0.3.")
    assert (
        "ok    model        llama: llama, 3 layers, weights f32, KV cache f32, 1 threads" in lines
    )
    assert report.rows()[0]["level"] == "ok"
    document = report.document()
    assert document["model"]["architecture"] == "llama"
    assert {"level", "what", "text", "advice", "numbers"} == set(document["findings"][0])


def test_the_machine_alone() -> None:
    report = doctor()
    assert report.facts is None and not report.failed
    assert [f.what for f in report.findings] == ["llama.cpp", "buffers", "callback", "extras"]


def test_types_without_a_matrix_kernel_are_named(tmp_path: Path) -> None:
    report = doctor(write_tiny(tmp_path / "slow.gguf", "llama", qtype="Q4_1"), threads=1)
    model = line(report, "model")
    assert model.level == "ok"
    assert model.advice.startswith("q4_1 has no matrix-matrix kernel on a CPU")
    assert model.advice.endswith("mia models convert slow f16 FILE")
    assert "-> q4_1 has no" in report.plain()
    assert "mia models convert slow f16 FILE" in line(report, "noise floor").advice


# -- broken ----------------------------------------------------------------------------------


def test_whether_repacking_is_faster(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "repacking" not in [f.what for f in doctor(llama.model).findings]
    numbers = line(doctor(llama.model, speed=True), "repacking").numbers
    assert numbers is not None and numbers.keys() == {"prefill", "decode"}
    monkeypatch.setattr("mia.models.speed.repacking_speed", lambda *_: (1.9, 0.5))
    repacking = line(doctor(llama.model, speed=True), "repacking")
    assert "1.9 × and a decode 0.5 ×" in repacking.text and "MIA_EXTRA_BUFTS=0" in repacking.advice
    monkeypatch.setattr(doctor_module, "_SMALL", 10)  # nothing so large is opened twice
    assert "repacking" not in [f.what for f in doctor(llama.model, speed=True).findings]


def test_no_file(tmp_path: Path) -> None:
    report = doctor(tmp_path / "none.gguf")
    assert report.failed and "none.gguf" in line(report, "model").text


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("once upon a time")
    report = doctor(path)
    assert of_level(report, "fail") == ["model"]
    assert "GGUF" in line(report, "model").text


def test_a_file_that_is_cut_short(tmp_path: Path, llama: Tiny) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(llama.path.read_bytes()[:-2000])
    report = doctor(path)
    assert of_level(report, "fail") == ["model"] and "cut short" in line(report, "model").text


def _damaged(path: Path, llama: Tiny, tensor: str, value: float) -> Path:
    path.write_bytes(llama.path.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    (found,) = [t for t in reader.tensors if t.name == tensor]
    found.data[:] = value
    reader.data.flush()
    return path


def test_weights_that_are_no_numbers(tmp_path: Path, llama: Tiny) -> None:
    report = doctor(_damaged(tmp_path / "nan.gguf", llama, "blk.1.attn_norm.weight", np.nan))
    assert report.failed and "runs" in of_level(report, "fail")
    assert "nothing was edited: the model's file is damaged" in line(report, "runs").text


def test_activations_that_are_all_zero(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of nothing is no number, and not below a bound."""
    with Model(llama.path, threads=1) as model:
        _ = model.site_checks
        true = Model.run

        def nothing(self: Model, requests: Any, **how: Any) -> Any:
            results = true(self, requests, **how)
            for result in results:
                for rows in result.captures.values():
                    rows[:] = 0
            return results

        monkeypatch.setattr(Model, "run", nothing)
        report = doctor(model)
    assert "batches" in of_level(report, "fail")


def test_a_site_that_is_not_what_it_says(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(graph._OF_BLOCK, "mlp_out", lambda block: Part(block._end))
    with pytest.warns(UserWarning, match="not what the name says"):
        report = doctor(llama.path, threads=1)
    assert of_level(report, "fail") == ["sites"]
    assert line(report, "sites").text.startswith("mlp_out.0, mlp_out.1, mlp_out.2: not what")


def test_a_lens_that_is_not_the_model(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    true = LogitLens.check

    def shifted(self: LogitLens, rows: Any, logits: Any, *, model: str) -> None:
        true(self, rows, logits + np.arange(logits.shape[-1]), model=model)

    monkeypatch.setattr(LogitLens, "check", shifted)
    report = doctor(llama.path, threads=1)
    assert of_level(report, "fail") == ["lens"]


def test_edits_that_do_not_put_back_what_was_there(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mia.edits import Edit

    true = Edit.apply

    def off(self: Edit, rows: Any, *where: Any) -> None:
        true(self, rows, *where)
        rows *= 1.1

    report = None
    with Model(llama.path, threads=1) as model:
        _ = model.site_checks
        monkeypatch.setattr(Edit, "apply", off)
        report = doctor(model)
    assert "identity" in of_level(report, "fail")
    assert line(report, "identity").text.startswith("a patch that changes nothing moves")


def test_prompts_that_disturb_each_other(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(llama.path, threads=1) as model:
        true = Model.run

        def mixed(self: Model, requests: Any, **how: Any) -> Any:
            results = true(self, requests, **how)
            if len(results) > 5 and results[0].captures:
                site = next(iter(results[0].captures))
                results[0].captures[site] += 1
            return results

        monkeypatch.setattr(Model, "run", mixed)
        report = doctor(model)
    assert "batches" in of_level(report, "fail")


def test_no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise EngineError("llama-cpp-python cannot be loaded: libllama.so is missing")

    monkeypatch.setattr("mia.llama.library_info", broken)
    report = doctor("smollm2")
    assert [f.what for f in report.findings] == ["llama.cpp"] and report.failed
    assert "pip install" in report.findings[0].advice


def test_a_broken_build_and_a_slow_callback(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    library = {**llama_info(), "features": "AMX_INT8 = 1", "callback": "Python"}
    monkeypatch.delenv("MIA_NATIVE", raising=False)
    monkeypatch.setattr("mia.llama.library_info", lambda: library)
    monkeypatch.setattr("mia.llama.probe.extra_buffers_safe", lambda: False)
    report = doctor(llama.model)
    assert of_level(report, "warn") == ["AMX", "callback"]
    assert "-fno-tree-dse" in line(report, "AMX").advice
    assert "C compiler" in line(report, "callback").advice
    monkeypatch.setenv("MIA_NATIVE", "0")  # asked for
    assert of_level(doctor(llama.model), "warn") == ["AMX"]


def test_extras_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"matplotlib", "cma"}
    monkeypatch.setattr(
        doctor_module, "find_spec", lambda name: None if name in absent else object()
    )
    extras = line(doctor(), "extras")
    assert extras.text == "not installed: plots (pictures), soft (the optimiser cma)"
    assert extras.advice == "pip install 'mia[plots,soft]'"


def test_a_context_that_does_not_fit(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "available_memory", lambda: 10_000)
    memory = line(doctor(llama.model), "memory")
    assert memory.level == "warn" and memory.advice.startswith("open it with a smaller context")


def test_a_first_token_that_is_a_sink(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "first_over_others", lambda *_: 40.0)
    with Model(llama.path, threads=1, bos=False) as model:
        bos = line(doctor(model), "BOS")
    assert bos.level == "warn" and "40 times the others'" in bos.text
    assert bos.advice == "ask for a BOS, which puts <|endoftext|> in front"


def test_a_tokenizer_that_loses_text(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "detokenize", lambda self, ids: "something else")
    assert line(doctor(llama.model), "tokenizer").level == "warn"


def test_a_file_at_which_llama_cpp_dies(
    tmp_path: Path, llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child dies, and not the doctor."""
    monkeypatch.setattr(
        "mia.llama.trial.child.python",
        lambda *_: [sys.executable, "-c", "import os; print('load', flush=True); os.abort()"],
    )
    report = doctor(llama.path, threads=1)
    assert of_level(report, "fail") == ["model"] and report.failed
    assert "llama.cpp dies loading the file (SIGABRT)" in line(report, "model").text


def test_repacked_copies_of_weights_are_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "q4_0.gguf", "llama", qtype="Q4_0")
    plain = LlamaModel(path, extra_bufts=False)
    assert plain.repacked == 0
    plain.close()
    with Model(path, threads=1) as model:
        copies = model._llama.repacked
        assert copies <= path.stat().st_size
        assert (copies > 0) == bool(re.search("AVX2 = 1|NEON = 1", llama_info()["features"]))
        memory = line(doctor(model), "memory")
        assert ("llama.cpp keeps a repacked copy of" in memory.text) == (copies > 0)
        model._llama.repacked = 3_400_000_000
        text = line(doctor(model), "memory").text
        assert "llama.cpp keeps a repacked copy of 3400 MB of the weights" in text
        model._llama.repacked = 0
        assert "repacked" not in line(doctor(model), "memory").text


def test_a_build_with_blas_is_named(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    info = llama_info()
    assert "CPU" in info["backends"].split(", ")
    for backends, there in (("CPU", False), ("BLAS, CPU", True)):
        monkeypatch.setattr("mia.llama.library_info", lambda b=backends: {**info, "backends": b})
        found = [f.what for f in doctor(llama.model, speed=True).findings]
        assert ("BLAS" in found) == there
        assert "BLAS" not in [f.what for f in doctor(llama.model).findings]
