"""What a run that is recorded costs, and when."""

import os
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny

from mia.engine.run import Engine
from mia.io import files, runs
from mia.io.runs import Run
from mia.model import Model
from mia.request import Request


def test_the_file_is_hashed_when_the_work_is_done(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash of a large file takes longer than opening it."""
    order: list[str] = []
    hash_file, run = files.open_file_sha256, Engine.run

    def hashed(file: int, status: os.stat_result, path: Path) -> str:
        if path == llama.path:  # the library's files are hashed too
            order.append("hash")
        return hash_file(file, status, path)

    def ran(self: Engine, *args: Any, **named: Any) -> Any:
        order.append("run")
        return run(self, *args, **named)

    monkeypatch.setattr(files, "open_file_sha256", hashed)
    monkeypatch.setattr(Engine, "run", ran)
    recorded = Run("run")
    with runs.recorded(recorded), Model(llama.path, threads=1) as model:
        model.run([Request([1, 2, 3])])
    assert order == ["run"]
    document = recorded.document()["model"]
    assert document["sha256"] == files.file_sha256(Path(llama.path))
    assert list(document)[:2] == ["name", "sha256"]
