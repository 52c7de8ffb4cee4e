"""llama.cpp's libraries: another layout, a missing function, what they say of themselves."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Tiny

from mia.errors import EngineError, ModelError
from mia.llama import (
    LlamaModel,
    library as lib_module,
    library_info,
)
from mia.llama.library import Library, library


def test_another_layout_of_tensors_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(lib_module.Tensor._fields_)

    def check_with(changed: list[Any]) -> None:
        other = type("Other", (ctypes.Structure,), {"_fields_": tuple(changed)})
        monkeypatch.setattr(lib_module, "Tensor", other)
        library()._check_layout()

    check_with(fields)
    names = [name for name, _ in fields]
    swapped = [*fields]
    a, b = names.index("ne"), names.index("nb")
    swapped[a], swapped[b] = swapped[b], swapped[a]
    src = names.index("src")
    longer = [*fields[:src], ("more", ctypes.c_void_p * 2), *fields[src:]]
    for changed in (swapped, longer, fields[1:]):
        with pytest.raises(
            EngineError, match="lays out its tensors in a way that mia does not know"
        ):
            check_with(changed)


def test_a_library_without_a_function_is_noticed() -> None:
    empty = object.__new__(Library)
    empty.version, empty.base = "0.0.1", SimpleNamespace()
    with pytest.raises(
        EngineError, match=r"0\.0\.1 does not export ggml_backend_tensor_get; mia needs"
    ):
        empty._declare()


def test_what_the_library_says_of_itself() -> None:
    info = library_info()
    assert info["llama_cpp_python"].startswith("0.3.")
    assert info["gpu"] in ("yes", "no")
    assert "=" in info["features"]


def test_errors_of_the_library_are_told_once() -> None:
    lib = library()
    lib.last_error()
    lib._on_log(2, b"chatter\n", None)
    lib._on_log(4, b"trouble\n", None)
    lib._on_log(4, b"more\n", None)
    assert lib.last_error() == "trouble; more"
    assert lib.last_error() == ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_there_is_one_ggml_in_the_process() -> None:
    """Wheels hold copies of libggml-base under three names; a second one has a log of its own."""
    library()
    maps = Path("/proc/self/maps").read_text().split()
    assert len({word for word in maps if "libggml-base" in word}) == 1


@pytest.mark.parametrize("kept", [100, 20_000, -1])
def test_a_file_that_the_library_cannot_load(llama: Tiny, tmp_path: Path, kept: int) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(llama.path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"llama.cpp cannot load .*short\.gguf: \S+"):
        LlamaModel(short)


def test_waiting_threads_do_not_spin_for_long() -> None:
    code = "import os; from mia.llama.library import library; library(); print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, expected in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        env = {
            k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        out = subprocess.run(
            [sys.executable, "-c", code],
            env=env | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == expected
