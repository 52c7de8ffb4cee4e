"""Who may use a model when: threads take turns, and a run cannot be called from inside itself."""

import asyncio
import contextlib
import gc
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, logits

from mia.edits import Edit
from mia.errors import UsageError
from mia.hooks import Hook
from mia.model import Model
from mia.request import Capture, Request, Sampling
from mia.sites import Site

INSIDE = "the model is in the middle of a run"


def _prompts(t: Tiny, n: int, k: int = 9) -> list[list[int]]:
    return [t.prompt(k, seed=100 + i) for i in range(n)]


def _nested(t: Tiny, what: str, act: Callable[[], object]) -> list[Any]:
    """A run of several requests, one of which calls `act` in the middle."""
    base = t.prompt(12)
    others = [Request([*base, *p]) for p in _prompts(t, 6, 5)]

    def inside(rows: Any) -> Any:
        act()
        return rows.copy()

    if what == "metric":
        return t.model.run([Request(base, metric=inside), *others])
    if what == "edit":
        return t.model.run([Request(base, edits=[Edit("l_out-1", inside)]), *others])
    if what == "hook":

        class Asks(Hook):
            sites = "l_out-0"

            def change(self, site: Site, rows: Any) -> Any:
                act()
                return rows

        return Asks().run(t.model, [Request(base), *others])
    return t.model.run([Request(base), *others], progress=lambda done, total: (act(), None)[1])


@pytest.mark.parametrize("what", ["metric", "edit", "hook", "progress"])
@pytest.mark.parametrize("how", ["run", "capture", "generate", "close", "lens"])
def test_a_run_inside_a_run_is_refused(
    llama: Tiny, reopen: Callable[..., Tiny], what: str, how: str
) -> None:
    t = reopen(llama)
    other = t.prompt(7, seed=3)
    acts: dict[str, Callable[[], object]] = {
        "run": lambda: t.model.run([Request(other)]),
        "capture": lambda: t.model.look(other),
        "generate": lambda: t.model.generate(other, 2),
        "close": t.model.close,
        "lens": lambda: t.model.lens,
    }
    with pytest.raises(UsageError, match=INSIDE):
        _nested(t, what, acts[how])
    truth = llama.model.run([Request(other)])[0]
    np.testing.assert_array_equal(logits(t.model.run([Request(other)])[0]), logits(truth))


@pytest.mark.parametrize("what", ["metric", "edit", "progress"])
def test_a_run_that_gets_over_it_is_right(llama: Tiny, what: str) -> None:
    """The call that is refused has changed nothing."""

    def try_it() -> None:
        with pytest.raises(UsageError, match=INSIDE):
            llama.model.run([Request(llama.prompt(7, seed=3))])

    got, truth = _nested(llama, what, try_it), _nested(llama, what, lambda: None)
    for a, b in zip(got, truth, strict=True):
        both = [(x.value if x.logits is None else x.logits) for x in (a, b)]
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    "error", [ValueError, StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit]
)
@pytest.mark.parametrize("what", ["metric", "edit", "hook", "progress"])
def test_an_exception_arrives_as_itself(llama: Tiny, what: str, error: type[BaseException]) -> None:
    own = error("mine")

    def fail() -> None:
        raise own

    with pytest.raises(error) as caught:
        _nested(llama, what, fail)
    assert caught.value is own
    request = Request(llama.prompt(5))
    np.testing.assert_allclose(
        logits(llama.model.run([request])[0])[0],
        llama.oracle.run(llama.prompt(5))["logits"][-1],
        atol=2e-4,
    )


def test_callbacks_may_ask_what_the_graph_has(llama: Tiny) -> None:
    seen: list[int] = []
    _nested(llama, "edit", lambda: seen.append(len(llama.model.topology.sites)))
    assert seen == [len(llama.model.topology.sites)]


