"""The `steering` part of the bench: mia's own steering commands against llama.cpp's plain decode,
and what running many texts together gains.

In bench.py: `from bench_steer import steering`, and `"steering": steering` among GROUPS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mia.methods.contrast import extract, load_pairs
from mia.methods.steering import Steering, explain
from mia.request import Request
from mia.vectors import Vector

if TYPE_CHECKING:
    from bench import Bench

N_DECODE = 64


def steering(bench: Bench) -> None:
    m, short = bench.model, bench.tokens(4)
    rows = bench.rng.normal(size=(m.n_layer, m.n_embd)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vector = Vector(dict(enumerate(rows[1:], 1)))
    middle = [m.n_layer // 2]

    def request(s: Steering) -> Request:
        return Request(short, s.edits(), logits=None, n_predict=N_DECODE, stop_at_eog=False)

    for what, s, target in (
        ("mia steer, a vector at one layer", Steering(vector, layers=middle), 0.98),
        ("mia steer, a vector at every layer", Steering(vector), 0.98),
        ("mia steer --operator ablate, one layer", Steering(vector, "ablate", layers=middle), 0.90),
        ("mia steer --generated-only, one layer", Steering(vector, layers=middle, tokens=(), generated=True), 0.90),
        ("mia steer --operator ablate, every layer", Steering(vector, "ablate"), 0.90),
    ):  # fmt: skip
        (path,) = {row["path"] for row in explain(m, s.edits())}
        one = request(s)
        ratios = bench.compare(
            lambda one=one: m.run([one]),
            lambda: bench.plain(short, N_DECODE),
            rounds=5 * bench.rounds,  # half a second each, and only hundredths apart
        )
        bench.add(f"{what} ({path}) / llama.cpp", ratios, target=target)

    several = [request(Steering(vector, coeff=c)) for c in (0.5, 1, 2, 4)]
    ratios = bench.compare(
        lambda: m.run(several), lambda: [m.run([r]) for r in several], rounds=min(bench.rounds, 3)
    )
    bench.add("4 coefficients side by side / one after the other", ratios)

    pairs = load_pairs("sentiment")
    texts = [m.tokenize(t, bos=True) for p in pairs for t in (p.positive, p.negative)]
    ratios = bench.compare(
        lambda: extract(m, pairs, bos=True),
        lambda: [bench.plain(t) for t in texts],
        rounds=min(bench.rounds, 3),
    )
    bench.add(f"{len(texts)} texts read at every layer / llama.cpp, one by one", ratios)
