"""The logit lens: a residual of any layer through the model's own unembedding.

`LogitLens` is nostalgebraist's (2020): the final norm and unembedding of the model, applied to
the residual of any layer. Its steps are read off the graph, so that LayerNorm, biases, logit
scales and soft-capping are applied on the architectures that have them.

The scores of all rows over a vocabulary of 50,000 to 260,000 are never in memory at once: the
unembedding is dequantized and multiplied in blocks, and what stays is a running top-k, a
running log-sum-exp, and the logits of the tokens asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.engine.delegate import check
from mia.errors import ModelError, RangeError, UsageError
from mia.lenses.linear import Array as AnyFloats, Norm, split
from mia.lenses.readout import Readout
from mia.lenses.table import LensTable, lens_rows
from mia.lenses.top_k import TopK
from mia.lenses.walk import ByColumn, Product, Tanh, Times, walk
from mia.sites import LENS_READS, Site

if TYPE_CHECKING:
    from mia.engine.graph import Topology
    from mia.io.activations import Activations
    from mia.llama.weights import Weights


#: floats of scores held at a time, and of the unembedding
_BLOCK, _MATRIX_BLOCK = 4 << 20, 4 << 20
#: rows that go through the vocabulary together
_ROWS = 4096


class LogitLens:
    """A model's final norm and unembedding.

    `Model.lens` makes one, and checks it against the model's own logits.
    """

    def __init__(
        self,
        topology: Topology,
        weights: Weights,
        *,
        architecture: str,
        described: Callable[[int], dict[str, Any]] = lambda t: {"id": t, "text": str(t)},
    ):
        """`described`: {"id": …, "text": …} of a token id, for tables.

        Raises `ModelError` if the graph's end has an operation that the lens does not know."""
        begin, end = Site("resid_post", topology.n_layer - 1), Site("logits")
        steps = walk(topology, weights, begin, end, architecture=architecture)
        products = [step for step in steps if isinstance(step, Product)]
        if len(products) != 1:
            raise ModelError(
                f"the lens needs one unembedding; {architecture} has {len(products)} matrices "
                "behind its last block"
            )
        middle = steps.index(products[0])
        self._before = [step for step in steps[:middle] if not isinstance(step, Product)]
        self._after: list[ByColumn] = []  # act on the logits
        for step in steps[middle + 1 :]:
            if isinstance(step, (Norm, Product)):
                raise ModelError(f"the lens does not know the norm of logits of {architecture}")
            self._after.append(step)
        self._weights, self._matrix, self._described = weights, products[0].name, described
        self.n_embd = topology.sites[begin].shape[0]
        self.n_vocab = topology.sites[end].shape[0]

    def __call__(self, activations: Activations, k: int = 5, *, norm: bool = True) -> LensTable:
        """Reads activations (`Model.look`) as a table that prints and plots.

        Args:
            k: how many tokens of each row.
            norm: see `read`.

        Raises:
            UsageError: a site that a lens does not read.
        """
        sites = activations.sites
        for s in sites:
            if not s.kind.lens:
                raise UsageError(f"a lens does not read {s}; it reads {', '.join(LENS_READS)}")
        rows = np.concatenate([activations[s] for s in sites])
        places = [(s.llama, s, i) for s in sites for i in activations.positions]
        return LensTable(
            facts=activations.facts,
            tokens=activations.prompt,
            lens=lens_rows(self.read(rows, k, norm=norm), places, self._described),
            n_tokens=len(activations.positions),
        )

    def check(self, h: Array, logits: Array, *, model: str) -> None:
        """Holds the lens at the last layer against the model's own logits.

        Args:
            h: (n, n_embd) outputs of the last block.
            logits: (n, n_vocab) what the model makes of them.
            model: what an error calls it.

        Raises:
            ModelError: they differ.
        """
        # llama.cpp rounds activations to 8 bits before a quantized unembedding
        error = float(np.abs(self.logits(h) - logits).max() / np.maximum(np.ptp(logits), 1e-6))
        if not error < 0.02:
            raise ModelError(
                f"the lens at the last layer of {model} differs from the model's own logits "
                f"by {error:.1%} of their range; refusing to show wrong numbers"
            )

    # -- use ---------------------------------------------------------------------

    def read(
        self, h: Array, k: int = 10, *, tokens: Sequence[int] = (), norm: bool = True
    ) -> Readout:
        """The best k tokens of each row of h (n, n_embd), in time and memory for k.

        Args:
            tokens: token ids whose logits are returned as well.
            norm: False leaves out the division by the root mean square (LayerNorm:
                centring and division), as the first llama.cpp tools did.
        """
        x = self._prepared(h, norm)
        k = min(k, self.n_vocab)
        if k < 1:
            raise RangeError(f"k must be at least 1, got {k}")
        for t in tokens:
            self._check_token(t)
        parts = [self._read_rows(x[i : i + _ROWS], k, tokens) for i in range(0, len(x), _ROWS)]
        if len(parts) == 1:
            return parts[0]
        fields = ("ids", "logits", "probs", "logsumexp", "token_logits", "entropy")
        return Readout(*(np.concatenate([getattr(p, f) for p in parts]) for f in fields))

    def logits(self, h: Array, *, norm: bool = True) -> Array:
        """All scores (n, n_vocab) at once, for a small number of rows."""
        x = self._prepared(h, norm)
        return np.concatenate([b for _, _, b in self._blocks(x)], axis=1)

    def direction(self, token: int) -> Array:
        """(n_embd,): the direction of a token in the residual stream. The norm's weight is folded
        in, so that a residual without this direction has lens logit 0 for the token (RMSNorm)."""
        self._check_token(token)
        row = self._weights.rows(self._matrix, token, token + 1)[0]  # (n_embd,)
        for step in reversed(self._before):
            if isinstance(step, Times):
                row = step(row)
        return row

    def attribute(self, parts: Array, token: int) -> tuple[AnyFloats, float, float]:
        """What each of the parts (n, n_embd) of a last residual, their sum, gives to a logit.

        The final norm is frozen at the size of the sum; the logit is the one before soft-capping.

        Returns:
            (n,) the parts' shares; the share of biases; and the model's logit of both, after
            soft-capping if it has that.
        """
        rows, constant = split(self._before, parts, np.zeros(self.n_embd, np.float32))
        row = self._weights.rows(self._matrix, token, token + 1)[0].astype(np.float64)
        capped = [step.columns(token, token + 1) for step in self._after]
        uncapped = [step for step in capped if not isinstance(step, Tanh)]
        zero = _through(uncapped, np.zeros(1))
        shares = _through(uncapped, (rows @ row)[:, None])[:, 0] - zero
        logit = _through(capped, np.asarray([(rows @ row).sum() + constant @ row]))
        bias = _through(uncapped, np.asarray([constant @ row]))
        return shares, float(bias[0]), float(logit[0])

    @property
    def capped(self) -> bool:
        """Whether the model soft-caps its logits."""
        return any(isinstance(step, Tanh) for step in self._after)

    def unembed(self, h: Array, k: int = 10) -> Readout:
        """The best k tokens of each row of h (n, n_embd) by the unembedding alone, without the
        final norm and its weight."""
        x = np.ascontiguousarray(np.atleast_2d(h), np.float32)
        self._check_width(x)
        if not 1 <= k <= self.n_vocab:
            raise RangeError(f"k must be 1 to {self.n_vocab}, got {k}")
        return self._read_rows(x, k, ())

    # -- the pieces --------------------------------------------------------------

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise RangeError(
                f"token id {token} is out of range; the vocabulary has 0 to {self.n_vocab - 1}"
            )

    def _check_width(self, x: Array) -> None:
        if x.ndim != 2 or x.shape[1] != self.n_embd:
            raise UsageError(f"a lens reads rows of {self.n_embd}, not shape {x.shape}")

    def _prepared(self, h: Array, norm: bool) -> Array:
        """What the unembedding multiplies: (n, n_embd)."""
        x = np.atleast_2d(np.asarray(h, np.float32))
        self._check_width(x)
        for step in self._before:
            if norm or not isinstance(step, Norm):
                x = step(x)
        return np.ascontiguousarray(x)

    def _blocks(self, x: Array) -> Iterator[tuple[int, int, Array]]:
        """Yields (first token, last token + 1, scores (n, block)); the scores are reused."""
        size = max(min(max(_BLOCK // max(len(x), 1), 512), _MATRIX_BLOCK // self.n_embd), 1)
        for start in range(0, self.n_vocab, size):
            check()
            stop = min(start + size, self.n_vocab)
            scores = x @ self._weights.rows(self._matrix, start, stop).T
            yield start, stop, _through([s.columns(start, stop) for s in self._after], scores)

    def _read_rows(self, x: Array, k: int, tokens: Sequence[int]) -> Readout:
        n = len(x)
        best = TopK(n, k)
        top = np.full(n, -np.inf, np.float32)
        total = np.zeros(n, np.float64)  # sum of e = exp(score - top)
        weighted = np.zeros(n, np.float64)  # sum of e × (score - top)
        ids = np.asarray(tokens, np.intp)
        token_logits = np.empty((n, len(ids)), np.float32)
        for start, stop, scores in self._blocks(x):
            high = scores.max(1)
            best.add(start, scores, high)
            inside = (ids >= start) & (ids < stop)
            token_logits[:, inside] = scores[:, ids[inside] - start]
            new = np.maximum(top, high)
            scores -= new[:, None]
            e = np.exp(scores)
            scores *= e
            if start:
                moved = (new - top).astype(np.float64)
                weighted = (weighted - moved * total) * np.exp(-moved)
                total *= np.exp(-moved)
            total += e.sum(1)
            weighted += scores.sum(1)
            top = new
        lse = (top + np.log(total)).astype(np.float32)
        entropy = np.maximum(np.log(total) - weighted / total, 0).astype(np.float32)
        best_ids, logits = best.sorted()
        probs = np.exp(logits - lse[:, None])
        return Readout(best_ids, logits, probs, lse, token_logits, entropy)


def _through(steps: Sequence[ByColumn], x: AnyFloats) -> AnyFloats:
    for step in steps:
        x = step(x)
    return x
