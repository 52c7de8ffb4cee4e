"""The `lens` group: the logit lens at every layer and token against a forward pass and a float32
matrix product."""

import numpy as np

from benchmarks.harness import Bench
from mia.request import Capture, Request


def lens(bench: Bench) -> None:
    m, tokens = bench.model, bench.tokens(35)
    reader = m.lens
    (matrix,) = (
        m.weights.matrix(n) for n in ("output.weight", "token_embd.weight") if n in m.weights
    )
    n_rows = m.n_layer * len(tokens)
    scores = np.empty((n_rows, m.n_vocab), np.float32)
    read = [Capture("resid_post")]

    def full() -> object:
        captures = m.run([Request(tokens, captures=read, logits=None)])[0].captures
        return reader.read(np.concatenate(list(captures.values())), 5)

    rows = bench.rng.normal(size=(n_rows, m.n_embd)).astype(np.float32)

    def forward_and_gemm() -> object:
        bench.plain(tokens)
        return np.matmul(rows, matrix.T, out=scores)

    ratios = [1 / r for r in bench.compare(full, forward_and_gemm)]
    what = f"lens on {m.n_layer} layers × {len(tokens)} tokens, time / (forward + float32 GEMM)"
    bench.add(what, ratios, target=1.5, at_least=False)
