"""Some tokens followed through the layers: how probable each is at every row, and its rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, IntArray
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.lenses.logit_lens import LogitLens

#: scores in memory at a time
_SCORES = 16 << 20


@dataclass(frozen=True, eq=False, slots=True)
class Followed:
    """What a lens says of chosen tokens at n rows.

    Attributes:
        logprobs: (n, m) natural log-probability.
        ranks: (n, m) 1 for the most probable token of the vocabulary; tokens of equal logits share
            the smallest rank.
    """

    logprobs: Array
    ranks: IntArray


def follow(lens: LogitLens, h: Array, tokens: IntArray) -> Followed:
    """Log-probability and rank of tokens in residuals.

    A rank needs the whole vocabulary of a row, so this takes longer than `LogitLens.read`.

    Args:
        h: (n, n_embd) residuals.
        tokens: (n, m) token ids, those of each row.

    Raises `UsageError` unless there are tokens for each row.
    """
    if tokens.ndim != 2 or len(tokens) != len(h):
        raise UsageError(f"tokens of shape {tokens.shape} are not those of {len(h)} rows")
    size = max(1, _SCORES // lens.n_vocab)
    logprobs = np.empty(tokens.shape, np.float32)
    ranks = np.empty(tokens.shape, np.intp)
    for start in range(0, len(h), size):
        scores = lens.logits(h[start : start + size])  # (n_rows, n_vocab)
        for i, row in enumerate(scores, start):
            own = row[tokens[i]]
            top = row.max()
            total = float(top) + float(np.log(np.exp(row - top).sum(dtype=np.float64)))
            logprobs[i] = own - total
            row.sort()
            ranks[i] = len(row) - np.searchsorted(row, own, side="right") + 1
    return Followed(logprobs, ranks)
