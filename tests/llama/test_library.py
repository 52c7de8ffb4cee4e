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
from mia.llama.probe import write_model
from mia.model import Model


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


def test_messages_are_lines_without_dots() -> None:
    """A message may come in pieces; the dots of a load's progress come as such pieces."""
    lib = library()
    lib.last_error()
    error, info, more = 4, 2, 5
    said = [(info, b"loading"), *[(more, b".")] * 9, (more, b"\n"), (error, b"bad: "), (more, b"tensor"),
            (more, b" 'x'\n"), (error, b"...\n"), (info, b"next"), (more, b" line\n"),
            (error, b"again\n"), (error, b"again\n"), (error, b"two\n\n  lines \n"), (more, b".")]  # fmt: skip
    for level, text in said:
        lib._on_log(level, text, None)
    assert lib.last_error() == "bad: tensor 'x'; again; two; lines"


def test_a_load_leaves_no_message(llama: Tiny) -> None:
    library().last_error()
    LlamaModel(llama.path).close()
    assert library().last_error() == ""


def test_a_message_is_of_the_call_that_failed(llama: Tiny, tmp_path: Path) -> None:
    library()._on_log(4, b"of long ago\n", None)
    short = tmp_path / "short.gguf"
    short.write_bytes(llama.path.read_bytes()[:100])
    with pytest.raises(ModelError) as caught:
        LlamaModel(short)
    assert "of long ago" not in str(caught.value)


def test_a_file_without_a_vocabulary(tmp_path: Path) -> None:
    """llama.cpp ends the process at a question about its texts."""
    write_model(tmp_path / "m.gguf")
    with Model(tmp_path / "m.gguf", threads=1) as m:
        activations = m.look([1, 2], "embed")
        assert [t.text for t in activations.prompt] == ["[1]", "[2]"]
        activations.save(tmp_path / "a.safetensors")
        assert m.generate([1], 2, bos=False).text.startswith("[")
        for ask in (lambda: m.tokenize("a", bos=False), lambda: m.token_id("a")):
            with pytest.raises(ModelError, match="this model's file has no vocabulary; give token"):
                ask()


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
