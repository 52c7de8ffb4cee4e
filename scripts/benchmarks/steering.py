"""The `steer` group: edits of the residual stream against llama.cpp's plain decode. The
`steering` group: what mia's steering commands do, against the same, and many texts together."""

from collections.abc import Sequence

import numpy as np

from benchmarks.harness import N_DECODE, N_PREFILL, Bench
from mia.datasets.pairs import load_pairs
from mia.edits import Edit
from mia.methods.contrast import extract
from mia.methods.steering import explain
from mia.request import Request
from mia.sites import Site
from mia.steering import Steering
from mia.vectors import Vector


def steer(bench: Bench) -> None:
    m, prompt, decode = bench.model, bench.tokens(N_PREFILL), f"decode of {N_DECODE}"
    decode_against_plain(bench, f"{decode}, nothing changed", [], 0.98)
    vectors = [
        Edit(Site("resid_post", i), "add", unit(bench.direction())) for i in range(1, m.n_layer)
    ]
    decode_against_plain(bench, f"{decode}, steered at every layer by a vector", vectors, 0.98)
    same = np.stack([np.asarray(e.value) for e in vectors])
    decode_against_plain(bench, f"{decode}, the same vector in both", vectors, 0.98, same)
    ratios = bench.compare(
        lambda: m.run([Request(prompt, edits=vectors)]), lambda: bench.plain(prompt)
    )
    bench.add(f"prefill of {N_PREFILL}, steered at every layer / llama.cpp", ratios, target=0.98)
    middle = Site("resid_post", m.n_layer // 2)
    decode_against_plain(
        bench,
        f"{decode}, a direction projected out at one layer",
        [Edit(middle, "project_out", bench.direction())],
        0.90,
    )


def steering(bench: Bench) -> None:
    m = bench.model
    rows = bench.rng.normal(size=(m.n_layer, m.n_embd)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vector = Vector(dict(enumerate(rows[1:], 1)))
    middle = [m.n_layer // 2]

    for what, s, target in (
        ("mia steer, a vector at one layer", Steering(vector, layers=middle), 0.98),
        ("mia steer, a vector at every layer", Steering(vector), 0.98),
        ("mia steer --operator ablate, one layer", Steering(vector, "project_out", layers=middle), 0.90),
        ("mia steer --where generated, one layer", Steering(vector, layers=middle, tokens=(), generated=True), 0.90),
        ("mia steer --operator ablate, every layer", Steering(vector, "project_out"), 0.90),
    ):  # fmt: skip
        (path,) = {row["path"] for row in explain(m, s.edits())}
        decode_against_plain(bench, f"{what} ({path})", s.edits(), target)
    coefficients(bench, vector)
    texts(bench)


def decode_against_plain(
    bench: Bench,
    what: str,
    edits: Sequence[Edit],
    target: float,
    directions: np.ndarray | None = None,
) -> None:
    short = bench.tokens(4)
    ratios = bench.compare(
        lambda: bench.generate(short, edits),
        lambda: bench.plain(short, N_DECODE, directions),
        rounds=5 * bench.rounds,  # half a second each, and only hundredths apart
    )
    bench.add(f"{what} / llama.cpp", ratios, target=target)


def coefficients(bench: Bench, vector: Vector) -> None:
    m, short = bench.model, bench.tokens(4)
    requests = [
        Request(
            short,
            Steering(vector, coeff=c).edits(),
            logits=None,
            n_predict=N_DECODE,
            stop_at_eog=False,
        )
        for c in (0.5, 1, 2, 4)
    ]
    ratios = bench.compare(
        lambda: m.run(requests), lambda: [m.run([r]) for r in requests], rounds=min(bench.rounds, 3)
    )
    bench.add("4 coefficients side by side / one after the other", ratios)


def texts(bench: Bench) -> None:
    m, pairs = bench.model, load_pairs("sentiment")
    prompts = [m.tokenize(t, bos=True) for p in pairs for t in (p.positive, p.negative)]
    ratios = bench.compare(
        lambda: extract(m, pairs, bos=True),
        lambda: [bench.plain(tokens) for tokens in prompts],
        rounds=min(bench.rounds, 3),
    )
    bench.add(f"{len(prompts)} texts read at every layer / llama.cpp, one by one", ratios)


def unit(v: np.ndarray) -> np.ndarray:
    return np.asarray(v / np.linalg.norm(v), np.float32)
