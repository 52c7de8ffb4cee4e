"""Files that are written whole or not at all, and what a killed process leaves behind."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mia.errors import FileError
from mia.io import files
from mia.io.files import cache_folder, file_sha256, sweep, write_json, write_whole


@pytest.fixture(autouse=True)
def _not_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swept", set())


def content(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(p: Path) -> None:
        p.write_text("half")
        raise error

    expected = FileError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected) as caught:
        write_whole(path, write)
    if expected is FileError:
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert content(tmp_path) == {"a.txt": "old"}


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 250 + ".json")
    write_json(path, 1)
    assert content(tmp_path) == {path.name: "1\n"}
    with pytest.raises(FileError, match="File name too long"):
        write_json(tmp_path / ("a" * 260), 1)
    assert len(content(tmp_path)) == 1


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def temporary(folder: Path, pid: int, age: float, machine: str | None = None) -> Path:
    path = folder / f".mia-{machine or files._machine()}-{pid}-0123abcd.tmp"
    path.write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not asked there")
def test_the_dead_ones_files_are_swept(tmp_path: Path) -> None:
    dead = dead_pid()
    gone = temporary(tmp_path, dead, 120)
    stays = [
        temporary(tmp_path, os.getpid(), 10**6),  # at work
        temporary(tmp_path, 1, 10**6),  # somebody else's process
        temporary(tmp_path, dead, 10**6, machine="00000000"),  # another machine's, on a shared disk
        temporary(tmp_path, 10**30, 10**6),
        tmp_path / ".mia-notes.tmp",
        tmp_path / f".mia-{files._machine()}-{dead}-0123abcd.tmp.gguf",
    ]
    for path in stays[-2:]:
        path.write_text("a user's")
    young = tmp_path / f".mia-{files._machine()}-{dead}-aaaaaaaa.tmp"
    young.write_text("half")
    write_json(tmp_path / "a.json", 1)
    assert set(content(tmp_path)) == {p.name for p in stays} | {"a.json", young.name}
    assert not gone.exists()
    gone.write_text("half")
    os.utime(gone, (0, 0))
    sweep(tmp_path)  # once a process
    assert gone.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_leaves_one_file_that_the_next_sweeps(tmp_path: Path) -> None:
    code = (
        "import os; from mia.io.files import write_whole\n"
        f"write_whole({str(tmp_path / 'a.txt')!r}, lambda p: (p.write_text('half'), os.kill(os.getpid(), 9)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    write_json(tmp_path / "b.json", 2)
    assert content(tmp_path) == {"b.json": "2\n"}


def test_a_folder_that_cannot_be_listed_is_no_error(tmp_path: Path) -> None:
    sweep(tmp_path / "gone")


def test_a_memory_of_hashes_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    for text in ("[1]", "{", "null", '{"a": 1}'):
        store = cache_folder() / "hashes.json"
        store.parent.mkdir(exist_ok=True)
        store.write_text(text)
        assert file_sha256(file).startswith("ba7816bf")
        store.unlink()
    file.write_bytes(b"")
    assert file_sha256(file).startswith("e3b0c442")


def test_a_text_without_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of a device, or of a pipe that somebody writes for ever."""
    monkeypatch.setattr(files, "MAX_TEXT", 1000)
    (tmp_path / "a.txt").write_text("a" * 1000)
    assert len(files.read_utf8(tmp_path / "a.txt")) == 1000
    (tmp_path / "a.txt").write_text("a" * 1001)
    with pytest.raises(FileError, match="more than 1000 bytes of text"):
        files.read_utf8(tmp_path / "a.txt")
    if Path("/dev/zero").exists():
        with pytest.raises(FileError, match="more than 1000 bytes of text"):
            files.read_utf8("/dev/zero")
