"""What the library gave is freed once, by `close()` or when it is dropped, and not used afterwards."""

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.errors import UsageError
from mia.llama.library import library
from mia.model import Model
from mia.request import Capture, Request, Sampling


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The library's functions that free something, as they are called."""
    calls: list[str] = []
    L = library().L
    gc.collect()  # what earlier tests have dropped

    def counted(name: str) -> Callable[[Any], None]:
        plain = getattr(L, name)

        def call(pointer: Any) -> None:
            calls.append(name)
            plain(pointer)

        return call

    for name in ("llama_free", "llama_model_free"):
        monkeypatch.setattr(L, name, counted(name))
    return calls


USES: dict[str, Callable[[Model], object]] = {
    "tokenize": lambda m: m.tokenize("The cat"),
    "piece": lambda m: m.piece(5),
    "detokenize": lambda m: m.detokenize([5, 6]),
    "token_id": lambda m: m.token_id("The"),
    "continuation": lambda m: m.continuation("The", " cat"),
    "text": lambda m: m.text([5, 6]),
    "token_rows": lambda m: m.token_rows([5, 6]),
    "chat": lambda m: m.chat("hello"),
    "bos_token": lambda m: m.bos_token,
    "adds_bos": lambda m: m.adds_bos,
    "tokenizer_hash": lambda m: m.tokenizer_hash,
    "run": lambda m: m.run([Request([5, 6])]),
    "a run that captures": lambda m: m.run([Request([5, 6], captures=[Capture("embed")])]),
    "generate": lambda m: m.generate([5, 6], 2, sampling=Sampling(temperature=1.0)),
    "topology": lambda m: m.topology,
    "lens": lambda m: m.lens,
    "look": lambda m: m.look("The cat"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("used", [False, True])
def test_a_closed_model_says_so(llama: Tiny, use: Callable[[Model], object], used: bool) -> None:
    m = Model(llama.path, threads=1)
    if used:
        m.run([Request([5, 6]), Request([5, 7], captures=[Capture("embed")])])
    m.close()
    with pytest.raises(UsageError, match="this model is closed; open it again to use it"):
        use(m)
    m.close()  # again is no error


def test_a_topology_outlives_its_model(llama: Tiny) -> None:
    with Model(llama.path, threads=1) as m:
        topology = m.topology
    weights = [topology.node(s).name for n in topology.nodes for s in n.src if topology.is_leaf(s)]
    assert "blk.0.attn_norm.weight" in weights


def test_a_dropped_model_is_freed(llama: Tiny, freed: list[str], tmp_path: Path) -> None:
    m = Model(llama.path, threads=1)
    m.run([Request([5, 6]), Request([5, 7], captures=[Capture("l_out")])])
    m.run([Request([5, 6])])
    m.look([5, 6]).save(tmp_path / "a.safetensors")
    facts, generation, lens = m.facts, m.generate([5, 6], 2), m.lens
    assert facts.n_layer == 3 and len(generation.tokens)
    del m
    gc.collect()
    assert freed == []  # the lens reads tokens' texts
    del lens
    gc.collect()
    assert freed == ["llama_free", "llama_free", "llama_model_free"]


def test_a_closed_model_is_freed_once(llama: Tiny, freed: list[str]) -> None:
    with Model(llama.path, threads=1) as m:
        m.run([Request([5, 6])])
    assert freed == ["llama_free", "llama_model_free"]
    del m
    gc.collect()
    assert len(freed) == 2


def test_models_in_a_cycle_are_freed_in_order(llama: Tiny, freed: list[str]) -> None:
    models = [Model(llama.path, threads=1) for _ in range(3)]
    for m in models:
        m.run([Request([5, 6])])
        m.others = models  # type: ignore[attr-defined]
    del m, models
    gc.collect()
    assert sorted(freed) == ["llama_free"] * 3 + ["llama_model_free"] * 3
    for i in range(6):  # no model before its context
        assert freed[: i + 1].count("llama_free") >= freed[: i + 1].count("llama_model_free")


def test_a_running_model_is_not_closed(llama: Tiny) -> None:
    m = Model(llama.path, threads=1)
    errors: list[str] = []

    def close(h: np.ndarray) -> np.ndarray:
        for run in (m.close, lambda: threading.Thread(target=other).run()):
            with pytest.raises(UsageError, match="the model is in the middle of a run"):
                run()
        errors.append("seen")
        return h

    def other() -> None:
        m.close()

    m.run([Request([5, 6], edits=[Edit("l_out-1", close)])])
    assert errors == ["seen"]
    m.close()


@pytest.mark.parametrize(
    "end",
    [
        "",
        "m.cycle = m",
        "del m",
        "m.close()",
        "import sys; sys.exit(0)",
        # a thread that is inside the library at the end
        "threading.Thread(target=lambda: [m.run([Request([5] * 200)] * 9) for _ in range(999)],"
        " daemon=True).start(); time.sleep(.2)",
    ],
)
def test_a_process_ends_cleanly(llama: Tiny, end: str) -> None:
    code = (
        "import threading, time; from mia.model import Model; from mia.request import Capture, Request\n"
        f"m = Model({str(llama.path)!r}, threads=1)\n"
        "m.run([Request([5, 6]), Request([5, 7], captures=[Capture('l_out')])])\n" + end
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_stays_flat_without_close(llama: Tiny) -> None:
    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def use() -> None:
        Model(llama.path, threads=1).run([Request([5] * 100, captures=[Capture("l_out")])])
        gc.collect()

    for _ in range(3):
        use()
    before = megabytes()
    for _ in range(10):
        use()
    assert megabytes() - before < 20  # one context has buffers of several megabytes
