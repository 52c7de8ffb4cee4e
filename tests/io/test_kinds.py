"""A file of another kind than the command needs says what it is and what reads it."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from commands import refused, run
from safetensors.numpy import save_file

from mia.errors import FileError, UsageError
from mia.io.activations import load as load_capture
from mia.io.kinds import kinds_of
from mia.methods.soft_vectors import load as load_soft
from mia.model import Model
from mia.vectors import Vector
from mia.vectors.vector import load as load_vector


def _array(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.fixture
def files(tmp_path: Path, path_of_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of each kind."""
    monkeypatch.chdir(tmp_path)
    save_file({"resid_post.1": _array(4, 48)}, "capture.safetensors")
    save_file({"resid_post.1": _array(1, 48)}, "row.safetensors")
    save_file({"attention": _array(1, 2, 3, 3)}, "maps.safetensors")
    save_file({"means": _array(3, 6, 8), "weights": _array(3, 6)}, "soft.safetensors")
    save_file({"model.norm.weight": _array(48)}, "weights.safetensors")
    Vector({1: _array(48)}).save("vector.gguf")
    Vector({1: _array(48)}).save("vector.safetensors")
    np.save("array.npy", _array(3, 48))
    Path("model.gguf").write_bytes(path_of_llama.read_bytes())
    Path("result.json").write_text(json.dumps({"model": {}}))
    Path("text.txt").write_text("The cat sat")
    Path("cut.safetensors").write_bytes(struct.pack("<Q", 40) + b'{"resid_post.1": {"sha')
    return tmp_path


@pytest.fixture
def path_of_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_gguf import write_tiny

    return write_tiny(tmp_path_factory.mktemp("kinds") / "model.gguf", "llama")


@pytest.mark.usefixtures("files")
def test_what_a_file_is() -> None:
    expected = {
        "capture.safetensors": {"capture"},
        "row.safetensors": {"capture", "vector"},
        "maps.safetensors": {"maps"},
        "soft.safetensors": {"soft vector"},
        "weights.safetensors": {"weights"},
        "vector.gguf": {"vector"},
        "vector.safetensors": {"vector"},
        "array.npy": {"array"},
        "model.gguf": {"model"},
        "result.json": {"document"},
        "text.txt": set(),
        "cut.safetensors": set(),
        "none": set(),
        ".": set(),
    }
    assert {name: kinds_of(name) for name in expected} == expected
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        assert kinds_of("pipe") == set()  # at once


@pytest.mark.usefixtures("files")
def test_every_reader_names_the_kind_and_what_reads_it() -> None:
    readers = {
        load_vector: {"vector.gguf", "vector.safetensors", "row.safetensors", "array.npy"},
        load_capture: {"capture.safetensors", "row.safetensors", "array.npy"},
        load_soft: {"soft.safetensors"},
    }
    names = {p.name for p in Path().iterdir()} - {"text.txt", "cut.safetensors"}
    for reader, own in readers.items():
        for name in own:
            reader(name)
        for name in names - own:
            with pytest.raises(FileError, match=rf"^{name} is (an? )?.* is needed here$"):
                reader(name)
    with pytest.raises(FileError, match=r"capture\.safetensors is a capture of .*mia patch reads"):
        load_vector("capture.safetensors")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", ["vector.gguf", "capture.safetensors", "weights.safetensors"])
def test_a_model_is_needed(name: str) -> None:
    with pytest.raises(Exception, match=r" is an? .*; a model is needed here"):
        Model(f"./{name}")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "words",
    [
        ["steer", "capture.safetensors", "-p", "x"],
        ["run", "-p", "x", "--steer", "capture.safetensors"],
        ["run", "-f", "capture.safetensors"],
        ["vector", "train", "capture.safetensors", "-o", "v.gguf"],
        ["vector", "combine", "2*capture.safetensors", "-o", "v.gguf"],
        ["caa", "train", "capture.safetensors", "-o", "v.gguf"],
        ["task-vector", "train", "capture.safetensors", "-o", "v.safetensors"],
        ["tokens", "-m", "./capture.safetensors", "-p", "x"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_commands_say_what_a_capture_is(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIA_MODEL", "model.gguf")
    assert "capture.safetensors" in (told := refused(*words))
    assert "a capture of activations (mia patch reads it)" in told


@pytest.mark.usefixtures("files")
def test_wrong_kinds_that_no_reader_knows_are_left_to_it() -> None:
    with pytest.raises((FileError, UsageError)):
        load_capture("text.txt")
    with pytest.raises((FileError, UsageError)):
        load_vector("cut.safetensors")
    assert run("tokens", "-m", "model.gguf", "-f", "text.txt").stdout
