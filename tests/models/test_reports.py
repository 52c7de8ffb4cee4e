"""What `mia models` reports, from Python."""

from pathlib import Path

import pytest
from tiny import Tiny

from mia import progress
from mia.errors import FileError, UsageError
from mia.model import Model
from mia.models import registry, reports


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
