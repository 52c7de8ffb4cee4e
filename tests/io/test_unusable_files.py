"""Files that cannot be read or written: one clear error each, and nothing half-written."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mia.datasets.pairs import select_pairs
from mia.datasets.shipped import read_lines
from mia.errors import FileError, MiaError
from mia.io import activations, files
from mia.io.activations import Activations
from mia.io.files import check_writable, file_sha256, read_utf8, write_json
from mia.show.html import write_page
from mia.vectors import Vector, load

ROWS = np.ones((30, 40), np.float32)

#: each writes more than the limit allows
_FULL = """
import io, resource
from pathlib import Path
import numpy as np
from mia.errors import FileError
from mia.io.activations import Activations
from mia.io.files import write_json
from mia.llama.gguf_write import write_gguf
from mia.methods.soft_vectors import SoftVector
from mia.show import plots
from mia.show.html import write_page
from mia.vectors import Vector
a = np.random.default_rng(0).standard_normal((2, 3000)).astype(np.float32)
v, c = Vector({1: a[0], 2: a[1]}), Activations({"resid_post.0": a})
figure = plots.heatmap(a[:, :50])
writers = {
    "v.gguf": lambda p: v.save(p),
    "v.safetensors": lambda p: v.save(p),
    "c.safetensors": lambda p: c.save(p),
    "c.npy": lambda p: c.save(p),
    "s.safetensors": lambda p: SoftVector(a.reshape(2, 3, 1000), np.ones((2, 3)), {}).save(p),
    "d.json": lambda p: write_json(p, {"a": "x" * 5000}),
    "p.html": lambda p: write_page(p, "x" * 5000),
    "p.png": lambda p: plots.save(figure, p),
    "p.svg": lambda p: plots.save(figure, p),
    "p.pdf": lambda p: plots.save(figure, p),
    "t.gguf": lambda p: write_gguf(p, {"general.architecture": "x"}, {"t": a}),
}
figure.savefig(io.BytesIO())  # matplotlib remembers its fonts
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for name, write in writers.items():
    try:
        write(Path(name))
        print(name, "was written")
    except FileError as err:
        print(name, err)
