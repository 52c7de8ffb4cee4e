"""Whether blocks' inputs may be kept: the list, the child process, and what is remembered."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Tiny

from mia.llama import child, layer_inputs

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MIA_LAYER_INPUTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layer_inputs._verdict.cache_clear()


def _remembered() -> dict[str, bool]:
    file = Path(os.environ["XDG_CACHE_HOME"]) / "mia" / "layer_inputs.json"
    verdicts: dict[str, bool] = json.loads(file.read_text()) if file.exists() else {}
    return {key.split()[-1]: verdict for key, verdict in verdicts.items()}


def _child_is(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    layer_inputs._verdict.cache_clear()
    monkeypatch.setattr(layer_inputs, "_command", lambda path: [sys.executable, "-c", code])


def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_inputs._verdict.cache_clear()
    monkeypatch.setattr(layer_inputs, "_command", lambda path: pytest.fail("a child was started"))


def test_a_child_that_lives_is_asked_once(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer_inputs.can_keep_inputs(llama.model._llama)
    assert _remembered() == {"llama": True}
    _no_child(monkeypatch)  # as in the next process
    assert layer_inputs.can_keep_inputs(llama.model._llama)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_child_really_dies_where_the_graph_does_not_name_them(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("gpt2")
    outcome = child.run(layer_inputs._command(str(t.path)))
    assert outcome.death == "SIGABRT" and "layer input tensor is null" in outcome.err
    assert not layer_inputs.can_keep_inputs(t.model._llama)  # it is not on the list
    assert _remembered() == {}
    everything = layer_inputs.ARCHITECTURES | {"gpt2"}
    monkeypatch.setattr(layer_inputs, "ARCHITECTURES", everything)  # and if it were
    assert not layer_inputs.can_keep_inputs(t.model._llama)
    assert _remembered() == {"gpt2": False}


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_crash_is_remembered(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    _child_is(monkeypatch, CRASH)
    assert not layer_inputs.can_keep_inputs(llama.model._llama)
    assert _remembered() == {"llama": False}
    _no_child(monkeypatch)
    assert not layer_inputs.can_keep_inputs(llama.model._llama)


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(1)",
        "import time; time.sleep(60)",
        *(
            pytest.param(
                CRASH.replace("SIGABRT", name),
                marks=pytest.mark.skipif(sys.platform == "win32", reason="no signals"),
            )
            for name in ("SIGKILL", "SIGTERM", "SIGINT")
        ),
    ],
)
def test_trouble_of_another_kind_is_not_remembered(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(layer_inputs, "_SECONDS", 0.3)
    _child_is(monkeypatch, code)
    assert not layer_inputs.can_keep_inputs(llama.model._llama)
    assert _remembered() == {}


def test_a_child_that_cannot_start(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layer_inputs, "_command", lambda path: [str(tmp_path / "no-python")])
    assert not layer_inputs.can_keep_inputs(llama.model._llama)
    assert _remembered() == {}


def test_another_build_is_asked_anew(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "_key", lambda architecture: f"first {architecture}")
    _child_is(monkeypatch, CRASH)
    assert not layer_inputs.can_keep_inputs(llama.model._llama)
    monkeypatch.setattr(layer_inputs, "_key", lambda architecture: f"second {architecture}")
    _child_is(monkeypatch, "pass")
    assert layer_inputs.can_keep_inputs(llama.model._llama)


def test_without_the_function_or_by_hand_nothing_is_asked(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_child(monkeypatch)
    with monkeypatch.context() as m:
        m.setattr(layer_inputs, "keep_function", lambda: None)
        assert not layer_inputs.can_keep_inputs(llama.model._llama)
    monkeypatch.setenv("MIA_LAYER_INPUTS", "0")
    assert not layer_inputs.can_keep_inputs(llama.model._llama)
