"""The `serve` group: a stream of many clients against one after the other, and of one client against
`Model.run`, in seconds of the processor; beside them what llama.cpp itself gives for a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from benchmarks.harness import N_DECODE, Bench
from mia.edits import Edit
from mia.engine.stream import Stream
from mia.model import Model
from mia.request import Request
from mia.sites import Site

CLIENTS = 8


def serve(bench: Bench) -> None:
    # one thread: those that wait for each other at a barrier take processor time, too
    with Model(bench.model.path, threads=1) as model:
        _measure(bench, model)


def _measure(bench: Bench, m: Model) -> None:
    prompt, middle = bench.tokens(16), range(m.n_layer // 3, 2 * m.n_layer // 3)

    def request(i: int, edits: Sequence[Edit]) -> Request:
        return Request(
            [*prompt, 100 + i],
            edits,
            logits=None,
            n_predict=N_DECODE,
            stop_at_eog=False,
            logprobs=True,
        )

    steered = [
        [Edit(Site("resid_post", layer), "add", 0.3 * bench.direction()) for layer in middle]
        for _ in range(CLIENTS)
    ]
    clients = f"{CLIENTS} clients"
    with m.stream() as stream:
        for what, edits in (("nothing changed", [()] * CLIENTS), ("a vector each", steered)):
            requests = [request(i, e) for i, e in enumerate(edits)]
            ratios = _ratios(
                bench,
                lambda r=requests: _together(stream, r),  # type: ignore[misc]
                lambda r=requests: _one_by_one(stream, r),  # type: ignore[misc]
            )
            bench.add(f"{clients} at once / one after the other, {what}", ratios, target=3.0)
        alone = [request(0, ())]
        ratios = _ratios(bench, lambda: _together(stream, alone), lambda: m.run(alone))
        bench.add("one stream, nothing changed / Model.run", ratios, target=0.95)
    bench.add(
        f"llama.cpp's own batch of {CLIENTS} rows / {CLIENTS} decodes of one", _rows(bench, m)
    )


def _together(stream: Stream, requests: Sequence[Request]) -> None:
    for request in requests:
        stream.add(request)
    while stream.is_busy:
        stream.step()


def _one_by_one(stream: Stream, requests: Sequence[Request]) -> None:
    for request in requests:
        _together(stream, [request])


def _rows(bench: Bench, m: Model) -> list[float]:
    """What a batch can save at all: the same tokens as rows of one decode, and one by one."""
    sessions = m._engine.sessions.apart()
    session = sessions.get(callback=False, flash=True, n_cells=1024, n_sequences=CLIENTS)
    context = session.context
    sequences = list(range(CLIENTS))
    for i in sequences:
        context.decode([5] * 16, list(range(16)), [i] * 16, [True] * 16)
    position = 16

    def batch() -> None:
        nonlocal position
        for _ in range(8):
            context.decode([7] * CLIENTS, [position] * CLIENTS, sequences, [True] * CLIENTS)
            position += 1

    def singles() -> None:
        nonlocal position
        for _ in range(8):
            for i in sequences:
                context.decode([7], [position], [i], [True])
            position += 1

    ratios = _ratios(bench, batch, singles)
    sessions.close()
    return ratios


def _ratios(bench: Bench, ours: Callable[[], object], theirs: Callable[[], object]) -> list[float]:
    """Processor seconds of theirs per one of ours, pair by pair."""
    ours(), theirs()
    return [_seconds(theirs) / _seconds(ours) for _ in range(bench.rounds)]


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
