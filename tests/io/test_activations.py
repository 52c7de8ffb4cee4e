"""Capture files: what is written is read back, and what does not fit is refused."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_tiny

from mia.errors import FileError, RangeError, UsageError
from mia.io import activations, files
from mia.io.activations import Activations
from mia.io.provenance import file_metadata
from mia.model import Model
from mia.sites import Site

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny(tmp_path_factory.mktemp("c") / "tiny.gguf", "llama"), threads=1) as m:
        yield m


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")


def test_round_trip_with_file_metadata(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Activations({"resid_post.1": ROWS}, file_metadata(model, tokens=[5, 6, 7], bos=True)).save(path)
    back = activations.load(path)
    np.testing.assert_array_equal(back.at(Site("resid_post", 1)), ROWS)
    np.testing.assert_array_equal(back.at(Site("resid_post", 1), [-1, 0]), ROWS[[2, 0]])
    assert back.tokens == [5, 6, 7]
    assert back.metadata["model_sha256"] == model.file_hash
    assert json.loads(back.metadata["bos"]) is True
    assert {"mia", "llama_cpp_python", "tokenizer_sha256", "n_layer"} <= back.metadata.keys()
    back.check(model)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.safetensors"]


def test_npy_stands_for_any_site(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", ROWS[0])
    loaded = activations.load(tmp_path / "v.npy")
    np.testing.assert_array_equal(loaded.at(Site("mlp_out", 2)), ROWS[:1])


def test_other_models_are_refused(model: Model) -> None:
    facts = file_metadata(model)
    with pytest.raises(UsageError, match="another tokenizer"):
        Activations({"resid_post.0": ROWS}, facts | {"tokenizer_sha256": "0"}).check(model)
    with pytest.raises(UsageError, match="width 64"):
        Activations({"resid_post.0": ROWS}, facts | {"n_embd": "64"}).check(model)


def test_missing_sites_and_tokens_are_named() -> None:
    c = Activations({"resid_post.0": ROWS, "q.1": ROWS})
    with pytest.raises(UsageError, match=r"has no k.1; it has resid_post.0, q.1"):
        c.at(Site("k", 1))
    with pytest.raises(RangeError, match="0 to 2"):
        c.at(Site("q", 1), 3)


@pytest.mark.parametrize("name", ["x.safetensors", "x.npy"])
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(FileError, match="there is no file"):
        activations.load(path)
    path.write_bytes(b"GGUF nothing of the kind")
    with pytest.raises(FileError, match="neither a safetensors capture nor"):
        activations.load(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = ROWS.copy()
    bad[1, 1] = np.nan
    Activations({"resid_post.0": bad}).save(tmp_path / "nan.safetensors")
    with pytest.raises(FileError, match="not finite"):
        activations.load(tmp_path / "nan.safetensors")


def test_nothing_is_half_written(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("before")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"cannot write .*out.json: No space left"):
        files.write_whole(path, fail)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_pipes_and_devices_are_refused_and_links_are_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        files.write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_json(tmp_path / "link.json", {"new": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"new": 1}


def test_a_folder_that_takes_no_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(FileError, match=r"cannot write .*x.json: No such file"):
        files.write_json(tmp_path / "x.json", {})


def test_npy_is_written_for_one_site_and_read_as_rows(tmp_path: Path) -> None:
    Activations({"resid_post.0": ROWS}).save(tmp_path / "one.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), ROWS)
    with pytest.raises(FileError, match="one site, not 2"):
        Activations({"a": ROWS, "b": ROWS}).save(tmp_path / "two.npy")
    np.save(tmp_path / "deep.npy", ROWS[None, None])
    with pytest.raises(FileError, match=r"its shape is \(1, 1, 3, 4\)"):
        activations.load(tmp_path / "deep.npy")


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        files.check_writable(tmp_path / "no" / "x.json")
    with pytest.raises(FileError, match="is a folder"):
        files.check_writable(tmp_path)


def test_file_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(b"one")
    first = files.file_sha256(path)
    assert first == files.file_sha256(path)
    assert len(json.loads((tmp_path / "cache" / "hashes.json").read_text())) == 1
    path.write_bytes(b"three")
    assert files.file_sha256(path) != first
