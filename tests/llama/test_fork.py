"""Forked processes: what they can do is right, and what they cannot is refused at once."""

import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from children import in_child
from tiny import Tiny

from mia.llama.library import Library, library
from mia.model import Model
from mia.request import Request

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # Python 3.12's, for threads
]


def logits(m: Model) -> list[float]:
    result = m.run([Request([5, 6, 7])])[0]
    assert result.logits is not None
    return [float(x) for x in result.logits.ravel()]


@pytest.fixture
def parent() -> Iterator[Library]:
    """The library as if it had run one thread only so far."""
    lib = library()
    before, lib._threads = lib._threads, 1
    yield lib
    lib._threads = max(before, lib._threads)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mia.llama.c_numbers.processors", lambda: 2)


def test_with_one_thread_a_child_is_right(llama: Tiny, parent: object) -> None:
    with Model(llama.path, threads=1) as m:
        here = logits(m)
        assert in_child(lambda: np.abs(np.subtract(logits(m), here)).max()) == "0.0"

        def own() -> object:
            with Model(llama.path, threads=1) as other:
                return np.abs(np.subtract(logits(other), here)).max()

        assert in_child(own) == "0.0"
        m.close()


def test_after_two_threads_a_child_is_told(llama: Tiny, two: None) -> None:
    with Model(llama.path, threads=2) as m:
        here = logits(m)
        said = in_child(lambda: logits(m))
        assert "forked from one in which llama.cpp ran 2 threads" in said, said
        assert said.startswith("EngineError") and 'multiprocessing\'s "spawn"' in said

        def own(threads: int) -> object:
            with Model(llama.path, threads=threads) as other:
                return np.abs(np.subtract(logits(other), here)).max() < 1e-4

        assert "would wait for them for ever" in in_child(lambda: own(2))
        assert in_child(lambda: own(1)) == "True"
        assert logits(m) == here  # the parent goes on


def test_a_child_does_not_free_what_is_its_parents(llama: Tiny) -> None:
    m = Model(llama.path, threads=1)
    here = logits(m)

    def close() -> str:
        m.close()
        return "closed"

    assert in_child(close) == "closed"
    assert logits(m) == here
    m.close()


def test_a_fork_while_another_thread_decodes_is_refused(llama: Tiny, parent: object) -> None:
    with Model(llama.path, threads=1) as m, Model(llama.path, threads=1) as busy:
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                busy.run([Request([5] * 200, logits="all")])

        worker = threading.Thread(target=work)
        worker.start()
        try:
            said = ""
            for _ in range(50):  # the fork may fall between two decodes
                time.sleep(0.003)
                said = in_child(lambda: logits(m) and "right")
                if said != "right":
                    break
        finally:
            over.set()
            worker.join()
        assert "llama.cpp was at work" in said


def test_a_fork_that_follows_a_gpu_is_refused(llama: Tiny, parent: Library) -> None:
    with Model(llama.path, threads=1) as m:
        logits(m)
        parent._on_device = True
        try:
            assert "used a GPU" in in_child(lambda: logits(m))
        finally:
            parent._on_device = False
