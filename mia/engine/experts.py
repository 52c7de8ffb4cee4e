"""Mixtures of experts: weights by expert, and which choices leave enough of them.

llama.cpp has the weights of the chosen experts only, in the order of the choice. What mia shows
and edits has one number for each expert, 0 for those that are not chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mia.arrays import Array, IntArray
from mia.engine.finite import not_finite
from mia.engine.graph import SiteNode
from mia.engine.session import Session
from mia.errors import UsageError
from mia.llama import read_array, rows_of
from mia.sites import Site


def weights_by_expert(session: Session, node: SiteNode, addr: int) -> Array:
    """The weights of a layer (n_rows, n_expert), a copy."""
    chosen = _chosen(session, node)  # (n_rows, n_used)
    weights = np.zeros((len(chosen), *node.shape), np.float32)
    np.put_along_axis(weights, chosen, read_array(addr).reshape(chosen.shape), 1)
    return weights


def edit_weights(
    session: Session, node: SiteNode, addr: int, edit: Callable[[Array], None]
) -> None:
    """Lets `edit` change the weights (n_rows, n_expert) in place. Those of experts that are not
    chosen have nothing to multiply: they stay 0."""
    chosen = _chosen(session, node)
    weights = weights_by_expert(session, node, addr)
    edit(weights)
    with rows_of(addr, write=True) as a:
        a[...] = np.take_along_axis(weights, chosen, 1).reshape(a.shape)


def _chosen(session: Session, node: SiteNode) -> IntArray:
    """The experts of each row (n_rows, n_used)."""
    ids: IntArray = read_array(session.variants[0].addrs[node.ids])[0, 0].astype(np.intp)
    return ids


def check_router(session: Session, site: Site, rows: Array) -> None:
    """Edited rows (n, n_expert) of a router may be -inf, experts that are not to be chosen. Raises
    `UsageError` where fewer are left than are needed, or for what is no number."""
    if np.isnan(rows).any() or np.isposinf(rows).any():
        raise not_finite(site)
    n_used = session.site(Site("experts", site.layer)).shape[0]
    left = int(np.isfinite(rows).sum(1).min())
    if left < n_used:
        raise UsageError(
            f"layer {site.layer} chooses {n_used} experts for each token, but an edit at {site} "
            f"leaves {left} of {rows.shape[1]}"
        )
