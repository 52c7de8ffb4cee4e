"""A prompt for the commands about heads, and what the oracle says of it."""

from collections.abc import Callable

import numpy as np
from oracle import Oracle

PROMPT = "The capital of France is the capital of"
N, LAYERS, HEADS = 8, 3, 6
Function = Callable[[np.ndarray], np.ndarray]


def patterns(
    oracle: Oracle, tokens: list[int], edits: dict[str, Function] | None = None
) -> np.ndarray:
    """(n_layer, n_head, n_query, n_key)."""
    sites = oracle.run(tokens, edits or {})
    return np.stack([sites[f"attn_pattern.{i}"] for i in range(oracle.n_layer)]).swapaxes(1, 2)


def without_head(oracle: Oracle, head: int, rows: slice = slice(None)) -> Function:
    """An edit of `head_out` that puts zeros at a head, in some rows."""

    def edit(z: np.ndarray) -> np.ndarray:
        z.reshape(len(z), oracle.n_head, -1)[rows, head] = 0
        return z

    return edit


def log_prob(logits: np.ndarray, token: int) -> float:
    return float(logits[token] - np.log(np.exp(logits).sum()))
