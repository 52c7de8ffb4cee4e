"""Edits that ablate experts of a mixture, or force them.

Sources: leaving experts out of the choice is the pruning of Lu et al. 2024 (arXiv 2402.14800);
raising or sinking router logits is SteerMoE, Fayyaz et al. 2025 (arXiv 2509.09660).

| in the papers                 | here                                                          |
|-------------------------------|---------------------------------------------------------------|
| expert e of layer l           | `Expert(layer, expert)`, written 3.5                          |
| router logits z               | `router`                                                      |
| top-k(s + b), b for balance   | `router_choice`, where a model has such a bias                |
| gates g_e                     | `expert_weights`, 0 for experts that are not chosen           |
| an expert pruned: z_e = -inf  | `exclude`: the router chooses among the others                |
| s_e = s_max + eps             | `force`: z_e at least `MARGIN` above all others               |

Three changes that answer different questions:

- `exclude`: what does the model do if it does not have the expert? Another one takes its place,
  and the weights are made from the logits of those that are left.
- `silence`: what does the expert add? Each token chooses as before, and all other weights stay as
  they are, but the expert's output is multiplied by 0.
- `force`: what does the expert do with tokens that it does not get? The one that comes last in the
  choice makes room.

Deviation: SteerMoE sets an expert to the highest log-softmax plus eps even if it is above it
already; here such an expert is left as it is. It sinks experts to the lowest score; here they are
out of the choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array
from mia.edits import Edit, Function, Tokens
from mia.errors import SiteError, UsageError
from mia.ranges import Expert, by_layer
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

#: how far above all others the logit of a forced expert is
MARGIN = 0.01


def expert_counts(model: Model) -> dict[int, int]:
    """layer -> how many experts it has, for layers with experts. Raises `SiteError` for none."""
    topology = model.topology
    counts = {
        s.layer: node.shape[0]
        for s, node in topology.sites.items()
        if s.name == "router" and s.layer is not None
    }
    if not counts:
        raise SiteError(topology.absence(Site("router", 0)))
    return counts


def expert_edits(
    model: Model,
    *,
    exclude: Iterable[Expert] = (),
    silence: Iterable[Expert] = (),
    force: Iterable[Expert] = (),
    tokens: Tokens = None,
) -> list[Edit]:
    """Edits that change what experts do; see the module.

    Args:
        exclude: out of the choice.
        silence: chosen as before, their outputs multiplied by 0.
        force: chosen by each token.
        tokens: where; all tokens and generated ones by default.

    Raises:
        UsageError: too few experts would be left to choose, or too many are forced.
    """
    excluded, forced = by_layer(exclude), by_layer(force)
    edits = []
    for layer in sorted(excluded.keys() | forced.keys()):
        out, must = excluded.get(layer, []), forced.get(layer, [])
        _check(model, layer, out, must)
        sites = [Site("router", layer), Site("router_choice", layer)]
        for site in (s for s in sites if s in model.topology.sites):
            if out:
                edits.append(Edit(site, _sunk(out), tokens=tokens))
            if must:
                raised = _raised if site.name == "router" else _raised_far
                edits.append(Edit(site, raised(must), tokens=tokens))
    for layer, experts in by_layer(silence).items():
        site = Site("expert_weights", layer)
        edits.append(Edit(site, "zero", tokens=tokens, dims=experts))
    return edits


def _sunk(experts: Sequence[int]) -> Function:
    def edit(rows: Array) -> Array:  # (n, n_expert)
        rows[:, experts] = -np.inf
        return rows

    return edit


def _raised(experts: Sequence[int]) -> Function:
    """To `MARGIN` above the highest of the others, where they are not there already."""

    def edit(rows: Array) -> Array:  # (n, n_expert)
        others = np.delete(rows, experts, 1)  # none where all are chosen
        highest = others.max(1, keepdims=True, initial=-np.inf)
        rows[:, experts] = np.maximum(rows[:, experts], highest + np.float32(MARGIN))
        return rows

    return edit


def _raised_far(experts: Sequence[int]) -> Function:
    """So far that the two best of their group sum to more than those of any other group. The
    choice alone reads these numbers: how far they are above the others makes no weight."""

    def edit(rows: Array) -> Array:  # (n, n_expert)
        finite = np.where(np.isfinite(rows), rows, np.nan)
        low, high = np.nanmin(finite, 1, keepdims=True), np.nanmax(finite, 1, keepdims=True)
        rows[:, experts] += 2 * (high - low) + 1
        return rows

    return edit


# -- what the router can choose ----------------------------------------------------------


def _check(model: Model, layer: int, excluded: Sequence[int], forced: Sequence[int]) -> None:
    sites = model.topology.sites
    n_expert = sites[Site("router", layer)].shape[0]
    n_used = sites[Site("experts", layer)].shape[0]
    each = f"layer {layer} chooses {n_used} of {n_expert} experts for each token"
    if n_expert - len(excluded) < n_used:
        raise UsageError(f"{each}: leave at least {n_used}, not {n_expert - len(excluded)}")
    if len(forced) > n_used:
        raise UsageError(f"{each}: {len(forced)} cannot be forced")
    if both := sorted({*excluded} & {*forced}):
        raise UsageError(f"expert {layer}.{both[0]} cannot be both excluded and forced")
    n_group, n_group_used = _groups(model.metadata, model.architecture)
    if n_group < 2:
        return
    size = n_expert // n_group
    each = f"{each}, all from {n_group_used} groups of {size}"
    if len({e // size for e in forced}) > n_group_used:
        raise UsageError(f"{each}: experts of more groups than that cannot be forced")
    if forced and Site("router_choice", layer) not in sites:
        raise UsageError(f"{each}, by their scores alone: experts cannot be forced")
    # a group's score is the sum of its best two: one with fewer left is never chosen
    left = [size - sum(e // size == g for e in excluded) for g in range(n_group)]
    usable = sorted(n for n in left if n >= 2)
    if len(usable) < n_group_used or sum(usable[:n_group_used]) < n_used:
        raise UsageError(f"{each}: too few are left to choose from")
    if any(left[e // size] < 2 for e in forced):
        raise UsageError(f"{each}: a forced expert needs another one left in its group")


def _groups(metadata: Mapping[str, str], architecture: str) -> tuple[int, int]:
    """How many groups of experts there are, and among how many of them a token chooses."""
    keys = (f"{architecture}.expert_group_count", f"{architecture}.expert_group_used_count")
    n_group, n_used = (int(metadata.get(key, 0)) for key in keys)
    return n_group, n_used
