"""Looks run beside the completions: their requests join the stream, and leave it with their client."""

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import hostile
import numpy as np
import pytest
from serving import Client, serving

from mia.edits import Edit
from mia.engine.delegate import delegate
from mia.errors import EngineError, MiaError, UsageError
from mia.model import Model
from mia.request import Capture, LogitDifference, Request, Result
from mia.serve import app, looks
from mia.serve.fields import Refused
from mia.serve.limits import Limits
from mia.serve.scheduler import Scheduler
from mia.serve.workers import Gone

T = TypeVar("T")


def _with(
    model: Model, use: Callable[[Scheduler], Awaitable[T]], limits: Limits | None = None
) -> T:
    """What a coroutine does with a scheduler; nothing of it may be left."""

    async def main() -> T:
        scheduler = Scheduler(model, limits or Limits())
        scheduler.start()
        try:
            got = await use(scheduler)
            for _ in range(500):
                usage = await scheduler.call(scheduler.usage, always=True)
                if not (scheduler.pending or usage.running or usage.waiting):
                    break
                await asyncio.sleep(0.01)
            assert scheduler.pending == usage.running == usage.waiting == 0
            assert usage.cells == usage.sequences == 0
            return got
        finally:
            await asyncio.to_thread(scheduler.stop)
            assert not any(thread.is_alive() for thread in scheduler._pool._threads)

    return asyncio.run(main())


def _requests(model: Model) -> list[Request]:
    ids = model.ids("The cat sat on the mat")
    wide = np.linspace(-1, 1, model.n_embd, dtype=np.float32)
    requests = [
        Request(ids, captures=[Capture("l_out")], logits="all"),
        Request(ids, captures=[Capture(["kq_soft_max-1", "v.0"], [0, -1])], logits=None),
        Request(ids, [Edit("l_out-1", "add", wide, tokens=-1)], n_predict=6, logprobs=True),
        Request(ids, [Edit("l_out-0", lambda rows: 0.5 * rows)], [Capture("l_out-2")]),
        Request(ids, metric=LogitDifference(5, 9), logits=[1, 3]),
        Request(ids[:3], metric=lambda logits: float(logits.sum()), logits="all"),
    ]
    return requests + [Request([*ids, t], [Edit("q.1", "zero", heads=[t % 3])]) for t in range(30)]


