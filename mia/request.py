"""What goes into `Model.run` and what comes out: requests and results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from mia.arrays import Array
from mia.edits import Edit, Tokens
from mia.errors import SiteError, UsageError
from mia.sites import Site
from mia.values import flag, number, shown, token_indices, whole, wholes

T = TypeVar("T")


def one_or_more(given: T | Iterable[T], kind: type[T]) -> Sequence[T]:
    """Several edits or captures; a list of one for one by itself. Raises `UsageError` for others."""
    if isinstance(given, kind):
        return [given]
    name = kind.__name__
    if not isinstance(given, Iterable):
        raise UsageError(f"{shown(given)} is no {name}, nor several of them")
    several = given if isinstance(given, (list, tuple)) else list(given)
    for item in several:
        if not isinstance(item, kind):
            raise UsageError(f"{shown(item)} is not of type {name}")
    return cast(Sequence[T], several)


@dataclass(frozen=True, slots=True)
class Capture:
    """A read at one or several sites.

    Attributes:
        sites: any spelling, or several: `"l_out"`, `["q.3", "k.3"]`, `Site("logits")`.
        tokens: which prompt tokens; None for all.
        generated: also the generated tokens that the model was run on (all but the last).
    """

    sites: str | Site | Sequence[str | Site]
    tokens: Tokens = None
    generated: bool = False

    def __post_init__(self) -> None:
        sites = self.sites
        if not isinstance(sites, (str, Site)):
            if not isinstance(sites, Iterable):
                raise UsageError(f"a capture's sites are names or Sites, not {shown(sites)}")
            sites = list(sites)
            for site in sites:
                if not isinstance(site, (str, Site)):
                    raise UsageError(f"a capture's sites are names or Sites, not {shown(site)}")
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "tokens", token_indices(self.tokens, "tokens of a capture"))
        flag(self.generated, "generated of a capture")


#: of temperature and penalties, or of one divided by them: beyond it logits overflow
_LARGEST = 1e20
#: a C int
_MOST_TOP_K = 2**31 - 1
#: fields of Sampling, their type, and what messages call them
_SAMPLING: tuple[tuple[str, Callable[[Any, str], float], str], ...] = (
    ("temperature", number, "temperature"),
    ("top_k", whole, "top-k"),
    ("top_p", number, "top-p"),
    ("min_p", number, "min-p"),
    ("repeat_penalty", number, "repeat penalty"),
    ("frequency_penalty", number, "frequency penalty"),
    ("presence_penalty", number, "presence penalty"),
    ("seed", whole, "seed"),
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; greedy by default. llama.cpp's own samplers.

    Attributes:
        temperature: 0 is greedy.
        top_k, top_p, min_p: off at 0, 1 and 0.
        repeat_penalty, frequency_penalty, presence_penalty: over the last 64 tokens.
        seed: the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, check, what in _SAMPLING:  # numpy's numbers become Python's
            object.__setattr__(self, name, check(getattr(self, name), what))
        for name, _, what in _SAMPLING:
            if name.endswith("penalty") and abs(getattr(self, name)) > _LARGEST:
                raise UsageError(f"{what} {getattr(self, name)} is too large")
        if not self.temperature >= 0:
            raise UsageError(f"temperature {self.temperature} is negative")
        if self.temperature > _LARGEST or 0 < self.temperature < 1 / _LARGEST:
            raise UsageError(
                f"temperature {self.temperature} is not in {1 / _LARGEST:g} to {_LARGEST:g}; 0 is greedy"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise UsageError(f"min-p {self.min_p} is not in [0, 1)")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is negative")
        if self.top_k > _MOST_TOP_K:
            raise UsageError(f"top-k {self.top_k} is more than {_MOST_TOP_K}")
        if not self.repeat_penalty >= 1 / _LARGEST:
            raise UsageError(f"repeat penalty {self.repeat_penalty} is not positive")
        if not 0 <= self.seed < 2**32 - 1:  # 2^32 - 1 is llama.cpp's word for a random seed
            raise UsageError(f"seed {self.seed} is not in 0 to {2**32 - 2}")

    @property
    def plain(self) -> bool:
        """True for the largest logit and nothing else."""
        return self.temperature == 0 and (
            (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)
        )


class TokenMetric:
    """A `Request.metric` that reads the logits of a few tokens: then the unembedding, 15 to 24 % of a
    sweep over SmolLM2-135M (Q4_1, F16), is left out where nothing else of a batch reads logits.

    The logits are the final norm's rows times the tokens' rows of the unembedding, as the file
    has them. On quantized files llama.cpp rounds the former to 8 bits, and its own logits differ by
    that noise. So the metrics of one run all read the same: llama.cpp's logits, where an architecture
    has steps there that mia does not know, edits of one of them change `logits` themselves, or one is
    of more than 256 tokens (`mia.engine.limits.METRIC_TOKENS`); or else mia's. Steering by llama.cpp's
    control vector changes nothing about that.

    Attributes:
        tokens: ids of the tokens that it reads.
    """

    tokens: tuple[int, ...]

    def of(self, logits: Array) -> Any:
        """The value, from the tokens' logits (n_positions, n_tokens)."""
        raise NotImplementedError

    def __call__(self, logits: Array) -> Any:
        return self.of(logits[:, list(self.tokens)])


