"""The trial decode that decides about AMX: the child itself, and every way it can end."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_gguf import write_tiny

from mia.errors import UsageError
from mia.llama import child, probe

#: makes its argument the code that the child runs
Child = Callable[[str], None]
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Child]:
    """A machine whose library reports AMX; call with the Python code to run as the child."""
    monkeypatch.delenv("MIA_EXTRA_BUFTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    info = {"llama_cpp_python": "0.3.36", "features": "CPU : AVX512 = 1 | AMX_INT8 = 1 |"}
    monkeypatch.setattr("mia.llama.library.library_info", lambda: info)

    def set_child(code: str) -> None:
        probe._verdict.cache_clear()
        monkeypatch.setattr(probe, "_command", lambda folder: [sys.executable, "-c", code])

    set_child("raise SystemExit('no child expected')")
    yield set_child
    probe._verdict.cache_clear()


def remembered(tmp_path: Path) -> list[bool]:
    file = tmp_path / "cache" / "mia" / "probe.json"
    return list(json.loads(file.read_text()).values()) if file.exists() else []


# -- without AMX, and by hand ---------------------------------------------------------


def test_without_amx_nothing_runs(
    amx: Child, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    features = {"features": "CPU : AVX512 = 1 | AVX512_VNNI = 1 |"}
    monkeypatch.setattr("mia.llama.library.library_info", lambda: features)
    monkeypatch.setattr(probe, "_command", lambda folder: pytest.fail("a child was started"))
    assert probe.extra_buffers_safe() is True
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("wish", "verdict"), [("0", False), ("1", True)])
def test_the_environment_decides_without_a_child(
    amx: Child, monkeypatch: pytest.MonkeyPatch, wish: str, verdict: bool
) -> None:
    monkeypatch.setattr(probe, "_command", lambda folder: pytest.fail("a child was started"))
    monkeypatch.setenv("MIA_EXTRA_BUFTS", wish)
    assert probe.extra_buffers_safe() is verdict


def test_an_unknown_wish_is_an_error(amx: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIA_EXTRA_BUFTS", "yes")
    with pytest.raises(UsageError, match=r"MIA_EXTRA_BUFTS must be 0 .* or 1 .*, got 'yes'"):
        probe.extra_buffers_safe()


# -- the ways the child can end -------------------------------------------------------


def test_a_good_child_is_remembered_and_silent(
    amx: Child, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    amx("pass")
    assert probe.extra_buffers_safe() is True
    assert remembered(tmp_path) == [True]
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_crash_means_unsafe_and_says_how_to_rebuild(
    amx: Child, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    amx(CRASH)
    assert probe.extra_buffers_safe() is False
    assert remembered(tmp_path) == [False]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("mia: llama.cpp's AMX code crashes in this build (SIGSEGV in a trial")
    assert "going on without AMX" in err
    assert "-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" in err
    assert "llama-cpp-python==0.3.36" in err


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_remembered_crash_starts_no_child_and_is_silent(
    amx: Child, capfd: pytest.CaptureFixture[str]
) -> None:
    amx(CRASH)
    probe.extra_buffers_safe()
    capfd.readouterr()
    amx("pass")  # would say safe, were it asked
    assert probe.extra_buffers_safe() is False
    assert capfd.readouterr() == ("", "")


def test_wrong_numbers_mean_unsafe(
    amx: Child, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    amx("raise SystemExit(3)")
    assert probe.extra_buffers_safe() is False
    assert remembered(tmp_path) == [False]
    assert "computes wrong numbers" in capfd.readouterr().err


def test_a_child_that_hangs_means_unsafe(
    amx: Child, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "_SECONDS", 0.3)
    amx("import time; time.sleep(60)")
    assert probe.extra_buffers_safe() is False
    assert remembered(tmp_path) == [False]
    assert "hangs" in capfd.readouterr().err


def test_a_child_that_never_got_to_decode_is_not_remembered(
    amx: Child, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    amx("import a_module_that_is_not_there")
    assert probe.extra_buffers_safe() is False
    assert remembered(tmp_path) == []
    assert "could not find out" in capfd.readouterr().err


def test_a_child_that_cannot_start_is_not_remembered(
    amx: Child, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "_command", lambda folder: [str(tmp_path / "no-python")])
    assert probe.extra_buffers_safe() is False
    assert remembered(tmp_path) == []
    assert "could not find out" in capfd.readouterr().err


# -- what is remembered ----------------------------------------------------------------


def test_another_build_is_asked_anew_and_the_first_is_kept(
    amx: Child, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    amx("raise SystemExit(3)")
    monkeypatch.setattr(probe, "_build_key", lambda: "first build")
    assert probe.extra_buffers_safe() is False
    amx("pass")
    monkeypatch.setattr(probe, "_build_key", lambda: "second build")
    assert probe.extra_buffers_safe() is True
    verdicts = json.loads((tmp_path / "cache" / "mia" / "probe.json").read_text())
    assert verdicts == {"first build": False, "second build": True}
    assert [p.name for p in (tmp_path / "cache" / "mia").iterdir()] == ["probe.json"]


def test_the_key_names_the_library_file_by_size_and_time() -> None:
    import llama_cpp

    key = probe._build_key()
    (cpu, *_) = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-cpu*"))
    assert key.startswith(f"{llama_cpp.__version__} {cpu.name}:{cpu.stat().st_size}:")
    assert str(cpu.stat().st_mtime_ns) in key
    assert key.endswith(probe.processor_name())


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_damaged_memory_is_forgotten(amx: Child, tmp_path: Path, text: str) -> None:
    file = tmp_path / "cache" / "mia" / "probe.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    amx("pass")
    assert probe.extra_buffers_safe() is True
    assert remembered(tmp_path) == [True]


def test_a_cache_that_cannot_be_written_costs_the_memory_only(
    amx: Child, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    amx("pass")
    assert probe.extra_buffers_safe() is True
    assert capfd.readouterr() == ("", "")


# -- the child -------------------------------------------------------------------------


@pytest.fixture
def sound_build() -> None:
    """Skips where this very build is one that crashes: there the child does its work by dying."""
    if not probe.extra_buffers_safe():
        pytest.skip("the extra buffers of this build are not safe")


def test_the_real_child_finds_this_machine_safe(
    sound_build: None,
    amx: Child,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = [sys.executable, "-m", "mia.llama.probe"]
    monkeypatch.setattr(probe, "_command", lambda folder: [*child, folder])
    monkeypatch.chdir(tmp_path)  # a folder with another mia in it
    (tmp_path / "mia.py").write_text("raise SystemExit('not this one')")
    assert probe.extra_buffers_safe() is True
    assert remembered(tmp_path) == [True]
    assert capfd.readouterr() == ("", "")


def test_the_child_imports_what_its_parent_can(
    amx: Child, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    amx("")
    monkeypatch.setattr(probe, "_command", lambda folder: child.python("only_here"))
    assert probe.extra_buffers_safe() is True


def test_the_child_runs_by_itself(sound_build: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mia.llama.probe"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("wrong", [1.2, np.nan])
def test_the_child_reports_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: float
) -> None:
    logits = {False: np.ones((41, 256), np.float32), True: np.ones((41, 256), np.float32)}
    monkeypatch.setattr(probe, "_logits", lambda path, extra_bufts: logits[extra_bufts])
    monkeypatch.setattr(child, "prepare", lambda: None)  # not in this process
    assert probe.main(str(tmp_path)) == 0
    logits[True] = logits[True] * np.float32(wrong)
    assert probe.main(str(tmp_path)) == 3


def test_the_model_has_a_matrix_of_each_type_that_amx_multiplies(tmp_path: Path) -> None:
    probe.write_model(tmp_path / "probe.gguf")
    tensors = gguf.GGUFReader(tmp_path / "probe.gguf").tensors
    matrices = {t.name: t for t in tensors if len(t.shape) == 2}
    assert {t.tensor_type.name for t in matrices.values()} == set(probe._TYPES)
    for t in matrices.values():
        weights = gguf.quants.dequantize(t.data, t.tensor_type)  # (n_out, n_in)
        assert weights.shape == (256, 256)
        assert abs(weights.mean()) < 0.01
        assert weights.std() == pytest.approx(1 / 16, rel=0.08)


def test_the_models_logits_are_those_of_its_float_weights(
    sound_build: None, tmp_path: Path
) -> None:
    """The trial decode computes something real: dequantized to F32, the same model agrees."""
    path, plain = tmp_path / "probe.gguf", tmp_path / "float.gguf"
    probe.write_model(path)
    writer = gguf.GGUFWriter(plain, "llama")
    reader = gguf.GGUFReader(path)
    for key, value in probe._METADATA.items():
        if key.startswith("llama.") and isinstance(value, int):
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(1e-5)
    for t in reader.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type) if len(t.shape) == 2 else t.data
        writer.add_tensor(t.name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantized = probe._logits(path, extra_bufts=True)
    floats = probe._logits(plain, extra_bufts=False)
    assert floats.shape == (41, 256)
    assert np.linalg.norm(quantized - floats) / np.linalg.norm(floats) < 0.05


def test_a_model_opens_with_the_verdict(
    amx: Child, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mia.llama import LlamaModel
    from mia.model import Model

    seen: list[bool] = []

    def spy(path: Path, **options: Any) -> LlamaModel:
        seen.append(options["extra_bufts"])
        return LlamaModel(path, **options)

    monkeypatch.setattr("mia.model.LlamaModel", spy)
    path = write_tiny(tmp_path / "tiny.gguf", "llama")
    for wish in ("0", "1"):
        monkeypatch.setenv("MIA_EXTRA_BUFTS", wish)
        Model(path, threads=1).close()
    assert seen == [False, True]
