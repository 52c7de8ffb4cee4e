"""What a lens reads in residuals."""

from __future__ import annotations

from dataclasses import dataclass

from mia.arrays import Array, IntArray


@dataclass(frozen=True, slots=True)
class Readout:
    """What a lens reads in n residuals.

    Attributes:
        ids, logits, probs: (n, k) the best tokens, best first.
        logsumexp: (n,) natural log of the sum over the vocabulary.
        token_logits: (n, n_tokens) logits of the tokens asked for.
        entropy: (n,) of the whole distribution, in nats.
    """

    ids: IntArray
    logits: Array
    probs: Array
    logsumexp: Array
    token_logits: Array
    entropy: Array

    @property
    def token_logprobs(self) -> Array:
        """(n, n_tokens) log-probabilities of the tokens asked for."""
        return self.token_logits - self.logsumexp[:, None]
