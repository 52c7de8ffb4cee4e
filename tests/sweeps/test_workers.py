"""A sweep on dask workers: the same file, also when one of them dies half-way."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from lora_file import write_lora
from tiny import Tiny

from mia.errors import EngineError, UsageError
from mia.methods.sweep import sweep
from mia.sweeps.experiments import Ablation, Patching
from mia.sweeps.workers import Opened
from mia.vectors import Vector

METRIC = """
import os, time
def first(logits):
    time.sleep(float(os.environ.get("DELAY", 0)))
    return float(logits[-1, 5])
"""


@contextlib.contextmanager
def process(*words: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A part of a cluster, and what it says."""
    argv = [sys.executable, "-m", *words, "--no-dashboard"]
    with subprocess.Popen(
        argv, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stderr is not None
            yield child, child.stderr
        finally:
            child.kill()


def heard(stream: IO[str], pattern: str) -> str:
    for line in stream:
        if match := re.search(pattern, line):
            return match[1]
    raise AssertionError(f"nothing said {pattern}")


@pytest.mark.slow
def test_a_worker_that_dies_loses_nothing(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "delayed_metric.py").write_text(METRIC)
    monkeypatch.syspath_prepend(tmp_path)
    clean, corrupted = llama.prompt(6, seed=4), llama.prompt(6, seed=5)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"

    def run(rows: Path, dask: str | None = None) -> object:
        return sweep(
            llama.model,
            clean,
            Patching(corrupted),
            over="layer,token,neuron",
            neurons="0..5",
            metric="delayed_metric:first",
            memory=100_000,
            rows=rows,
            dask=dask,
        )

    run(whole)
    env = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}", "DELAY": "0.02"}
    scheduler = "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"
    with process(*scheduler, **env) as (_, said), contextlib.ExitStack() as stack:
        address = heard(said, r"Scheduler at: +(tcp://\S+)")
        worker = ("distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1")
        first, second = (
            stack.enter_context(process(*worker, "--name", name, **env)) for name in "ab"
        )
        for _, stderr in (first, second):
            heard(stderr, "(Registered to)")
        import threading

        def kill() -> None:
            while not path.exists() or path.stat().st_size < whole.stat().st_size / 3:
                time.sleep(0.005)
            first[0].kill()

        threading.Thread(target=kill, daemon=True).start()
        run(path, address)
        assert first[0].wait(5) < 0 and second[0].poll() is None
    assert path.read_bytes() == whole.read_bytes()


def test_there_is_no_cluster(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("mia.sweeps.workers._TIMEOUT", 0.3)
    with pytest.raises(EngineError, match=r"there is no dask scheduler at tcp://127\.0\.0\.1:9"):
        sweep(
            llama.model,
            llama.prompt(4),
            Patching(llama.prompt(4, seed=5)),
            dask="tcp://127.0.0.1:9",
        )
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r'workers need dask: pip install "mia\[dask\]"'):
        sweep(
            llama.model,
            llama.prompt(4),
            Patching(llama.prompt(4, seed=5)),
            dask="tcp://127.0.0.1:9",
        )


def test_a_worker_opens_the_same_model(llama: Tiny, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a.gguf", llama.oracle)
    with (
        llama.model.reopened(lora={adapter: 0.5}, bos=False, flash=False) as m,
        Opened.of(m, "key").open() as other,
    ):
        assert other.facts.document() == m.facts.document()
        assert (other.adds_bos, other.fuses) == (False, False)
        opened = Opened.of(m, "key")
    write_lora(adapter, llama.oracle, seed=1)
    with pytest.raises(UsageError, match=r"a\.gguf is another file on the worker"):
        opened.open()


def test_workers_have_no_standing_edits(llama: Tiny) -> None:
    pytest.importorskip("distributed")
    with (
        llama.model.steered(Vector({1: llama.vector()})),
        pytest.raises(UsageError, match="standing edits cannot be swept on workers"),
    ):
        sweep(llama.model, llama.prompt(4), Ablation(), dask="tcp://127.0.0.1:9")