"""


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 11
    for line in lines:
        name, _, message = line.partition(" ")
        assert message.startswith("cannot write ") and "File too large" in message, line
        assert name in message
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


# -- paths -------------------------------------------------------------------------------

READERS: list[Callable[[Path], object]] = [load, activations.load, read_utf8, file_sha256]


@pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".gguf"])
def test_what_is_no_file_is_one_clear_error(
    read: Callable[[Path], object], suffix: str, tmp_path: Path
) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    names = ["n" * 260, "folder", "gone/away", "nul\0l", "half\ud800", "bytes\udcff"]
    if read is not read_utf8:  # a prompt may come from a pipe
        names.append("pipe")
    for name in names:
        with pytest.raises(MiaError) as err:
            read(tmp_path / (name + suffix))
        assert "\n" not in str(err.value)
    with pytest.raises(MiaError, match="folder"):
        read(tmp_path / f"folder{suffix}")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Activations({"resid_post.0": ROWS}).save(path)
    path.chmod(0)
    for read in (load, activations.load, read_utf8):
        with pytest.raises(FileError, match=r"[Pp]ermission"):
            read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 260 + ".json", "File name too long"),
        ("half\ud800.json", "no file name can have"),
        ("nul\0.json", "null byte"),
        ("folder", "is a folder"),
        ("pipe", "not a regular file"),
        ("gone/a.json", "no folder"),
    ],
)
def test_where_nothing_can_be_written(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for write in (check_writable, lambda p: write_json(p, 1), lambda p: write_page(p, "x")):
        with pytest.raises(FileError, match=message):
            write(tmp_path / name)


def test_the_longest_name_that_there_is(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    """Its name goes into metadata, whose texts are Unicode."""
    name = os.fsdecode(b"caf\xe9")
    v = Vector({1: np.ones(4, np.float32)}, metadata={"name": name, "data": name})
    for suffix in (".safetensors", ".gguf"):
        v.save(tmp_path / (name + suffix))
        back = load(tmp_path / (name + suffix))
        assert back.metadata["name"] == r"caf\udce9"
    Activations({"resid_post.0": ROWS}, {"prompt": name}).save(tmp_path / f"{name}.c.safetensors")
    assert activations.load(tmp_path / f"{name}.c.safetensors").metadata["prompt"] == r"caf\udce9"
    write_json(tmp_path / f"{name}.json", {"name": name})
    assert json.loads((tmp_path / f"{name}.json").read_bytes()) == {"name": name}


# -- contents ----------------------------------------------------------------------------


def test_a_text_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(FileError, match=r"not UTF-8 text \(byte 0xe9 at 3\)"):
        read_utf8(tmp_path / "a.txt")


def _npy(a: np.ndarray, path: Path) -> None:
    np.save(path, a, allow_pickle=True)


def _npz(path: Path) -> None:
    with path.open("wb") as f:
        np.savez(f, a=ROWS)


_HUGE = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (900000000000, 9), }"
ODD_NPY: dict[str, Callable[[Path], object]] = {
    "npz": _npz,
    "broken header": lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x0a\x00{'a': (\n\n\n"),
    "like a zip": lambda p: p.write_bytes(b"PK\x03\x04abc"),
    "empty file": lambda p: p.write_bytes(b""),
    "pickle": lambda p: p.write_bytes(b"\x80\x04N."),
    "larger than the file": lambda p: p.write_bytes(_HUGE.ljust(127) + b"\n" + bytes(64)),
    "deep header": lambda p: p.write_bytes(
        b"\x93NUMPY\x01\x00\xff\x20" + (b"(" * 8000).ljust(0x20FF)
    ),
    "objects": lambda p: _npy(np.array([[None, 1]], object), p),
    "records": lambda p: _npy(np.zeros((2, 2), [("a", "f4")]), p),
    "texts": lambda p: _npy(np.array([["a", "b"]]), p),
    "dates": lambda p: _npy(np.zeros((2, 2), "M8[s]"), p),
    "complex": lambda p: _npy(ROWS * 1j, p),
    "no rows": lambda p: _npy(np.zeros((0, 4), np.float32), p),
    "no columns": lambda p: _npy(np.zeros((4, 0), np.float32), p),
    "three axes": lambda p: _npy(np.ones((2, 3, 4)), p),
    "infinite in float32": lambda p: _npy(np.full((2, 3), 1e300), p),
}


@pytest.mark.parametrize("kind", ODD_NPY)
def test_an_odd_npy_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    ODD_NPY[kind](path)
    for read in (load, activations.load):
        with pytest.raises(FileError, match=r"a\.npy") as err:
            read(path)
        assert "\n" not in str(err.value)


@pytest.mark.parametrize("kind", ["<f2", ">f4", ">f8", "<i4", "u1", "?"])
def test_any_real_numbers_of_a_npy_are_read(kind: str, tmp_path: Path) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(kind)
    for order in ("C", "F"):
        np.save(tmp_path / "a.npy", np.asarray(array, order=order))
        np.testing.assert_array_equal(load(tmp_path / "a.npy")[1], [1, 0, 1])
        np.testing.assert_array_equal(activations.load(tmp_path / "a.npy")[0], [0, 1, 1])


def test_numbers_that_are_not_real(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"direction.1": np.ones(4, np.complex64)}, path)
    with pytest.raises(FileError, match="complex64, which are not real"):
        load(path)
    save_file({"resid_post.1": np.ones((2, 4), np.complex64)}, path)
    with pytest.raises(FileError, match="complex64, which are not real"):
        activations.load(path)


# -- what mia remembers ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "5", '{"', "[" * 100_000, "\udcff"])
def test_a_damaged_cache_is_made_anew(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    store = tmp_path / "cache" / "hashes.json"
    store.write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf")
    assert len(json.loads(store.read_text())) == 1


def test_a_user_without_a_home_has_no_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf")


# -- pipes -------------------------------------------------------------------------------


def test_texts_come_from_a_pipe_but_data_that_is_hashed_does_not(tmp_path: Path) -> None:
    pipe, pair = tmp_path / "p.jsonl", '{"positive": "a", "negative": "b"}'
    os.mkfifo(pipe)

    def fed(read: Callable[[], object], text: str) -> object:
        feeder = threading.Thread(target=pipe.write_text, args=(text,))
        feeder.start()
        try:
            return read()
        finally:
            feeder.join()

    assert fed(lambda: read_lines(pipe), "one\ntwo\n") == {1: "one", 2: "two"}
    with pytest.raises(FileError, match="not a regular file"):
        fed(lambda: select_pairs(pipe), pair)


@pytest.mark.parametrize("name", ["n" * 300, "nul\0", "half\ud800", "bytes\udcff"])
def test_data_of_names_that_are_none(name: str) -> None:
    with pytest.raises(FileError, match="there is no file"):
        read_lines(name)