def _in_threads(works: list[Callable[[], None]]) -> None:
    """Runs all of them at once; raises what one of them raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=run, args=(w,)) for w in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def _many(t: Tiny, i: int) -> list[Request]:
    prompts = _prompts(t, 4, 5 + i)
    edit = Edit("resid_post.1", "add", t.vector(seed=i), tokens=-1)
    return [
        *(Request(p, captures=[Capture(f"l_out-{i % 2}")]) for p in prompts),
        *(Request(p, [edit]) for p in prompts),
        Request(prompts[0], n_predict=4, sampling=Sampling(temperature=1.0, seed=i)),
    ]


def _same(t: Tiny, requests: list[Request], truth: list[Any], rounds: int = 8) -> None:
    for _ in range(rounds):
        for got, want in zip(t.model.run(requests), truth, strict=True):
            np.testing.assert_allclose(logits(got), logits(want), atol=1e-4)
            assert got.tokens == want.tokens


@pytest.mark.parametrize("n", [2, 4])
def test_threads_take_turns(llama: Tiny, n: int) -> None:
    works: list[Callable[[], None]] = []
    for i in range(n):
        requests = _many(llama, i)
        truth = llama.model.run(requests)
        works.append(partial(_same, llama, requests, truth))
    _in_threads(works)


def test_two_models_run_side_by_side(llama: Tiny, reopen: Callable[..., Tiny]) -> None:
    works: list[Callable[[], None]] = []
    for i in range(3):
        t = reopen(llama)
        requests = _many(llama, i)
        truth = llama.model.run(requests)
        works.append(partial(_same, t, requests, truth))
    _in_threads(works)


def test_models_open_and_close_in_threads(llama: Tiny) -> None:
    requests = _many(llama, 0)
    truth = llama.model.run(requests)

    def work() -> None:
        for _ in range(4):
            with Model(llama.path, threads=1) as model:
                _same(Tiny("again", llama.path, model), requests, truth, rounds=1)

    _in_threads([work] * 3)


def test_asyncio(llama: Tiny) -> None:
    requests = [Request(p) for p in _prompts(llama, 8)]
    truth = [llama.model.run([r])[0] for r in requests]

    async def all_at_once() -> list[Any]:
        tasks = [asyncio.to_thread(llama.model.run, [r]) for r in requests]
        return list(await asyncio.gather(*tasks))

    for got, want in zip(asyncio.run(all_at_once()), truth, strict=True):
        np.testing.assert_allclose(logits(got[0]), logits(want), atol=1e-4)


def test_close_waits_for_the_run(llama: Tiny, reopen: Callable[..., Tiny]) -> None:
    t = reopen(llama)
    prompts = _prompts(t, 6)
    truth = llama.model.run([Request(p) for p in prompts])
    begun, order = threading.Event(), []

    def metric(rows: Any) -> Any:
        begun.set()
        threading.Event().wait(0.05)  # the other thread has time to ask
        return rows.copy()

    def run() -> None:
        results = t.model.run([Request(p, metric=metric) for p in prompts])
        order.append("run")
        for got, want in zip(results, truth, strict=True):
            np.testing.assert_allclose(got.value, logits(want), atol=1e-4)

    def close() -> None:
        assert begun.wait(30)
        t.model.close()
        order.append("closed")

    _in_threads([run, close])
    assert order == ["run", "closed"]
    with pytest.raises(UsageError, match="model is closed"):
        t.model.run([Request(prompts[0])])
    with pytest.raises(UsageError, match="model is closed"):
        _ = t.model.topology


def test_ctrl_c_at_any_moment_lets_the_next_run_in(
    llama: Tiny, reopen: Callable[..., Tiny]
) -> None:
    t = reopen(llama)
    request = Request(t.prompt(9), captures=[Capture("l_out")])
    truth = logits(t.model.run([request])[0])
    main = threading.get_ident()
    gc.collect()
    gc.disable()  # Python drops a Ctrl-C that comes while what an earlier test has left is freed
    try:
        for i in range(60):
            hit = threading.Timer(0.0002 * i, lambda: signal.pthread_kill(main, signal.SIGINT))
            with contextlib.suppress(KeyboardInterrupt):
                hit.start()
                for _ in range(8):
                    t.model.run([request])
            with contextlib.suppress(KeyboardInterrupt):
                hit.join()
            np.testing.assert_allclose(logits(t.model.run([request])[0]), truth, atol=1e-5)
    finally:
        gc.enable()