def _check_equal(got: list[Result], want: list[Result]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens and a.captures.keys() == b.captures.keys()
        for site, array in b.captures.items():
            np.testing.assert_allclose(a.captures[site], array, rtol=0, atol=1e-5)
        assert (a.logits is None) == (b.logits is None)
        if a.logits is not None and b.logits is not None:
            np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        if b.value is not None:
            np.testing.assert_allclose(a.value, b.value, rtol=1e-4, atol=1e-4)


def test_a_look_has_the_results_of_a_run(model: Model) -> None:
    requests = _requests(model)
    want = model.run(requests)

    def look() -> list[Result]:
        assert delegate() is not None
        assert model.run([]) == []
        return model.run(requests)

    _check_equal(_with(model, lambda s: s.look(look)), want)
    assert delegate() is None


def test_who_listens_is_told(model: Model) -> None:
    requests = _requests(model)[:4]
    tokens: list[int] = []
    results: dict[int, Result] = {}
    progress: list[tuple[int, int]] = []

    def look() -> list[Result]:
        thread = threading.get_ident()

        def hear(i: int, result: Result) -> None:
            assert threading.get_ident() == thread
            results[i] = result

        return model.run(
            requests,
            progress=lambda *done: progress.append(done),
            on_result=hear,
            on_token=lambda i, token: tokens.append(token),
        )

    got = _with(model, lambda s: s.look(look))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert tokens == got[2].tokens and len(tokens) == 6
    assert [results[i] for i in range(4)] == got


def test_looks_at_once(model: Model) -> None:
    requests = _requests(model)
    want = model.run(requests)

    async def several(scheduler: Scheduler) -> list[list[Result]]:
        looks = [scheduler.look(lambda: model.run(requests)) for _ in range(6)]
        return list(await asyncio.gather(*looks))

    for got in _with(model, several, Limits(looks=3)):
        _check_equal(got, want)


def test_more_looks_than_may_wait_are_refused(model: Model) -> None:
    ready = threading.Event()

    async def several(scheduler: Scheduler) -> list[Any]:
        looks = [asyncio.ensure_future(scheduler.look(lambda: ready.wait(10))) for _ in range(4)]
        await asyncio.sleep(0.05)
        ready.set()
        return await asyncio.gather(*looks, return_exceptions=True)

    *others, last = _with(model, several, Limits(looks=1, waiting=3))
    assert others == [True] * 3
    assert isinstance(last, Refused) and last.status == 503


def test_a_completion_goes_on_beside_a_long_look(client: Client, model: Model) -> None:
    ended: list[float] = []
    n_runs = 0

    def look() -> None:
        nonlocal n_runs
        while not stop.is_set():
            model.run([Request([5, 6, 7, 8, *range(3, 60)], logits="all") for _ in range(3)])
            n_runs += 1
        ended.append(time.monotonic())

    stop = threading.Event()
    scheduler = client.server.scheduler
    body: dict[str, Any] = {
        "prompt": "The cat sat",
        "max_tokens": 40,
        "ignore_eos": True,
        "temperature": 0,
    }
    alone = client.choice(**body)["text"]

    async def both() -> str:
        looking = asyncio.ensure_future(scheduler.look(look))
        while not n_runs:
            await asyncio.sleep(0.01)
        before = n_runs
        text = await asyncio.to_thread(lambda: client.choice(**body)["text"])
        assert not looking.done() and n_runs > before  # side by side
        stop.set()
        await looking
        return str(text)

    assert asyncio.run(both()) == alone


@pytest.mark.parametrize("where", ["in a run", "between runs"])
def test_who_leaves_ends_his_look(model: Model, where: str) -> None:
    ended: list[BaseException] = []
    begun, left = threading.Event(), threading.Event()

    def look() -> None:
        try:
            while True:
                if where == "in a run":
                    begun.set()
                    model.run([Request([5, 6], n_predict=1500, stop_at_eog=False)] * 20)
                else:
                    begun.set()
                    left.wait(10)
                    model.run([Request([5, 6])])
        except BaseException as err:
            ended.append(err)
            raise

    async def leave(scheduler: Scheduler) -> None:
        looking = asyncio.ensure_future(scheduler.look(look))
        await asyncio.to_thread(begun.wait)
        await asyncio.sleep(0.05)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        left.set()

    _with(model, leave)
    assert len(ended) == 1 and isinstance(ended[0], Gone)


def test_who_leaves_makes_room_for_looks_that_wait(model: Model) -> None:
    long = [Request([5, 6], n_predict=1500, stop_at_eog=False)] * 50

    async def leave(scheduler: Scheduler) -> list[Result]:
        first = asyncio.ensure_future(scheduler.look(lambda: model.run(long)))
        while not (await scheduler.call(scheduler.usage, always=True)).running:
            await asyncio.sleep(0.005)
        second = asyncio.ensure_future(scheduler.look(lambda: model.run([Request([5, 6, 7])])))
        await asyncio.sleep(0.05)
        first.cancel()
        return await asyncio.wait_for(second, 5)

    _check_equal(_with(model, leave), model.run([Request([5, 6, 7])]))


def test_who_leaves_before_his_look_began_has_none(model: Model) -> None:
    calls: list[int] = []
    ready = threading.Event()

    async def leave(scheduler: Scheduler) -> None:
        first = asyncio.ensure_future(scheduler.look(lambda: ready.wait(10)))
        second = asyncio.ensure_future(scheduler.look(lambda: calls.append(1)))
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.sleep(0)
        ready.set()
        await first

    _with(model, leave, Limits(looks=1))
    assert not calls


@pytest.mark.parametrize("how", ["look", "aside"])
def test_who_leaves_the_line_leaves_nothing_there(model: Model, how: str) -> None:
    class Data(list[int]):
        """What a client sent."""

    calls: list[int] = []
    ready = threading.Event()

    async def leave(scheduler: Scheduler) -> None:
        beside: Callable[[Callable[[], Any]], Awaitable[Any]] = getattr(scheduler, how)
        first = asyncio.ensure_future(beside(lambda: ready.wait(10)))
        await asyncio.sleep(0.02)
        data = Data([1])
        kept = weakref.ref(data)
        second = asyncio.ensure_future(beside(partial(calls.extend, data)))
        del data
        await asyncio.sleep(0.02)
        assert kept() is not None and scheduler.pending == 2
        second.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await second
        del second
        await asyncio.sleep(0)
        gc.collect()
        assert kept() is None and scheduler.pending == 1
        first.cancel()  # it goes on, and counts until it has ended
        await asyncio.sleep(0.02)
        assert scheduler.pending == 1
        ready.set()

    _with(model, leave, Limits(looks=1))
    assert not calls


def test_documents_are_made_when_their_turn_has_come(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ready = threading.Event(), threading.Event()

    def wait(*_: object) -> dict[str, int]:
        began.set()
        ready.wait(10)
        return {}

    monkeypatch.setattr(looks, "lens", wait)
    with serving(model, limits=Limits(looks=1)) as client:
        first = threading.Thread(target=lambda: client.post("/mia/lens", prompt="a"))
        first.start()
        assert began.wait(10)
        read = _counted(monkeypatch, "parse_json")
        second = threading.Thread(target=lambda: client.post("/mia/explore", prompt="a"))
        second.start()
        while client.server.scheduler.pending < 2:
            time.sleep(0.01)
        assert not read
        ready.set()
        first.join()
        second.join()
        assert len(read) == 1


def _counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bytes]:
    """The calls of a function of the app."""
    calls: list[bytes] = []
    function = getattr(app, name)

    def counted(data: bytes) -> Any:
        calls.append(data)
        return function(data)

    monkeypatch.setattr(app, name, counted)
    return calls


def test_a_completion_keeps_no_document(client: Client) -> None:
    name = "a_field_that_changes_nothing"
    body: dict[str, Any] = {
        "prompt": [5],
        "max_tokens": 1000,
        "ignore_eos": True,
        "metadata": {name: [[]]},
    }
    with socket.create_connection(("127.0.0.1", client.port)) as s:
        data = json.dumps(body).encode()
        s.sendall(hostile.head("/v1/completions", len(data), "localhost") + data)
        while not client.server.scheduler.usage().running:
            time.sleep(0.01)
        gc.collect()
        mine = body["metadata"]
        kept = [x for x in gc.get_objects() if isinstance(x, dict) and name in x and x is not mine]
        assert not kept


def test_what_fails_fails_alone(model: Model) -> None:
    ids = model.ids("The cat")
    huge = np.full(model.n_embd, 9e29, np.float32)

    def metric(logits: object) -> float:
        raise KeyError("of this one")

    cases: list[tuple[Request, type[Exception], str]] = [
        (Request(ids, [Edit("l_out-0", "replace", huge)]), UsageError, "overflow"),
        (Request(ids, metric=metric), EngineError, "of this one"),
        (Request([10**9]), MiaError, "out of range|vocabulary"),
        (Request([5] * 5000), MiaError, "longer|tokens"),
    ]

    async def every(scheduler: Scheduler) -> list[Any]:
        good = [Request([5, 6, 7], n_predict=20)] * 3
        looks = [scheduler.look(lambda: model.run(good))]
        for bad, _, _ in cases:
            looks.append(scheduler.look(partial(model.run, [*good, bad])))
        return await asyncio.gather(*looks, return_exceptions=True)

    fine, *errors = _with(model, every)
    _check_equal(fine, model.run([Request([5, 6, 7], n_predict=20)] * 3))
    for error, (_, kind, message) in zip(errors, cases, strict=True):
        assert isinstance(error, kind), error
        with pytest.raises(kind, match=message):
            raise error


def test_the_end_of_the_server_ends_looks(model: Model) -> None:
    async def end() -> list[Any]:
        scheduler = Scheduler(model, Limits(looks=1))
        scheduler.start()
        request = Request([5, 6], n_predict=1500, stop_at_eog=False)
        looks = [asyncio.ensure_future(scheduler.look(lambda: model.run([request] * 50)))]
        looks += [asyncio.ensure_future(scheduler.look(lambda: model.run([request])))]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(scheduler.stop)
        with pytest.raises(Refused):
            await scheduler.look(lambda: 1)
        return await asyncio.gather(*looks, return_exceptions=True)

    for error in asyncio.run(end()):
        assert isinstance(error, Refused) and error.status == 503


def test_a_fault_of_the_engine_ends_looks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(scheduler: Scheduler) -> str:
        def step() -> None:
            raise RuntimeError("a fault")

        monkeypatch.setattr(scheduler.stream, "step", step)
        with pytest.raises(EngineError, match="a fault"):
            await scheduler.look(lambda: model.run([Request([5, 6])]))
        result = (await scheduler.look(lambda: model.run([Request([5, 6])])))[0]
        return "another stream" if result.logits is not None else ""

    assert _with(model, fail) == "another stream"


def test_looks_through_the_wire_leave_nothing(model: Model) -> None:
    with serving(model, limits=Limits(looks=2)) as client:
        for path, body in (
            ("/mia/lens", {"prompt": "The cat sat"}),
            ("/mia/attention", {"prompt": "The cat sat"}),
            ("/mia/attribute", {"prompt": "The cat sat", "answer": "a"}),
            ("/mia/activations", {"prompt": "The cat sat", "sites": "l_out"}),
        ):
            assert client.post(path, **body).status == 200, path
        health = client.health()
        assert health["cells"]["used"] == health["sequences"]["used"] == 0
        assert health["pending"] == 0


def test_who_leaves_his_look_leaves_nothing(model: Model, decoded: list[int]) -> None:
    n_left = 4
    with serving(model) as client:
        for i in range(n_left):
            hostile.leaves_its_look(client.port, np.random.default_rng(i))
        while (health := client.health())["pending"]:
            time.sleep(0.02)
        assert health["running"] == health["waiting"] == 0
        assert health["cells"]["used"] == health["sequences"]["used"] == 0
        of_those_who_left = sum(decoded)
        decoded.clear()
        whole = client.post("/mia/explore", part="blocking", prompt=list(range(3, 83)))
        assert whole.status == 200 and of_those_who_left < n_left * sum(decoded) / 2
