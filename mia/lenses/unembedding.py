"""Logits of a few tokens from rows behind the final norm, in place of the whole unembedding.

A logit is a row of the unembedding times the row that the final norm gives. What some architectures
have around it (biases, scales, soft-caps) is read off the graph, as the lens does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array
from mia.errors import ModelError
from mia.lenses.linear import Norm
from mia.lenses.walk import ByColumn, Plus, Product, Times, walk
from mia.sites import Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mia.engine.graph import Topology
    from mia.llama.weights import Weights

#: bytes of rows that are kept: a sweep asks for those of one or two sets of tokens, again and again
_KEPT_BYTES = 64 << 20


class Unembedding:
    """From rows at `final_norm` (n, n_embd) to the logits of some tokens (n, n_tokens)."""

    def __init__(self, topology: Topology, weights: Weights, *, architecture: str):
        """Raises `ModelError` if the graph has an operation there that mia does not know."""
        steps = walk(
            topology, weights, Site("final_norm"), Site("logits"), architecture=architecture
        )
        products = [i for i, step in enumerate(steps) if isinstance(step, Product)]
        if len(products) != 1:
            raise ModelError(f"{architecture} has {len(products)} matrices behind its final norm")
        if any(isinstance(step, Norm) for step in steps):
            raise ModelError(f"{architecture} has a norm behind its final norm")
        every = [step for step in steps if not isinstance(step, (Norm, Product))]
        self._before, self._after = every[: products[0]], every[products[0] :]
        product = steps[products[0]]
        assert isinstance(product, Product)
        self._weights, self._matrix = weights, product.name
        self._known: dict[tuple[int, ...], tuple[Array, list[ByColumn]]] = {}

    def __call__(self, rows: Array, tokens: Sequence[int]) -> Array:
        """(n, n_tokens) float32"""
        matrix, after = self._of(tuple(tokens))
        x = rows
        with np.errstate(over="ignore", invalid="ignore"):  # whoever reads them looks at that
            for step in self._before:
                x = step(x)
            x = x @ matrix.T
            for step in after:
                x = step(x)
        return np.asarray(x, np.float32)

    def _of(self, tokens: tuple[int, ...]) -> tuple[Array, list[ByColumn]]:
        """The tokens' rows of the matrix (n_tokens, n_embd), and the steps on their logits."""
        known = self._known.get(tokens)
        if known is None:
            read = self._weights.rows
            matrix = np.concatenate([read(self._matrix, t, t + 1) for t in tokens])
            after = [
                type(s)(s.vector[list(tokens)]) if isinstance(s, (Plus, Times)) else s
                for s in self._after
            ]
            known = matrix, after
            kept = sum(m.nbytes for m, _ in self._known.values())
            if kept + matrix.nbytes > _KEPT_BYTES:
                self._known.clear()
            if matrix.nbytes <= _KEPT_BYTES:
                self._known[tokens] = known
        return known

    def agrees(self, rows: Array, logits: Array) -> bool:
        """Whether the model's own logits (n, n_vocab) of these rows are the same, but for the 8 bits
        that llama.cpp rounds rows to before a quantized unembedding."""
        tokens = np.linspace(0, logits.shape[1] - 1, 64).astype(int).tolist()
        error = np.abs(self(rows, tokens) - logits[:, tokens]).max()
        return bool(error < 0.02 * np.ptp(logits))
