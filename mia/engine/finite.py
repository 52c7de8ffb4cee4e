"""The invariant on numbers: nothing that is not finite stays in the KV cache.

llama.cpp's attention reads masked cells too and multiplies them with zero, and zero times NaN is
NaN. So one NaN in one cell would spoil every later run on the context. Three guards keep it out:

1. `check_edited` refuses an edit whose result is not finite, before the graph goes on. (Scores and
   routers may be -inf: `patterns.py` and `experts.py` see that enough is left.)
2. `check_logits` and `check_capture` refuse what the model itself has made of large numbers.
3. Whatever ends a run early has the cache overwritten with zeros (`Engine`), and so has the next
   run after edits that nothing was read behind (`unread_edits`). A joint run that ends with an error is
   run again without the requests whose edits may have left a NaN (`may_spoil`), and these alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mia.arrays import Array
from mia.edits import Edit
from mia.engine.jobs import Job
from mia.errors import NotFiniteError, UsageError
from mia.sites import ROUTERS, Site

#: A norm squares its inputs in float32: above 1.8e19 it divides by infinity, and the whole row is 0,
#: which looks like a result. Products with weights lie between an edit and the norm; behind these two
#: norms also gated MLPs, which multiply two such numbers.
_LARGEST_RESIDUAL = 1e17
#: nothing takes the norm of what lies at the others: what is too large there becomes infinite
_LARGEST = {
    "attn_norm": 1e8,
    "mlp_norm": 1e8,
    "q": np.inf,
    "k": np.inf,
    "final_norm": np.inf,
}


def check_edited(rows: Array, site: Site) -> None:
    """Raises `UsageError` if an edit made numbers that are not finite, or so large that a norm after
    them would overflow (see `_LARGEST`). At the logits some may be -inf, tokens that are not to be
    chosen."""
    if site.name != "logits":
        size = max(float(rows.max()), -float(rows.min()))  # NaN if there is one
        if not np.isfinite(size):
            raise not_finite(site)
        largest = _largest(site)
        if size > largest:
            raise UsageError(
                f"an edit at {site} makes numbers of {size:.0e}; above {largest:.0e} the squares in the "
                "model's norms overflow, and zeros come out"
            )
        return
    top = rows.max(-1)
    if np.isneginf(top).any():
        raise UsageError("an edit at logits leaves no token to choose: all are -inf")
    if not np.isfinite(top).all():
        raise not_finite(site)


def largest_edited(site: Site) -> float | None:
    """What `check_edited` allows there at most; None if that is not all that is looked at."""
    return None if site.name == "logits" or site.name in ROUTERS else _largest(site)


def _largest(site: Site) -> float:
    return _LARGEST.get(site.name, _LARGEST_RESIDUAL)


def check_logits(logits: Array, *, changed: bool, edited: bool, kv_type: str) -> None:
    """Raises `EngineError` for logits, of any shape, that are NaN or infinite.

    Args:
        changed: whether anything is edited in this run.
        edited: whether edits at the logits may have made some of them -inf.
    """
    top, bottom = logits.max(), logits.min()
    if np.isnan(top):
        raise _too_large("the logits are not numbers (NaN)", kv_type, changed)
    if np.isinf(top) or (np.isinf(bottom) and not edited):
        raise _too_large("the logits are infinite", kv_type, changed)


def check_capture(rows: Array, site: Site, *, kv_type: str) -> None:
    """Raises `EngineError` for a capture that is NaN or infinite. Scores are -inf where an edit
    blocks the key, logits where one bans the token, routers where one takes an expert out."""
    if np.isfinite(rows).all():
        return
    if site.name in ("attn_scores", "logits", *ROUTERS) and not (
        np.isnan(rows).any() or np.isposinf(rows).any()
    ):
        return
    raise _too_large(f"{site} has numbers that are not finite", kv_type)


def unread_edits(jobs: Iterable[Job]) -> bool:
    """Whether some edits may have left what is not finite in the cache, unseen."""
    return any(may_spoil(job) for job in jobs)


def may_spoil(job: Job) -> bool:
    """Whether a job's edits may leave what is not finite in the cache, unseen: the last token's
    logits, which depend on all, are not asked for; or one edit puts other numbers in the place of what
    another one broke."""
    last = len(job.tokens) - 1
    is_unread = job.edits and not job.generates and last not in _checked(job)
    return bool(is_unread) or _may_hide(job)


def _checked(job: Job) -> tuple[int, ...]:
    """Prompt positions whose numbers behind the last block are looked at."""
    return job.logit_positions if job.metric_read is None else job.metric_read.positions


def _may_hide(job: Job) -> bool:
    """Whether an edit may put other numbers in the place of what another one broke."""
    return len(job.edits) > 1 and any(_hides(edit) for edit, _ in job.edits)


def _hides(edit: Edit) -> bool:
    """Whether what an edit makes need not depend on what it finds."""
    return not isinstance(edit.op, str) or edit.op in ("replace", "zero", "mean")


def _too_large(what: str, kv_type: str, changed: bool = True) -> NotFiniteError:
    if not changed:
        return NotFiniteError(
            f"{what}, and nothing was edited: the model's file is damaged, or llama.cpp computes "
            "wrongly on this machine"
        )
    cache = " or its f16 cache (65504 at most)" if kv_type == "f16" else ""
    return NotFiniteError(
        f"{what}: an edit is too large for the model{cache}, "
        "or llama.cpp computes wrongly on this machine"
    )


def not_finite(site: Site) -> UsageError:
    return UsageError(f"an edit at {site} makes numbers that are not finite")
