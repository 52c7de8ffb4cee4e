"""The `heads` group: all heads ablated in one planned run against one by one, and what it costs
to read every attention pattern."""

from benchmarks.harness import N_PREFILL, Bench
from mia.measure.losses import log_probs
from mia.methods.ablation import head_sweep
from mia.methods.attention import maps_request
from mia.methods.head_ablation import head_edits
from mia.ranges import Head
from mia.request import Request

N_PROMPT = 40


def heads(bench: Bench) -> None:
    m, tokens = bench.model, bench.tokens(N_PROMPT)
    every = [(layer, head) for layer in range(m.n_layer) for head in range(m.n_head)]
    step = 9 if bench.quick else 1
    part = every[::step]

    def alone(layer: int, head: int) -> object:
        edits = head_edits(m, [Head(layer, head)], tokens=[-1])
        return m.run(
            [Request(tokens, edits, metric=lambda logits: float(log_probs(logits, [11])[0]))]
        )

    head_sweep(m, tokens, [11], heads=[Head(0, 0)])  # a context is made once
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
    long = bench.tokens(N_PREFILL)
    ratios = bench.compare(
        lambda: m.run([maps_request(m, long)]), lambda: m.run([Request(long, logits=None)])
    )
    bench.add(f"prefill of {N_PREFILL}, every attention pattern read / nothing read", ratios)
