"""Ctrl-C at any moment stops what runs, and is never lost in a callback."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.llama.interrupts import Held
from mia.llama.library import library
from mia.model import Model
from mia.request import Capture, Request

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no signals")


@pytest.fixture
def at_log() -> Iterator[Callable[[signal.Signals], None]]:
    """Sends a signal while llama.cpp is in its log callback, once."""
    lib = library()
    due: list[signal.Signals] = []

    def log(level: int, text: bytes, data: Any) -> None:
        while due:
            signal.raise_signal(due.pop())
        lib._on_log(level, text, data)

    callback = lib.L.llama_log_callback(log)
    lib.L.llama_log_set(callback, None)
    yield due.append
    lib.L.llama_log_set(lib._log, None)
    assert not due


def test_a_load_is_stopped(llama: Tiny, at_log: Callable[[signal.Signals], None]) -> None:
    at_log(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Model(llama.path, threads=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with Model(llama.path, threads=1) as m:
        assert m.n_layer == 3


@pytest.mark.parametrize("captures", [[], [Capture("embed")]])
def test_opening_a_context_is_stopped(
    llama: Tiny, at_log: Callable[[signal.Signals], None], captures: list[Capture]
) -> None:
    request = Request([5, 6], captures=captures)
    with Model(llama.path, threads=1) as m:
        at_log(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            m.run([request])
        expected = logits(llama.model.run([request])[0])
        assert (logits(m.run([request])[0]) == expected).all()


def test_a_handler_of_the_programs_own_is_heard(
    llama: Tiny, at_log: Callable[[signal.Signals], None]
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    heard: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        old = signal.signal(number, stop)
        try:
            at_log(number)
            with pytest.raises(Stop):
                Model(llama.path, threads=1)
            signal.signal(number, lambda n, _: heard.append(n))
            at_log(number)
            Model(llama.path, threads=1).close()  # this one raises nothing: the load goes on
        finally:
            signal.signal(number, old)
    assert heard == [signal.SIGINT, signal.SIGTERM]


def test_an_error_comes_before_an_interrupt_and_the_handler_is_put_back() -> None:
    with pytest.raises(ValueError, match="first"), Held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("first")
    with pytest.raises(KeyboardInterrupt), Held() as outer:
        with Held() as inner:
            signal.raise_signal(signal.SIGINT)
        assert inner.error is None and isinstance(outer.error, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def command(*arguments: str, home: Path) -> "subprocess.Popen[str]":
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        [sys.executable, "-m", "mia", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def left_beside(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob(".mia-*")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_ends_a_command(tmp_path: Path, number: signal.Signals) -> None:
    """Exit 130 and one line, or death by SIGTERM. Before mia's own code runs, Python decides."""
    model = write_tiny(tmp_path / "m.gguf", "llama", n_layer=3)
    out = tmp_path / "out.json"
    long = ["run", "-m", str(model), "-t", "1", "-p", "the", "-n", "200", "--ablate", "1.0"]
    began = time.monotonic()
    with command(*long, "-o", str(out), home=tmp_path) as whole:
        assert whole.wait() == 0, whole.stderr
    took = time.monotonic() - began
    out.unlink()
    rng = random.Random(number)
    for _ in range(20):
        delay = rng.uniform(0.05 * took, took)
        with command(*long, "-o", str(out), home=tmp_path) as process:
            time.sleep(delay)
            process.send_signal(number)
            try:
                stdout, stderr = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                pytest.fail(f"goes on after a signal at {delay:.2f} of {took:.2f} s")
        done = out.exists()
        assert stdout == ""
        starting = process.returncode == 1 and "Fatal Python error: init" in stderr
        if process.returncode == -number or starting:  # before mia's own code ran, or after it
            assert "/mia/" not in re.sub(r"/mia/__(init|main)__\.py", "", stderr), stderr
        else:
            assert process.returncode in (0, 130) and "Traceback" not in stderr, stderr
        assert left_beside(tmp_path) == (
            set() if number == signal.SIGINT else left_beside(tmp_path)
        )
        assert done or process.returncode != 0
        if done:
            assert out.read_text().endswith("}\n")
            out.unlink()
