"""Lenses: from residual vectors to scores over the vocabulary.

`LogitLens` is nostalgebraist's (2020): the model's own final norm and unembedding,
applied to a residual of any layer. Which operations those are is read off the
graph, from the last block's output to the logits, so that LayerNorm, biases, logit
scales and soft-capping are done where an architecture has them. It is checked
against the model's own logits at first use.

The scores of all rows over a vocabulary of 50,000 to 260,000 are never held at
once: blocks of the unembedding are dequantized and multiplied, and what is kept is
a running top-k, a running log-sum-exp, and the tokens asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mia.errors import ModelError, RangeError, UsageError
from mia.lenses.linear import Norm, split
from mia.request import Capture, Request
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]
Step = Callable[[Array], Array]

#: floats of scores held at a time
_BLOCK = 4 << 20
#: rows that go through the vocabulary together
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Readout:
    """What a lens saw in n residuals.

    Attributes:
        ids, logits, probs: (n, k) the best tokens, best first.
        logsumexp: (n,) natural log of the sum over the vocabulary.
        wanted: (n, n_wanted) logits of the tokens asked for.
    """

    ids: IntArray
    logits: Array
    probs: Array
    logsumexp: Array
    wanted: Array

    @property
    def wanted_logprobs(self) -> Array:
        return self.wanted - self.logsumexp[:, None]


class Lens(Protocol):
    """A map from residuals (n, n_embd) to vocabulary scores."""

    def read(
        self, h: Array, k: int = ..., *, wanted: Sequence[int] = ..., norm: bool = ...
    ) -> Readout:
        """The best k tokens of each row."""
        ...


class LogitLens:
    """The model's final norm and unembedding."""

    def __init__(self, model: Model):
        """Raises `ModelError` where the graph's tail has an operation that is not known, or
        where the result differs from the model's own logits."""
        self._weights = model.weights
        self.n_embd, self.n_vocab = model.n_embd, model.n_vocab
        self._before: list[tuple[str, Step]] = []
        self._after: list[Callable[[Array, int, int], Array]] = []
        self._caps: list[Callable[[Array, int, int], Array]] = []  # those of them that bend
        self._matrix = ""
        self._read_graph(model)
        self._check(model)

    # -- use ---------------------------------------------------------------------

    def read(
        self, h: Array, k: int = 10, *, wanted: Sequence[int] = (), norm: bool = True
    ) -> Readout:
        """The best k tokens of each row of h (n, n_embd), in time and memory for k.

        Args:
            wanted: token ids whose logits are returned as well.
            norm: False leaves out the division by the root mean square (LayerNorm:
                centring and division), as the first llama.cpp tools did.
        """
        x = self._prepared(h, norm)
        k = min(k, self.n_vocab)
        if k < 1:
            raise RangeError(f"k is {k}; at least one token must be asked for")
        for t in wanted:
            if not 0 <= t < self.n_vocab:
                raise RangeError(
                    f"token id {t} is out of range; the vocabulary has 0 to {self.n_vocab - 1}"
                )
        parts = [self._read_rows(x[i : i + _ROWS], k, wanted) for i in range(0, len(x), _ROWS)]
        if len(parts) == 1:
            return parts[0]
        fields = ("ids", "logits", "probs", "logsumexp", "wanted")
        return Readout(*(np.concatenate([getattr(p, f) for p in parts]) for f in fields))

    def logits(self, h: Array, *, norm: bool = True) -> Array:
        """All scores (n, n_vocab): for few rows."""
        x = self._prepared(h, norm)
        return np.concatenate([b for _, _, b in self._blocks(x)], axis=1)

    def direction(self, token: int) -> Array:
        """(n_embd,): where a residual points for this token. The norm's weight is folded in, so
        that a residual without this direction has lens logit 0 for the token (RMSNorm)."""
        if not 0 <= token < self.n_vocab:
            raise RangeError(
                f"token id {token} is out of range; the vocabulary has 0 to {self.n_vocab - 1}"
            )
        row = self._weights.rows(self._matrix, token, token + 1)[0]
        for kind, step in reversed(self._before):
            if kind == "weight":
                row = step(row)
        return row

    def attribute(self, parts: Array, token: int) -> tuple[Array, float, float]:
        """What each of the parts (n, n_embd) of a last residual, their sum, gives to a logit.

        The final norm is held as it divides the sum; the logit is the one before soft-capping.

        Returns:
            (n,) the parts' shares; the share of biases; and the logit that the model makes of
            both, after soft-capping where it does that.
        """
        steps = [step for _, step in self._before]
        rows, constant = split(steps, parts, np.zeros(self.n_embd, np.float32))
        row = self._weights.rows(self._matrix, token, token + 1)[0].astype(np.float64)

        def straight(scores: Any) -> Any:
            for step in self._after:
                scores = scores if step in self._caps else step(scores, token, token + 1)
            return scores

        zero = straight(np.zeros(1))
        shares = straight((rows @ row)[:, None])[:, 0] - zero
        logit = np.asarray([(rows @ row).sum() + constant @ row])
        for after in self._after:
            logit = after(logit, token, token + 1)
        return shares, float(straight(np.asarray([constant @ row]))[0]), float(logit[0])

    @property
    def capped(self) -> bool:
        """Whether the model bends its logits at the end (soft-capping)."""
        return bool(self._caps)

    def unembed(self, h: Array, k: int = 10) -> Readout:
        """The best k tokens of each row of h (n, n_embd) by the unembedding alone: no final norm, no
        weight of it."""
        x = np.ascontiguousarray(np.atleast_2d(h), np.float32)
        if x.ndim != 2 or x.shape[1] != self.n_embd:
            raise UsageError(f"a lens reads rows of {self.n_embd}, not shape {np.shape(h)}")
        if not 1 <= k <= self.n_vocab:
            raise RangeError(f"k is {k}; 1 to {self.n_vocab} tokens can be asked for")
        return self._read_rows(x, k, ())

    # -- the pieces --------------------------------------------------------------

    def _prepared(self, h: Array, norm: bool) -> Array:
        x = np.asarray(h, np.float32)
        if x.ndim == 1:
            x = x[None]
        if x.ndim != 2 or x.shape[1] != self.n_embd:
            raise UsageError(f"a lens reads rows of {self.n_embd}, not shape {np.shape(h)}")
        for kind, step in self._before:
            if norm or kind != "norm":
                x = step(x)
        return np.ascontiguousarray(x)

    def _blocks(self, x: Array):  # type: ignore[no-untyped-def]
        """Yields (first token, last token + 1, scores (n, block)); the scores are reused."""
        size = int(np.clip(_BLOCK // max(len(x), 1), 512, 16384))
        for start in range(0, self.n_vocab, size):
            stop = min(start + size, self.n_vocab)
            scores = x @ self._weights.rows(self._matrix, start, stop).T
            for step in self._after:
                scores = step(scores, start, stop)
            yield start, stop, scores

    def _read_rows(self, x: Array, k: int, wanted: Sequence[int]) -> Readout:
        n = len(x)
        best = _TopK(n, k)
        top = np.full(n, -np.inf, np.float32)
        total = np.zeros(n, np.float64)
        asked = np.asarray(wanted, np.intp)
        found = np.empty((n, len(asked)), np.float32)
        for start, stop, scores in self._blocks(x):
            high = scores.max(1)
            best.add(start, scores, high)
            inside = (asked >= start) & (asked < stop)
            found[:, inside] = scores[:, asked[inside] - start]
            new = np.maximum(top, high)
            scores -= new[:, None]
            np.exp(scores, out=scores)
            total = total * np.exp(top - new, dtype=np.float64) + scores.sum(1)
            top = new
        lse = (top + np.log(total)).astype(np.float32)
        ids, logits = best.sorted()
        return Readout(ids, logits, np.exp(logits - lse[:, None]), lse, found)

    # -- making it ---------------------------------------------------------------

    def _read_graph(self, model: Model) -> None:
        """Walks from the logits back to the last block's output, and notes each operation."""
        topology, weights = model.topology, self._weights
        end = topology.sites.get(Site("logits"))
        begin = topology.sites.get(Site("resid_post", model.n_layer - 1))
        if end is None or begin is None:
            raise ModelError(f"{model.architecture} has no logits or no last block output to read")
        stop = topology.nodes[begin.index].addr
        node, after = topology.nodes[end.index], True
        before: list[tuple[str, Step]] = []
        posts: list[Callable[[Array, int, int], Array]] = []
        while node.addr != stop:
            if node.op == "MUL_MAT" and after:
                self._matrix, after = topology.node(node.src[0]).name, False
                source = node.src[1]
            elif node.op in ("ADD", "MUL") and topology.is_leaf(node.src[1]):
                v = weights.vector(topology.node(node.src[1]).name)
                if after:
                    posts.append(_sliced(node.op, v))
                else:
                    before.append(("weight", _times(v)) if node.op == "MUL" else ("bias", _plus(v)))
                source = node.src[0]
            elif node.op in ("SCALE", "TANH", "RMS_NORM", "NORM"):
                step = _function(node.op, node.param_f32(0), node.param_f32(1))
                if after:
                    posts.append(lambda x, a, b, step=step: step(x))  # type: ignore[misc]
                    if node.op == "TANH":
                        self._caps.append(posts[-1])
                else:
                    before.append(("norm" if "NORM" in node.op else "scale", step))
                source = node.src[0]
            elif node.op in ("RESHAPE", "VIEW", "CONT", "GET_ROWS"):
                source = node.src[0]
            else:
                raise ModelError(
                    f"the lens does not know {node.op} at the end of {model.architecture}"
                )
            if topology.is_leaf(source):
                raise ModelError(
                    f"the logits of {model.architecture} do not come from its last block alone"
                )
            node = topology.node(source)
        self._before, self._after = before[::-1], posts[::-1]

    def _check(self, model: Model) -> None:
        """The lens at the last layer must give the model's own logits."""
        tokens = [t % model.n_vocab for t in (7, 11, 13, 17)]
        last = Site("resid_post", model.n_layer - 1)
        out = model.run([Request(tokens, captures=[Capture(last)], logits="all")])[0]
        assert out.logits is not None
        ours, theirs = self.logits(out.captures[last]), out.logits
        # llama.cpp rounds the activations to 8 bits where the unembedding is quantized
        error = float(np.abs(ours - theirs).max() / np.maximum(np.ptp(theirs), 1e-6))
        if not error < 0.02:
            raise ModelError(
                f"the lens at the last layer of {model.name} differs from the model's own logits "
                f"by {error:.1%} of their range; refusing to show wrong numbers"
            )


class _TopK:
    """The k largest of rows that come in blocks of columns."""

    def __init__(self, n: int, k: int):
        self.n, self.k = n, k
        self.values = np.full((n, k), -np.inf, np.float32)
        self.ids = np.zeros((n, k), np.intp)
        self.least = np.full(n, -np.inf, np.float32)

    def add(self, start: int, block: Array, high: Array) -> None:
        """`high` (n,): the block's largest value in each row; few rows have something new."""
        rows = np.flatnonzero(high > self.least)
        if not len(rows):
            return
        part = block if len(rows) == self.n else block[rows]
        if np.isneginf(self.least[rows[0]]):
            # a few columns give a threshold that most of the others stay below
            seed = max(self.k, 512)
            first = part[:, :seed]
            keep = min(self.k, first.shape[1])
            cols = np.argpartition(first, -keep, axis=1)[:, -keep:]
            self._merge(rows, np.take_along_axis(first, cols, 1), cols + start)
            part, start = part[:, seed:], start + seed
        r, c = np.nonzero(part > self.least[rows, None])
        if not len(r):
            return
        counts = np.bincount(r, minlength=len(rows))
        slot = np.arange(len(r)) - np.repeat(np.cumsum(counts) - counts, counts)
        values = np.full((len(rows), counts.max()), -np.inf, np.float32)
        ids = np.zeros(values.shape, np.intp)
        values[r, slot], ids[r, slot] = part[r, c], c + start
        self._merge(rows, values, ids)

    def _merge(self, rows: IntArray, values: Array, ids: IntArray) -> None:
        values = np.concatenate([self.values[rows], values], 1)
        ids = np.concatenate([self.ids[rows], ids], 1)
        keep = np.argpartition(values, -self.k, axis=1)[:, -self.k :]
        self.values[rows] = np.take_along_axis(values, keep, 1)
        self.ids[rows] = np.take_along_axis(ids, keep, 1)
        self.least[rows] = self.values[rows].min(1)

    def sorted(self) -> tuple[IntArray, Array]:
        order = np.argsort(-self.values, axis=1, kind="stable")
        return np.take_along_axis(self.ids, order, 1), np.take_along_axis(self.values, order, 1)


def _times(v: Array) -> Step:
    return lambda x: x * v


def _plus(v: Array) -> Step:
    return lambda x: x + v


def _sliced(op: str, v: Array) -> Callable[[Array, int, int], Array]:
    if op == "ADD":
        return lambda x, a, b: x + v[a:b]
    return lambda x, a, b: x * v[a:b]


def _function(op: str, p0: float, p1: float) -> Step:
    if op == "SCALE":
        return lambda x: x * np.float32(p0) + np.float32(p1)
    if op == "TANH":
        return lambda x: np.tanh(x)
    return Norm(p0, centred=op == "NORM")
