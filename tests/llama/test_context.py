"""Decodes that fail, and contexts that cannot be."""

import threading
from typing import Any

import numpy as np
import pytest
from reference import check
from tiny import Tiny

from mia.errors import EngineError
from mia.llama import (
    CACHE_TYPES,
    Context,
)
from mia.request import Capture, Request
from mia.sites import Site


def test_what_the_library_refuses_is_an_engine_error(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    t.model.run([Request([1, 2, 3], captures=[Capture("embed")])])
    (session,) = t.model._engine.sessions.open.values()
    context = session.context
    context.clear()
    full = np.arange(256, dtype=np.int32)
    one, none = np.ones(1, np.int32), np.zeros(256, np.int8)
    context.decode(full, full, np.zeros(256, np.int32), none)
    with pytest.raises(EngineError, match="257 rows are more than the 256 of a micro-batch"):
        context.decode(*(np.zeros(257, np.int32) for _ in range(4)))
    with pytest.raises(EngineError, match="the context of 256 tokens is full"):
        context.decode(one, np.array([256], np.int32), 0 * one, none[:1])
    with pytest.raises(EngineError, match=r"failed to decode \(-1\): .*seq"):
        context.decode(one, np.array([2], np.int32), 0 * one, none[:1])
    with monkeypatch.context() as m:
        m.setattr(context.lib.L, "llama_set_adapter_cvec", lambda *_: -1)
        with pytest.raises(EngineError, match="refuses the control vector"):
            context.set_control_vector(np.ones((2, 48), np.float32))
    check(t.model.run([Request([1, 2])])[0], Request([1, 2]), t.oracle)


def test_runs_in_another_thread(llama: Tiny) -> None:
    """Signals belong to the main thread; elsewhere a decode does without them."""
    request, results = Request(llama.prompt(), captures=[Capture("l_out")]), []
    worker = threading.Thread(target=lambda: results.extend(llama.model.run([request])))
    worker.start()
    worker.join()
    check(results[0], request, llama.oracle)


def test_a_context_that_cannot_be_is_an_engine_error(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    model = t.model._llama
    monkeypatch.setattr(model.lib.L, "llama_init_from_model", lambda *_: None)
    with pytest.raises(EngineError, match="cannot open a context of 256 tokens"):
        t.model.run([Request([1, 2])])
    monkeypatch.undo()
    check(t.model.run([Request([1, 2])])[0], Request([1, 2]), t.oracle)
    assert isinstance(next(iter(t.model._engine.sessions.open.values())).context, Context)
    assert Site("logits") in t.model.topology.sites


def test_the_registry_and_the_library_know_the_same_cache_types() -> None:
    from mia.models import registry

    assert set(registry.KV_TYPES) == set(CACHE_TYPES)
