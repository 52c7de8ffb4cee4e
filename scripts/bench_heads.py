"""The `heads` part of the bench: a sweep of all heads in one planned run against one by one,
and what reading every attention pattern costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mia.methods.ablation import head_edits, head_sweep, log_probs
from mia.methods.attention import maps_request
from mia.request import Request

if TYPE_CHECKING:
    from bench import Bench

N_PROMPT = 40


def heads(bench: Bench) -> None:
    m, tokens = bench.model, bench.tokens(N_PROMPT)
    every = [(layer, head) for layer in range(m.n_layer) for head in range(m.n_head)]
    step = 9 if bench.quick else 1
    part = every[::step]

    def alone(layer: int, head: int) -> object:
        edits = head_edits(m, {layer: [head]}, tokens=[-1])
        return m.run(
            [Request(tokens, edits, metric=lambda logits: float(log_probs(logits, [11])[0]))]
        )

    head_sweep(m, tokens, [11], heads={0: [0]})  # a context is made once
    ratios = bench.compare(
        lambda: head_sweep(m, tokens, [11]),
        lambda: [alone(*pair) for pair in part],
        rounds=min(bench.rounds, 3),
        warm=False,
    )
    bench.add(
        f"mia ablate: {len(every)} heads, {N_PROMPT} tokens, one run / one by one"
        + (f" ({len(part)} scaled up)" if step > 1 else ""),
        [len(every) / len(part) * r for r in ratios],
        target=25,
    )
    long = bench.tokens(256)
    ratios = bench.compare(
        lambda: m.run([maps_request(m, long)]), lambda: m.run([Request(long, logits=None)])
    )
    bench.add("prefill of 256, every attention pattern read / nothing read", ratios)
