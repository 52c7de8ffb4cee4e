"""The `engine` group: a sweep of heads, captures, and what a whole sweep takes as a process."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks.harness import N_DECODE, N_PREFILL, Bench, measure_process
from mia.edits import Edit
from mia.request import Capture, LogitSum, Request
from mia.sites import Site

N_PROMPT = 38


def engine(bench: Bench) -> None:
    head_replacements(bench)
    captures(bench)
    middle_layer(bench)
    declared_metric(bench)
    command = [sys.executable, "-m", "benchmarks.engine", bench.model.name]
    wall, megabytes = measure_process(command)
    bench.add("5 prompts × every head, this machine, whole process", [wall], unit="s")
    bench.add(
        "5 prompts × every head, this machine, peak memory",
        [megabytes],
        unit="MB",
        target=round(bench.megabytes_allowed()),
        at_least=False,
    )


def head_replacements(bench: Bench) -> None:
    m = bench.model
    requests = head_requests(bench, bench.tokens(N_PROMPT))
    step = 9 if bench.quick else 1
    part = requests[::step]
    scale = len(requests) / len(part)
    m.run(requests[:step])
    ratios = bench.compare(
        lambda: m.run(requests),
        lambda: [m.run([r]) for r in part],
        rounds=min(bench.rounds, 3),
        warm=False,
    )
    bench.add(
        f"{len(requests)} head replacements, one run / one by one"
        + (f" ({len(part)} scaled up)" if step > 1 else ""),
        [scale * r for r in ratios],
        target=25,
    )


def captures(bench: Bench) -> None:
    m, prompt, short = bench.model, bench.tokens(N_PREFILL), bench.tokens(4)
    read = [Capture("resid_post", generated=True)]
    ratios = bench.compare(
        lambda: m.run([Request(prompt, captures=read, logits=None)]), lambda: bench.plain(prompt)
    )
    bench.add(f"prefill of {N_PREFILL}, every resid_post captured / llama.cpp", ratios, target=0.98)
    for site, target in (("resid_post", 0.95), ("attn_out", 0.93)):
        decode = partial(bench.generate, short, captures=[Capture(site, generated=True)])
        ratios = bench.compare(decode, lambda: bench.plain(short, N_DECODE))
        what = f"decode of {N_DECODE}, every {site} captured / llama.cpp"
        bench.add(what, ratios, target=target)


def middle_layer(bench: Bench) -> None:
    """What is read at the middle layer only, as vectors, probes and CAA do: nothing runs above it."""
    m = bench.model
    middle, last = m.n_layer // 2 - 1, m.n_layer - 1
    long = bench.tokens(512)
    # 64 pairs of texts of 16 tokens that have only the first in common
    texts = [[long[0], *long[i : i + 15]] for i in range(1, 33 if bench.quick else 129)]

    def read(prompts: Sequence[Sequence[int]], layer: int, tokens: int | None) -> object:
        capture = Capture(Site("resid_post", layer), tokens)
        return m.run([Request(t, captures=[capture], logits=None) for t in prompts])

    for what, prompts, at in (
        (f"prefill of {len(long)}, one layer captured", [long], None),
        (f"{len(texts) // 2} contrast pairs, one layer captured", texts, -1),
    ):
        ratios = bench.compare(
            partial(read, prompts, last, at), partial(read, prompts, middle, at), rounds=3
        )
        bench.add(f"{what}, middle / last", ratios, target=0.6, at_least=False)


def declared_metric(bench: Bench) -> None:
    m, tokens = bench.model, bench.tokens(N_PROMPT)
    whole, few = head_requests(bench, tokens), head_requests(bench, tokens, LogitSum({11: 1.0}))
    ratios = bench.compare(lambda: m.run(whole), lambda: m.run(few), rounds=3)
    bench.add(
        f"{len(few)} head replacements, a metric of one token / of all logits",
        ratios,
        target=0.9,
        at_least=False,
    )


def _logit(logits: np.ndarray) -> float:
    return float(logits[0, 11])


def head_requests(
    bench: Bench, tokens: Sequence[int], metric: Callable[[np.ndarray], float] = _logit
) -> list[Request]:
    """Each head of each layer replaced by a random vector at the last token; each run gives the
    logit of one token."""
    m = bench.model
    return [
        Request(
            tokens,
            edits=[
                Edit(
                    Site("head_out", layer),
                    "replace",
                    bench.rng.normal(size=m.head_dim).astype(np.float32),
                    tokens=-1,
                    heads=[head],
                )
            ],
            metric=metric,
        )
        for layer in range(m.n_layer)
        for head in range(m.n_head)
    ]


def sweep(name: str) -> None:
    """5 prompts × every head, in a process of its own, so that its peak memory is its own."""
    bench = Bench(name, 1, False, quiet=True)
    prompts = [bench.tokens(N_PROMPT, shift) for shift in range(5)]
    bench.model.run([r for tokens in prompts for r in head_requests(bench, tokens)])


if __name__ == "__main__":
    sweep(sys.argv[1])
