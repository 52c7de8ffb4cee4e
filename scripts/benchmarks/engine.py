"""The `engine` group: a sweep of heads, captures, and what a whole sweep takes as a process."""

import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.harness import N_DECODE, N_PREFILL, Bench, measure_process
from mia.edits import Edit
from mia.request import Capture, Request
from mia.sites import Site

N_PROMPT = 38


def engine(bench: Bench) -> None:
    head_replacements(bench)
    captures(bench)
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
    bench.add(f"prefill of {N_PREFILL}, every resid_post captured / llama.cpp", ratios, target=0.95)
    ratios = bench.compare(
        lambda: bench.generate(short, captures=read), lambda: bench.plain(short, N_DECODE)
    )
    bench.add(f"decode of {N_DECODE}, every resid_post captured / llama.cpp", ratios, target=0.90)


def head_requests(bench: Bench, tokens: Sequence[int]) -> list[Request]:
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
            metric=lambda logits: float(logits[0, 11]),
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
