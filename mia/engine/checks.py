"""Whether jobs fit the model: before anything is decoded, with an error that says what does."""

from __future__ import annotations

from collections.abc import Iterable

from mia.edits import Edit
from mia.engine.jobs import Job
from mia.engine.session import Session
from mia.errors import RangeError, UsageError
from mia.request import TokenMetric
from mia.sites import Site


def check_tokens(jobs: Iterable[Job], *, n_ctx: int, n_vocab: int) -> None:
    """Raises `RangeError` for a prompt that is too long, or a token that there is not."""
    for job in jobs:
        if job.n_total > n_ctx:
            n, extra = len(job.tokens), job.request.n_predict
            more = f" and {extra} to generate" if extra else ""
            raise RangeError(f"a prompt of {n} tokens{more} is longer than the context of {n_ctx}")
        metric = job.request.metric
        few = metric.tokens if isinstance(metric, TokenMetric) else ()
        low, high = min(*job.tokens, *few, 0), max(*job.tokens, *few, 0)
        if low < 0 or high >= n_vocab:
            bad = low if low < 0 else high
            raise RangeError(
                f"token id {bad} is out of range; the vocabulary has 0 to {n_vocab - 1}"
            )


def check_sites(session: Session, jobs: Iterable[Job]) -> None:
    """Raises `SiteError` for a site that this graph has not, `UsageError` or `RangeError` for an
    edit that does not fit its site."""
    known: set[tuple[Edit, int]] = set()
    captured: set[Site] = set()
    for job in jobs:
        n_tokens = len(job.tokens)
        for edit, site in job.edits:
            if (edit, n_tokens) not in known:
                known.add((edit, n_tokens))
                _check_by_key(edit, site)
                if site.kind.read_only:
                    raise UsageError(f"{site} can be captured, not edited")
                edit.check(site, session.site(site).shape, n_tokens)
        for read in job.reads:
            for site in read.sites:
                if site not in captured:
                    captured.add(site)
                    session.site(site)


def _check_by_key(edit: Edit, site: Site) -> None:
    """Keys grow with the sequence, so that no value and no dimensions fit them."""
    if site.kind.by_key:
        if edit.value is not None:
            raise UsageError(f"{site.name} takes zero, scale or a function, not a value")
        if edit.dims is not None:
            raise UsageError(f"{site.name} takes no dims; its keys grow with the sequence")
