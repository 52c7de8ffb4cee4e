"""A request resolved against a model: sites parsed, token indices absolute, nothing of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mia.arrays import Array
from mia.edits import Edit, resolve_tokens
from mia.engine import limits
from mia.errors import UsageError
from mia.request import Capture, Request, TokenMetric
from mia.sites import Site, parse, parse_many

#: from rows at `final_norm` (n, n_embd), and token ids, to logits (n, n_tokens)
TokenLogits = Callable[[Array, Sequence[int]], Array]


class EditAt(NamedTuple):
    """An edit at one row. Rows with equal tuples of these, after equal rows, are one row.

    `rank`: the edit's place in the request's list; `value_row`: which row of its value, 0 if it is the
    same for all.
    """

    rank: int
    edit: Edit
    value_row: int


def has_rows(edit: Edit) -> bool:
    """Whether an edit's value has a row for each token."""
    value = edit._value
    return value is not None and value.ndim == 2 and len(value) > 1


@dataclass(frozen=True, eq=False, slots=True)
class Read:
    """A capture resolved: which rows of which sites.

    `positions` are prompt tokens, in the order of the result's rows; `n_rows` and `n_keys` count
    the generated tokens too, if they are captured.
    """

    sites: tuple[Site, ...]
    positions: tuple[int, ...]
    n_rows: int
    n_keys: int
    generated: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """One request as the planner and the runner see it.

    Attributes:
        n_total: tokens that the model is run on: the prompt, and all generated but the last.
        edits: each with its site, in the request's order.
        edits_at: prompt position -> the edits there; positions without any are missing.
        edits_generated: the edits at every generated token.
        logit_positions: prompt positions whose logits are asked for.
        metric_read: the last of `reads`, if the metric is computed from the final norm's rows.
        token_logits: makes logits of some tokens of these.
    """

    index: int
    request: Request
    tokens: tuple[int, ...]
    n_total: int
    edits: tuple[tuple[Edit, Site], ...]
    edits_at: dict[int, tuple[EditAt, ...]]
    edits_generated: tuple[EditAt, ...]
    reads: tuple[Read, ...]
    logit_positions: tuple[int, ...]
    metric_read: Read | None = None
    token_logits: TokenLogits | None = None

    @property
    def generates(self) -> bool:
        return self.request.n_predict > 0

    @property
    def sites(self) -> set[Site]:
        """Every site that is edited or captured."""
        return {s for _, s in self.edits} | {s for read in self.reads for s in read.sites}


def may_read_few(requests: Iterable[Request], n_layer: int) -> bool:
    """Whether metrics of a few tokens may be computed from the final norm's rows: not if one of them is
    of many, or behind edits at the logits. It is so for all requests of a run or for none: their
    values are compared, and llama.cpp's own logits differ by its rounding."""
    of_tokens = [(r, r.metric) for r in requests if isinstance(r.metric, TokenMetric)]
    if any(len(metric.tokens) > limits.METRIC_TOKENS for _, metric in of_tokens):
        return False
    edited = {edit.site for request, _ in of_tokens for edit in request.edits}
    return all(parse(site, n_layer).name != "logits" for site in edited)


def resolve(
    index: int,
    request: Request,
    n_layer: int,
    edits: Sequence[Edit] | None = None,
    token_logits: TokenLogits | None = None,
) -> Job:
    """The job of a request. `edits` take the place of the request's own; `token_logits` serves
    metrics of a few tokens (`may_read_few`).

    Raises:
        SiteError, RangeError: a site or token index that there is not.
    """
    tokens = tuple(int(t) for t in request.tokens)
    n, n_fed = len(tokens), max(request.n_predict - 1, 0)
    given = request.edits if edits is None else edits
    # one of another's at other tokens shares rows with it
    pairs = tuple((e.origin, parse(e.site, n_layer)) for e in given)
    at: dict[int, list[EditAt]] = {}
    for rank, edit in enumerate(given):
        everywhere = EditAt(rank, edit.origin, 0)
        for value_row, p in enumerate(edit.positions(n)):
            here = everywhere._replace(value_row=value_row) if has_rows(edit) else everywhere
            at.setdefault(p, []).append(here)
    positions, reads = _logit_positions(request, n), _reads(request, n, n_fed, n_layer)
    metric_read: Read | None = None
    if isinstance(request.metric, TokenMetric) and token_logits is not None:
        metric_read = Read((Site("final_norm"),), positions, n_rows=len(positions), n_keys=0)
        positions, reads = (), (*reads, metric_read)
    return Job(
        index=index,
        request=request,
        tokens=tokens,
        n_total=n + n_fed,
        edits=pairs,
        edits_at={p: tuple(edits) for p, edits in at.items()},
        edits_generated=tuple(
            EditAt(rank, e.origin, 0) for rank, e in enumerate(given) if e.on_generated
        ),
        reads=reads,
        logit_positions=positions,
        metric_read=metric_read,
        token_logits=token_logits,
    )


def _reads(request: Request, n: int, n_fed: int, n_layer: int) -> tuple[Read, ...]:
    return tuple(_read(c, n, n_fed, n_layer) for c in request.captures)


def _read(capture: Capture, n: int, n_fed: int, n_layer: int) -> Read:
    positions = tuple(resolve_tokens(capture.tokens, n))
    extra = n_fed if capture.generated else 0
    return Read(
        sites=tuple(parse_many(capture.sites, n_layer)),
        positions=positions,
        n_rows=len(positions) + extra,
        n_keys=n + extra,
        generated=capture.generated,
    )


def _logit_positions(request: Request, n: int) -> tuple[int, ...]:
    if request.logits is None:
        return ()
    if isinstance(request.logits, str):
        return (n - 1,) if request.logits == "last" else tuple(range(n))
    positions = tuple(resolve_tokens(request.logits, n))
    if request.metric is not None and not positions:
        raise UsageError(f"a metric needs logits, and logits selects none of {n} tokens")
    return positions


def sites_of_edits(jobs: Iterable[Job]) -> dict[Edit, Site]:
    """Every edit with its site."""
    return {edit: site for job in jobs for edit, site in job.edits}
