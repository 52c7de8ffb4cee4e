"""Threads, asyncio and calls from inside a run: the right numbers, or a clear error."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.edits import Edit
from mia.errors import MiaError
from mia.model import Model
from mia.request import Capture, Request, Result
from reliability.compare import TOLERANCE, differences, worst
from reliability.part import Options, Part, count
from reliability.requests import _own_cache, write_models
from reliability.workers import Block, Event, work

HANG_SECONDS = 120.0
Rng = np.random.Generator


def _requests(model: Model, rng: Rng) -> list[Request]:
    """A few requests of several kinds."""
    prompts = [rng.integers(3, model.n_vocab, rng.integers(2, 12)).tolist() for _ in range(4)]
    value = rng.standard_normal(model.n_embd).astype(np.float32)
    edit = Edit("resid_post.1", "add", value, tokens=-1)
    return [
        Request(prompts[0], captures=[Capture("l_out")]),
        Request(prompts[1], [edit], logits="all"),
        Request(prompts[2], [edit], n_predict=3, stop_at_eog=False),
        Request(prompts[3], metric=lambda x: x.sum(0)),
    ]


def _check(wanted: Sequence[Result], got: Sequence[Result]) -> None:
    for a, b in zip(wanted, got, strict=True):
        error, name = worst(differences(a, b))
        assert error <= TOLERANCE, f"{name} is off by {error:.2g}"


def one_model_in_four_threads(open_model: Callable[[], Model], rng: Rng) -> None:
    with open_model() as m:
        requests = [_requests(m, rng) for _ in range(8)]
        wanted = [m.run(r) for r in requests]
        with ThreadPoolExecutor(4) as pool:
            for a, b in zip(wanted, pool.map(m.run, requests), strict=True):
                _check(a, b)


def two_models_in_two_threads(open_model: Callable[[], Model], rng: Rng) -> None:
    with open_model() as one, open_model() as two:
        requests = [_requests(one, rng) for _ in range(6)]
        wanted = [one.run(r) for r in requests]

        def run_all(m: Model) -> list[list[Result]]:
            return [m.run(r) for r in requests]

        with ThreadPoolExecutor(2) as pool:
            for got in pool.map(run_all, (one, two)):
                for a, b in zip(wanted, got, strict=True):
                    _check(a, b)


def asyncio_to_thread(open_model: Callable[[], Model], rng: Rng) -> None:
    with open_model() as m:
        requests = [_requests(m, rng) for _ in range(6)]
        wanted = [m.run(r) for r in requests]

        async def all_at_once() -> list[list[Result]]:
            return list(await asyncio.gather(*(asyncio.to_thread(m.run, r) for r in requests)))

        for a, b in zip(wanted, asyncio.run(all_at_once()), strict=True):
            _check(a, b)


def opened_and_closed_in_threads(open_model: Callable[[], Model], rng: Rng) -> None:
    def one(seed: int) -> None:
        with open_model() as m:
            m.run(_requests(m, np.random.default_rng(seed)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, rng.integers(1000, size=6).tolist()))


def closed_while_it_runs(open_model: Callable[[], Model], rng: Rng) -> None:
    m = open_model()
    requests = _requests(m, rng) * 6
    wanted = m.run(requests)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(m.run, requests)
        pool.submit(m.close).result()
        with suppress(MiaError):  # it may have been closed before the run began
            _check(wanted, running.result())


def _refused_inside(open_model: Callable[[], Model], rng: Rng, nested: Any) -> None:
    """`nested(m, inner)` gives requests that call `inner` in the middle of their run."""
    with open_model() as m:
        plain = _requests(m, rng)
        wanted = m.run(plain)
        errors: list[MiaError] = []

        def inner() -> None:
            try:
                _check(wanted[:1], m.run(plain[:1]))
            except MiaError as err:
                errors.append(err)

        got = m.run([*nested(m, inner), *plain])[-len(plain) :]
        _check(wanted, got)
        _check(wanted, m.run(plain))


def a_metric_that_runs_the_model(open_model: Callable[[], Model], rng: Rng) -> None:
    def nested(m: Model, inner: Callable[[], None]) -> list[Request]:
        def metric(logits: Array) -> float:
            before = logits.copy()
            inner()
            assert np.array_equal(before, logits), "the logits changed under the metric"
            return float(logits[0, 0])

        return [Request([3, 4, 5], metric=metric)]

    _refused_inside(open_model, rng, nested)


def an_edit_that_runs_the_model(open_model: Callable[[], Model], rng: Rng) -> None:
    def nested(m: Model, inner: Callable[[], None]) -> list[Request]:
        def change(h: Array) -> Array:
            inner()
            return h

        return [Request([3, 4, 5], [Edit("resid_post.0", change)])]

    _refused_inside(open_model, rng, nested)


SCENARIOS: tuple[Callable[[Callable[[], Model], Rng], None], ...] = (
    one_model_in_four_threads,
    two_models_in_two_threads,
    asyncio_to_thread,
    opened_and_closed_in_threads,
    closed_while_it_runs,
    a_metric_that_runs_the_model,
    an_edit_that_runs_the_model,
)


def block(path: str, seed: int, n: int, first: int = 0) -> Iterator[Event]:
    """Rounds `first` to `n` - 1: each scenario in turn, with one thread or two of llama.cpp's."""
    for i in range(first, n):
        yield {"at": i}
        scenario = SCENARIOS[i % len(SCENARIOS)]
        own_threads = 1 + (i // len(SCENARIOS)) % 2
        said = ""
        try:
            scenario(
                lambda t=own_threads: Model(path, threads=t, ctx=64),  # type: ignore[misc]
                np.random.default_rng([seed, i]),
            )
        except Exception as err:
            said = f"{type(err).__name__}: {err}"
        yield {"scenario": scenario.__name__, "said": said}


def threads(options: Options) -> Part:
    """Runs `options.n` rounds."""
    part = Part("threads")
    good: Counter[str] = Counter()
    died = 0
    with tempfile.TemporaryDirectory() as place, _own_cache(place):
        models = write_models(Path(place))
        names = ["llama", "gemma2, window 4", "dots1"]

        def blocks() -> Iterator[Block]:
            for i, name in enumerate(names):
                n = options.n // len(names) + (i < options.n % len(names))
                if n and not options.is_over:
                    path = str(models[name])
                    task = {"task": "reliability.threads:block", "path": path}
                    yield {**task, "seed": options.seed, "n": n}

        for given, event in work(blocks(), workers=1, seconds=HANG_SECONDS):
            if "scenario" in event:
                good[event["scenario"]] += not event["said"]
                if event["said"]:
                    part.wrong(
                        f"{event['scenario']} on {Path(given['path']).stem}: {event['said']}"
                    )
            elif "died" in event or "hung" in event:
                died += 1
                name = SCENARIOS[(event["at"] or 0) % len(SCENARIOS)].__name__
                how = event.get("died") or f"no answer in {event['hung']:.0f} s"
                part.wrong(f"{name} on {Path(given['path']).stem}: {how}")
            if good.total() and good.total() % 50 == 0:
                part.say(f"{good.total()} rounds, {options.seconds:.0f} s")
    for name, n in good.items():
        part.figures[name.replace("_", " ")] = f"{count(n)} right"
    part.figures["crashes, hangs"] = count(died)
    return part