class RowMetric:
    """A `Request.metric` that is given the logits of one position at a time: those of a long prompt
    are never held together. `Result.value` is the list of what it returned, a value for each position
    of `Request.logits`."""

    def row(self, i: int, logits: Array) -> Any:
        """The value of the i-th position asked for, from its logits (n_vocab,), valid only during
        the call."""
        raise NotImplementedError

    def __call__(self, logits: Array) -> list[Any]:
        return [self.row(i, row) for i, row in enumerate(logits)]


class TokenLogits(TokenMetric):
    """A metric: the logits of some tokens, (n_positions, n_tokens) float32."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = tuple(wholes(tokens, "tokens of a metric"))
        if not self.tokens:
            raise UsageError("a metric of tokens needs at least one")

    def of(self, logits: Array) -> Any:
        return np.array(logits)


class LogitSum(TokenMetric):
    """A metric: a weighted sum of the logits of some tokens.

    It is a float; of several positions (n_positions,) float32.
    """

    def __init__(self, weights: Mapping[int, float]):
        """`weights`: token id -> the weight of its logit."""
        if not isinstance(weights, Mapping):
            raise UsageError(
                f"a sum of logits maps each token id to its weight, not {shown(weights)}"
            )
        if not weights:
            raise UsageError("a metric of tokens needs at least one")
        self.tokens = tuple(wholes(list(weights), "tokens of a metric"))
        values = [number(w, "a weight of a metric") for w in weights.values()]
        with np.errstate(over="ignore"):
            self.weights = np.array(values, np.float32)
        if not np.isfinite(self.weights).all():
            largest = max(values, key=abs)
            raise UsageError(f"a weight of a metric, {largest:g}, is not finite in float32")

    def of(self, logits: Array) -> Any:
        sums = logits @ self.weights  # (n_positions,)
        return float(sums[0]) if len(sums) == 1 else sums


class LogitDifference(LogitSum):
    """A metric: the logit of one token minus that of another (Wang et al. 2022, arXiv 2211.00593)."""

    def __init__(self, right: int, wrong: int):
        if right == wrong:
            raise UsageError(f"a difference is of two tokens, both are {right}")
        super().__init__({right: 1.0, wrong: -1.0})


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """One run of the model.

    Attributes:
        tokens: token ids of the prompt, at least one.
        edits: changes, applied in this order where they meet.
        captures: reads; they see what the edits at the same site left.
        logits: prompt tokens whose logits are wanted: "last", "all", None for none, or
            as `Edit.tokens`.
        metric: called with `(n_positions, n_vocab)` logits, valid only during the call;
            its result is `Result.value`, and the logits themselves are not kept. One of a few
            tokens (`LogitDifference`, `LogitSum`, `TokenLogits`) costs no unembedding where nothing else of
            its batches reads logits.
        n_predict: how many tokens to generate at most.
        sampling: how to choose them.
        stop_at_eog: stop where the model ends its turn.
        logprobs: also give each generated token's log-probability, a pass over the vocabulary.
        top_logprobs: also give the log-probabilities of so many tokens that were the most probable.
    """

    tokens: Sequence[int]
    edits: Sequence[Edit] = ()
    captures: Sequence[Capture] = ()
    logits: Tokens | str = "last"
    metric: Callable[[Array], Any] | None = None
    n_predict: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop_at_eog: bool = True
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        # one edit or capture by itself is a list of one
        object.__setattr__(self, "edits", one_or_more(self.edits, Edit))
        object.__setattr__(self, "captures", one_or_more(self.captures, Capture))
        if isinstance(self.tokens, str):
            raise UsageError("tokens are ids, not a text; Model.tokenize makes them of one")
        try:
            n_tokens = len(wholes(self.tokens, "tokens"))
        except UsageError as err:
            raise UsageError(
                f"tokens are whole numbers; Model.tokenize makes them of a text ({err})"
            ) from None
        if not n_tokens:
            raise UsageError("the prompt is empty; give at least one token")
        if not isinstance(self.logits, str):
            object.__setattr__(self, "logits", token_indices(self.logits, "logits"))
        if self.metric is not None and not callable(self.metric):
            raise UsageError(f"a metric is a function of logits, not {shown(self.metric)}")
        if isinstance(self.metric, TokenMetric):
            tokens = getattr(self.metric, "tokens", None)
            if not wholes(tokens, "tokens of a metric"):
                raise UsageError("tokens of a metric: it needs at least one")
        if self.metric is not None and self.logits is None:
            raise UsageError("a metric needs logits, and logits is None")
        if not isinstance(self.sampling, Sampling):
            raise UsageError(f"sampling is a Sampling, not {shown(self.sampling)}")
        flag(self.stop_at_eog, "stop_at_eog")
        flag(self.logprobs, "logprobs")
        object.__setattr__(self, "n_predict", whole(self.n_predict, "n_predict"))
        if self.n_predict < 0:
            raise UsageError(f"n_predict {self.n_predict} is negative")
        object.__setattr__(self, "top_logprobs", whole(self.top_logprobs, "top_logprobs"))
        if self.top_logprobs < 0:
            raise UsageError(f"top_logprobs {self.top_logprobs} is negative")
        if isinstance(self.logits, str) and self.logits not in ("last", "all"):
            raise UsageError(
                f'logits is {self.logits!r}; "last", "all", None or token indices are known'
            )


@dataclass(slots=True)
class Result:
    """What one request gave.

    Attributes:
        logits: `(n_positions, n_vocab)` float32 of the positions asked for, None if none
            or if a metric took them.
        value: what the metric returned.
        captures: by site: `(n_tokens, width)` float32, heads flattened;
            `(n_tokens, n_head, n_keys)` for `attn_pattern` and `attn_scores`, keys by position. In the
            order of `Capture.tokens`, generated tokens after them. If several captures read one
            site, each token once, in the order in which they name it; `of` keeps them apart.
        by_capture: each capture of the request with its own arrays, in order.
        tokens: generated token ids.
        logprobs: natural log-probability of each generated token under the model's full
            distribution (before temperature and cuts), where `Request.logprobs` asks for them.
        top_logprobs: for each generated token the most probable tokens, best first, as (id, natural
            log-probability), where `Request.top_logprobs` asks for them.
    """

    logits: Array | None = None
    value: Any = None
    captures: dict[Site, Array] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    by_capture: list[tuple[Capture, dict[Site, Array]]] = field(default_factory=list)

    def of(self, capture: Capture) -> dict[Site, Array]:
        """What one of the request's captures read, by site. Raises `UsageError` if it is none."""
        for own, arrays in self.by_capture:
            if own is capture or own == capture:
                return arrays
        raise UsageError(f"the request had no {capture}")

    def __getitem__(self, site: str | Site) -> Array:
        """The capture at a site. Raises `SiteError` naming what was captured."""
        from mia.sites import parse

        n_layer = 1 + max((s.layer or 0 for s in self.captures), default=0)
        try:
            return self.captures[parse(site, n_layer)]
        except (KeyError, ValueError):
            have = ", ".join(str(s) for s in self.captures) or "nothing"
            raise SiteError(f"no capture of {site}; captured: {have}") from None


#: called with the index of a request and its result
OnResult = Callable[[int, Result], None]
#: called with a request's index in the list and the token that was chosen for it
OnToken = Callable[[int, int], None]
