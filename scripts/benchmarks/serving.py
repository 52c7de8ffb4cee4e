"""The `serve` group: a stream of many clients against one after the other, and of one client against
`Model.run`, in seconds of the processor; beside them what llama.cpp itself gives for a batch, and what
copies of the weights in other types do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from benchmarks.harness import N_DECODE, Bench
from mia.edits import Edit
from mia.engine.stream import Stream
from mia.model import Model
from mia.request import Request
from mia.sites import Site

CLIENTS = 8
#: of whole requests: tokens of the prompt that all begin with, of one's own, and generated
N_SHARED, N_OWN, N_WRITTEN = 150, 10, 32
#: conversations that a server has had, and their tokens
N_BEFORE, N_TALK = 16, 250
#: types of copies of the weights
TYPES = ("f16", "bf16", "f32")


def serve(bench: Bench) -> None:
    # one thread: those that wait for each other at a barrier take processor time, too
    path = bench.model.path
    with Model(path, threads=1) as model:
        _measure(bench, model)
        with ExitStack() as stack:
            copies = {t: stack.enter_context(Model(path, threads=1, as_type=t)) for t in TYPES}
            _types(bench, {"as it is": model, **copies})


def _measure(bench: Bench, m: Model) -> None:
    vectors = _vectors(bench, m)
    with m.stream() as stream:
        for what, edits in (("nothing changed", [()] * CLIENTS), ("a vector each", vectors)):
            requests = _requests(bench, edits)
            ratios = _ratios(
                bench,
                lambda r=requests: _together(stream, r),  # type: ignore[misc]
                lambda r=requests: _one_by_one(stream, r),  # type: ignore[misc]
            )
            bench.add(
                f"{CLIENTS} clients at once / one after the other, {what}", ratios, target=3.0
            )
    for what, edits in (("nothing changed", [()] * CLIENTS), ("a vector each", vectors)):
        ratios = _whole(bench, m, edits)
        bench.add(f"  the same, with {N_SHARED} tokens that all begin with, {what}", ratios)
    with m.stream() as stream:
        new = _new_prompts(bench, 16)
        ratios = _against_run(bench, m, stream, new)
        bench.add("one stream, nothing changed / Model.run", ratios, target=0.95)
        for _ in range(N_BEFORE):
            talk = Request(next(_new_prompts(bench, N_TALK)), logits=None, n_predict=2)
            _together(stream, [talk])
        ratios = _against_run(bench, m, stream, new)
        bench.add(f"  the same, behind {N_BEFORE} other conversations", ratios, target=0.95)


def _vectors(bench: Bench, m: Model) -> list[list[Edit]]:
    """A vector for each client, in the middle third of the blocks."""
    middle = range(m.n_layer // 3, 2 * m.n_layer // 3)
    return [
        [Edit(Site("resid_post", layer), "add", 0.3 * bench.direction()) for layer in middle]
        for _ in range(CLIENTS)
    ]


def _requests(bench: Bench, edits: Sequence[Sequence[Edit]]) -> list[Request]:
    prompt = bench.tokens(16)
    return [
        Request(
            [*prompt, 100 + i],
            e,
            logits=None,
            n_predict=N_DECODE,
            stop_at_eog=False,
            logprobs=True,
        )
        for i, e in enumerate(edits)
    ]


def _new_prompts(bench: Bench, n: int) -> Iterator[list[int]]:
    """Prompts that begin like no other one."""
    while True:
        yield bench.rng.integers(1000, 5000, n).tolist()


def _whole(bench: Bench, m: Model, edits: Sequence[Sequence[Edit]]) -> list[float]:
    """Whole requests: a prompt of which each has the end to itself, and a short answer. The cache knows
    nothing of it, neither for those at once nor for the first of those one after the other."""
    new, ratios = _new_prompts(bench, N_SHARED + CLIENTS * N_OWN), list[float]()
    for _ in range(bench.rounds):
        seconds = []
        for run in (_one_by_one, _together):
            ids = next(new)
            ends = [ids[N_SHARED + i * N_OWN :][:N_OWN] for i in range(CLIENTS)]
            requests = [
                Request(
                    [*ids[:N_SHARED], *end], e, logits=None, n_predict=N_WRITTEN, stop_at_eog=False
                )
                for end, e in zip(ends, edits, strict=True)
            ]
            with m.stream() as stream:
                seconds.append(_seconds(lambda: run(stream, requests)))  # noqa: B023
        ratios.append(seconds[0] / seconds[1])
    return ratios


def _against_run(
    bench: Bench, m: Model, stream: Stream, prompts: Iterator[list[int]]
) -> list[float]:
    """The same request on a stream and by `Model.run`, with a prompt that is new to both."""
    ratios = []
    for _ in range(bench.rounds + 1):
        request = Request(next(prompts), logits=None, n_predict=N_DECODE, stop_at_eog=False)
        ours = _seconds(lambda: _together(stream, [request]))  # noqa: B023
        ratios.append(_seconds(lambda: m.run([request])) / ours)  # noqa: B023
    return ratios[1:]


def _types(bench: Bench, models: Mapping[str, Model]) -> None:
    """What each type of the weights gives for a batch, in the same rounds."""
    for name, m in models.items():
        bench.add(
            f"llama.cpp, a batch of {CLIENTS} rows / {CLIENTS} decodes, {name}", _rows(bench, m)
        )
    requests = _requests(bench, [()] * CLIENTS)
    took: dict[str, list[float]] = {name: [] for name in models}
    alone: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        streams = {name: stack.enter_context(m.stream()) for name, m in models.items()}
        for _ in range(bench.rounds + 1):
            for name, stream in streams.items():
                took[name].append(_seconds(lambda: _together(stream, requests)))  # noqa: B023
                alone[name].append(_seconds(lambda: _together(stream, requests[:1])))  # noqa: B023
    first, *copies = models
    for name in copies:
        for what, times in ((f"{CLIENTS} clients at once", took), ("one client", alone)):
            ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
            bench.add(f"{what}, the {name} copy / the file {first}", ratios[1:])
    for name in copies:
        ratios = [CLIENTS * b / a for a, b in zip(took[name], alone[name], strict=True)]
        bench.add(f"{CLIENTS} clients at once / one {CLIENTS} times, {name}", ratios[1:])


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
