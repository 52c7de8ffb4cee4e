"""The `sweep` group: a map of patches in planned runs against one by one, and what a variant costs as
their number grows. Seconds are those of the processor, of one thread, so that other programs count less."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Bench
from mia.edits import Edit
from mia.measure.answers import metric
from mia.methods.sweep import explain, sweep
from mia.model import Model
from mia.request import Request
from mia.sweeps.experiments import Patching

N_PROMPT, N_SHORT = 24, 8
#: of the short prompt: 8 layers × 8 tokens × so many neurons
NEURONS = (1, 8, 64)


def sweeps(bench: Bench) -> None:
    with Model(bench.model.path, threads=1) as m:
        _map(bench, m)
        _variants(bench, m)


def _map(bench: Bench, m: Model) -> None:
    """Every residual of a prompt patched, layer × token."""
    clean, corrupted = bench.tokens(N_PROMPT), bench.tokens(N_PROMPT, shift=3)
    half = N_PROMPT // 2
    _planned(bench, m, clean, corrupted, "")
    _planned(bench, m, clean, [*clean[:half], *corrupted[half:]], f" (alike up to token {half})")


def _planned(bench: Bench, m: Model, clean: list[int], corrupted: list[int], pair: str) -> None:
    """The plan, and its time beside cells one by one."""
    told = explain(m, clean, Patching(corrupted), metric="kl")
    what = f"{m.n_layer} layers × {N_PROMPT} tokens patched{pair}"
    bench.add(
        f"{what}, token-forwards, of those one by one", [told.share], target=0.55, at_least=False
    )
    bench.add(f"{what}, the same by blocks that run", [told.block_share])
    rows = m.look(clean, "resid_post")
    step = 24 if bench.quick else 5
    cells = list(np.ndindex(m.n_layer, N_PROMPT))[::step]
    one = metric("kl")

    def alone(cell: Sequence[int]) -> object:
        site = f"resid_post.{cell[0]}"
        edit = Edit(site, "replace", rows[site][cell[1]], tokens=[cell[1]])
        requests = [Request(corrupted, [edit], metric=one.function)]
        return m.run(requests)

    alone((0, 0))
    slow = processor_seconds(lambda: [alone(cell) for cell in cells])
    n = m.n_layer * N_PROMPT
    fast = [
        processor_seconds(lambda: sweep(m, clean, Patching(corrupted), metric="kl"))
        for _ in range(1 if bench.quick else min(bench.rounds, 3))
    ]
    bench.add(
        f"{what}, planned / one by one ({len(cells)} scaled up)",
        [slow * n / len(cells) / x for x in fast],
        target=5,
    )


def _variants(bench: Bench, m: Model) -> None:
    """Milliseconds of a variant."""
    clean, corrupted = bench.tokens(N_SHORT), bench.tokens(N_SHORT, shift=3)
    layers = sorted({i * m.n_layer // 8 for i in range(8)})
    most = [n for n in NEURONS if n <= m.n_embd]

    def asked(n: int) -> dict[str, Any]:
        axes = {"over": "layer,token,neuron", "layers": layers, "neurons": range(n)}
        return {**axes, "metric": "kl", "null": 0}

    def run(n: int) -> object:
        return sweep(m, clean, Patching(corrupted), **asked(n))

    for n in most:
        told = explain(m, clean, Patching(corrupted), **asked(n))
        bench.add(
            f"{told.n_cells} variants of {N_SHORT} tokens, token-forwards by blocks, a variant",
            [told.planned.block_rows / m.n_layer / told.n_cells],
            unit="",
        )
    for n in most[:: 2 if bench.quick else 1]:
        rounds = 3 if n < NEURONS[-1] and not bench.quick else 1
        seconds = [processor_seconds(partial(run, n)) for _ in range(rounds)]
        variants = len(layers) * N_SHORT * n
        bench.add(
            f"{variants} variants of {N_SHORT} tokens, a variant",
            [1000 * x / variants for x in seconds],
            unit="ms",
        )


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
