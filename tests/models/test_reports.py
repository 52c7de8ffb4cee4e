"""What `mia models` reports, from Python."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import Tiny

import mia
from mia import progress
from mia.errors import FileError, UsageError
from mia.llama import child
from mia.model import Model
from mia.models import registry, reports

ROOT = Path(mia.__file__).parents[1]


def test_models_by_name(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models.toml").write_text(f'[mine]\npath = "{llama.path}"\n[gone]\npath = "no.gguf"\n')
    report = reports.models()
    rows = {r["name"]: r for r in report.rows()}
    assert rows["mine"]["present"] and rows["mine"]["bytes"] == llama.path.stat().st_size
    assert not rows["gone"]["present"] and rows["gone"]["path"] is None
    assert report.document() == {"models": report.rows()}
    lines = report.plain().splitlines()
    assert lines[0].startswith("mine ") and lines[0].endswith(str(llama.path))
    assert lines[1] == f"{'gone':<20s} {'':11s}  {rows['gone']['problem']}"


def test_a_download_shows_its_progress_where_progress_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def pull(name: str, *, progress: bool) -> Path:
        asked.append(progress)
        return tmp_path / f"{name}.gguf"

    monkeypatch.setattr(registry, "pull", pull)
    report = reports.pull("qwen")
    progress.show_progress()
    reports.pull("qwen")
    progress.show_progress(False)
    assert asked == [False, True]
    assert report.document() == {"name": "qwen", "path": str(tmp_path / "qwen.gguf")}
    assert str(report) == str(tmp_path / "qwen.gguf")


def test_a_conversion_is_a_model(llama: Tiny, tmp_path: Path) -> None:
    file = str(tmp_path / "half.gguf")
    report = reports.convert(str(llama.path), "f16", file)
    assert report.bytes == Path(file).stat().st_size < llama.path.stat().st_size
    assert report.document() == {"file": file, "type": "f16", "bytes": report.bytes}
    with Model(file, threads=1) as m:
        assert m.tokenizer_hash == llama.model.tokenizer_hash


def test_conversions_that_are_refused(llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown type 'q9'; known: f32"):
        reports.convert(str(llama.path), "q9", str(tmp_path / "x.gguf"))
    with pytest.raises(UsageError, match="is the model itself"):
        reports.convert(str(llama.path), "f16", str(llama.path))
    with pytest.raises(FileError, match="there is no folder"):
        reports.convert(str(llama.path), "f16", str(tmp_path / "no" / "x.gguf"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limits")
def test_a_full_disk_leaves_nothing(llama: Tiny, tmp_path: Path) -> None:
    """A file that may not grow fails as on a full disk does, in the library's writer too."""
    code = (
        "import resource, sys; from mia.models.reports import convert\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"convert({str(llama.path)!r}, 'f16', 'half.gguf')"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mia.errors.EngineError: llama.cpp cannot convert ") and done.returncode
    assert "to f16: " in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one process")
def test_ctrl_c_stops_a_conversion(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp has no way to stop its quantizer; its process is stopped."""
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(child, "python", lambda *_: endless)
    main = threading.get_ident()
    threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        reports.convert(str(llama.path), "f16", str(tmp_path / "x.gguf"))
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []
