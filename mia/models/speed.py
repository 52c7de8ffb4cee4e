"""Whether llama.cpp's extra weight buffers (AMX, repacking) are faster here, for one file."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter

from mia.llama import Context, ContextParams, LlamaModel

_N_TOKENS, _N_DECODES, _ROUNDS = 64, 8, 3


def repacking_speed(path: Path, threads: int) -> tuple[float, float]:
    """How many times as fast a prefill of 64 tokens and a decode are with extra weight buffers as
    without. The file is opened twice, and both run in turns; on a busy machine this is rough."""
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    contexts = {extra: _context(path, threads, extra) for extra in times}
    try:
        for _ in range(_ROUNDS + 1):
            for extra, context in contexts.items():
                times[extra].append(_timed(context))
    finally:
        for context in contexts.values():
            context.close()
            context.model.close()
    # the first round warms up
    prefill, decode = (
        median(t[i] for t in times[False][1:]) / median(t[i] for t in times[True][1:])
        for i in (0, 1)
    )
    return prefill, decode


def _context(path: Path, threads: int, extra: bool) -> Context:
    model = LlamaModel(path, extra_bufts=extra)
    params = ContextParams(
        n_ctx=256, n_ubatch=64, n_seq=1, flash=True, kv_type="f16", threads=threads, callback=False
    )
    return Context(model, params)


def _timed(context: Context) -> tuple[float, float]:
    """Seconds of a prefill, and of some single tokens after it."""
    n_vocab = context.model.n_vocab
    tokens = [(7 + 13 * i) % n_vocab for i in range(_N_TOKENS)]
    context.clear()
    start = perf_counter()
    context.decode(tokens, list(range(_N_TOKENS)), [0] * _N_TOKENS, [False] * _N_TOKENS)
    middle = perf_counter()
    for i in range(_N_DECODES):
        context.decode(tokens[i : i + 1], [_N_TOKENS + i], [0], [True])
    return middle - start, perf_counter() - middle
