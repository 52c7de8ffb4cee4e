"""The invariant on numbers: nothing that is not finite stays in the KV cache.

llama.cpp's attention reads masked cells too and multiplies them with zero, and zero times NaN is
NaN. So one NaN in one cell would spoil every later run on the context. Three guards keep it out:

1. `check_edited` refuses an edit whose result is not finite, before the graph goes on.
2. `check_logits` refuses NaN that the model itself has made of large numbers.
3. Whatever ends a run early has the cache overwritten with zeros (`Engine`).
"""

from __future__ import annotations

import numpy as np

from mia.arrays import Array
from mia.errors import EngineError, UsageError
from mia.sites import Site


def check_edited(rows: Array, site: Site) -> None:
    """Raises `UsageError` if an edit made numbers that are not finite. At the logits it may:
    nothing after them is cached."""
    if site.name != "logits" and not np.isfinite(rows).all():
        raise not_finite(site)


def check_logits(row: Array) -> None:
    """Raises `EngineError` for NaN. One in a hidden state makes all logits of its row NaN, so it
    is enough to look at the first."""
    if np.isnan(row[0]):
        raise EngineError(
            "the logits are not numbers (NaN): an edit is too large for the model, "
            "or llama.cpp computes wrongly on this machine"
        )


def not_finite(site: Site) -> UsageError:
    return UsageError(f"an edit at {site} makes numbers that are not finite")
