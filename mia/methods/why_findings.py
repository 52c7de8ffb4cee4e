"""What `mia.methods.why` finds: effects of spans, causal map, components, lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.methods.attribution import Attribution
from mia.spans import Span

if TYPE_CHECKING:
    from mia.generation import Token

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prompted:
    """A prompt, its answer, and how it is cut.

    Attributes:
        spans: those that could be the reason; asking: the positions of what asks, the last span.
        sinks: positions of attention sinks.
    """

    tokens: Sequence[int]
    answer: Sequence[int]
    spans: Sequence[Span]
    asking: range
    sinks: frozenset[int]

    @property
    def whole(self) -> list[int]:
        """The prompt with the answer's tokens that are read to predict the rest of it."""
        return [*self.tokens, *self.answer[:-1]]

    def without_sinks(self, span: Span) -> list[int]:
        return [i for i in span.positions if i not in self.sinks]

    def only(self, positions: Sequence[int]) -> list[int]:
        """A prompt of some positions besides the sinks before what asks, and what asks."""
        kept = sorted({*positions, *(i for i in self.sinks if i < self.asking.start)})
        return [*(self.tokens[i] for i in kept), *self.whole[self.asking.start :]]


@dataclass(frozen=True)
class SpanEffect:
    """What a span does to the answer's log-probability, in nats.

    Attributes:
        blocked: the change if nobody behind the span attends to it.
        alone: the change if it is all that the prompt has besides what asks.
    """

    span: Span
    blocked: float
    alone: float

    @property
    def score(self) -> float:
        """The mean of what its absence costs and what its presence alone brings."""
        return (self.alone - self.blocked) / 2


@dataclass(frozen=True)
class Apart:
    """An attention sink, and what blocking it does."""

    position: int
    blocked: float


@dataclass(frozen=True)
class Measured:
    """What one run says of all spans; `token_forwards` is how many rows it decodes, what requests
    begin with in common once."""

    spans: Sequence[SpanEffect]
    apart: Sequence[Apart]
    clean: float
    bare: float
    floor: float
    token_forwards: int


@dataclass(frozen=True)
class Column:
    label: str
    positions: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CausalMap:
    """values (n_layers, n_columns): the answer's log-probability with noise on the span of the highest score, and
    one column's residuals of one layer restored; the mean over draws of the noise."""

    layers: Sequence[int]
    columns: Sequence[Column]
    values: Values
    corrupted: float
    floor: float
    n_draws: int

    def restored(self, clean: float) -> Values:
        """The same as a share: 0 as with the noise, 1 as without; NaN if both are the same."""
        gap = clean - self.corrupted
        if abs(gap) <= self.floor:
            return np.full(self.values.shape, np.nan)
        return (self.values - self.corrupted) / gap


@dataclass(frozen=True)
class Reading:
    """What a head looks at from the prompt's last token: the span of the most weight (its place in
    the prompt), its weight, that of what asks, and that of the sinks."""

    span: int
    weight: float
    asking: float
    sinks: float


@dataclass(frozen=True)
class Component:
    """A head or an MLP: its share of the logit of the answer's first token, and what the answer's
    log-probability loses without it, in nats."""

    kind: str
    layer: int
    head: int | None
    share: float
    drop: float
    reading: Reading | None = None

    @property
    def name(self) -> str:
        return f"MLP {self.layer}" if self.head is None else f"{self.layer}.{self.head}"


@dataclass(frozen=True, eq=False)
class Components:
    shares: Attribution
    listed: Sequence[Component]
    floor: float


@dataclass(frozen=True)
class LensAtEnd:
    """What each layer's residual at the prompt's last token would say: probability and rank of the
    answer's first token, and the most likely token."""

    layers: Sequence[int]
    prob: Sequence[float]
    rank: Sequence[int]
    top: Sequence[Token]
    top_prob: Sequence[float]

    @property
    def first_from(self) -> int | None:
        """The layer from which on the answer is first."""
        layer = None
        for i, rank in zip(self.layers, self.rank, strict=True):
            layer = None if rank > 1 else i if layer is None else layer
        return layer
