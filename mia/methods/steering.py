"""What steering does to a model: which path an edit takes, and how far it moves the output.

`mia.steering.Steering` is the value; here is what needs a model. The budget is the mean KL
divergence of the next-token distributions, KL(unsteered || steered), in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.edits import WITHOUT_COEFF, Edit
from mia.errors import UsageError
from mia.measure.losses import log_softmax
from mia.request import Request
from mia.sites import Site, parse
from mia.steering import Steering

if TYPE_CHECKING:
    from mia.model import Model

#: the coefficients that `choose_coefficient` tries by default
CANDIDATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


# -- which path --------------------------------------------------------------------------


def explain(model: Model, edits: Sequence[Edit], *, alone: bool = True) -> list[dict[str, Any]]:
    """Which path each edit takes, and why not the control vector.

    Args:
        alone: whether all requests of the run have exactly these edits and no captures.

    Returns:
        For each edit `site`, `operator`, `path` ("control vector" or "callback"), `why`.
    """
    from mia.engine.control_vector import is_control_vector

    sites = [parse(e.site, model.n_layer) for e in edits]
    blocks = model.site_checks.vectors
    likes = [is_control_vector(e, s) for e, s in zip(edits, sites, strict=True)]
    fits = [like and s.layer in blocks for like, s in zip(likes, sites, strict=True)]
    out = []
    for edit, site, like, fit in zip(edits, sites, likes, fits, strict=True):
        if fit and all(fits) and alone:
            path, why = "control vector", ""
        elif fit and all(fits):
            path, why = "callback", "a control vector steers all requests of a run alike"
        elif fit:
            path, why = "callback", "other edits of this run need the callback"
        elif like:
            path, why = "callback", "llama.cpp adds no control vector in this block"
        else:
            path, why = "callback", _why_not(edit, site)
        op = edit.op if isinstance(edit.op, str) else getattr(edit.op, "__name__", "function")
        out.append({"site": str(site), "operator": op, "path": path, "why": why})
    return out


def _why_not(edit: Edit, site: Site) -> str:
    if edit.op != "add":
        return "the operator is not add"
    if site.name != "resid_post":
        return "a control vector is added at resid_post"
    if site.layer == 0:
        return "a control vector has no layer 0"
    if edit.keep_norm:
        return "the norm is kept"
    return "only some tokens are steered"


# -- how much --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CoefficientChoice:
    """A coefficient within a budget, and the mean KL (nats per token) of each candidate."""

    coeff: float
    kl: dict[float, float]


def mean_kl(
    model: Model,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Edit]],
    *,
    n_predict: int = 16,
) -> Array:
    """How far steering moves the model: KL(unsteered || steered) in nats, the mean over the
    next-token distributions along the unsteered continuation. (n_candidates,)

    All candidates read the same text (prompt and continuation), as sequences of one batch.
    """
    total, count = np.zeros(len(candidates)), 0
    for prompt in prompts:
        tokens = list(prompt)
        if n_predict:
            tokens += model.run([Request(prompt, logits=None, n_predict=n_predict)])[0].tokens
            # nothing reads the last generated token
            tokens.pop()
        # tokens counted from the end of the prompt need their indices in the longer text
        texts = [
            [_along_text(e, len(prompt), len(tokens)) for e in edits] for edits in [(), *candidates]
        ]
        after_prompt = slice(len(prompt) - 1, None)
        results = model.run([Request(tokens, edits, logits=after_prompt) for edits in texts])
        logp = [
            log_softmax(r.logits) for r in results if r.logits is not None
        ]  # (n_tokens, n_vocab)
        base = logp[0]
        weight = np.exp(base)
        for i, steered in enumerate(logp[1:]):
            total[i] += float((weight * (base - steered)).sum())
        count += len(base)
    return (total / count).astype(np.float32)


def _along_text(edit: Edit, n_prompt: int, n_text: int) -> Edit:
    """An edit of a prompt and its continuation as an edit of the whole text."""
    if edit.tokens is None and edit.on_generated:
        return edit
    tokens = edit.positions(n_prompt)
    value = edit.value
    if edit.on_generated:
        tokens = [*tokens, *range(n_prompt, n_text)]
        if value is not None and np.ndim(value) == 2 and len(value) == 1:
            value = np.asarray(value)[0]
    return replace(edit, tokens=tokens, generated=False, value=value)


def choose_coefficient(
    model: Model,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[Steering],
    budget: float,
    *,
    candidates: Sequence[float] = CANDIDATES,
    n_predict: int = 16,
) -> CoefficientChoice:
    """The coefficient of largest size whose mean KL from the unsteered run is within a budget.

    If c and -c are both within it, the one of smaller KL. Each candidate is judged by itself: if
    KL does not grow with the size, the choice may be larger than a candidate that is beyond the
    budget (`CoefficientChoice.kl` has them all).

    Raises:
        UsageError: no candidate is within the budget, the budget is not positive, or there are
            several candidates for operators that have no coefficient.
    """
    if not budget > 0:
        raise UsageError(f"a KL budget of {budget} is not positive")
    if len(candidates) > 1 and all(s.op in WITHOUT_COEFF for s in steerings):
        raise UsageError(
            f"operator {steerings[0].op!r} takes no coefficient that a KL budget could choose"
        )
    edits = [[e for s in steerings for e in replace(s, coeff=c).edits()] for c in candidates]
    means = mean_kl(model, prompts, edits, n_predict=n_predict)
    kl = {float(c): float(k) for c, k in zip(candidates, means, strict=True)}
    within = [c for c, k in kl.items() if k <= budget]
    if not within:
        least = min(kl, key=lambda c: kl[c])
        raise UsageError(
            f"no coefficient stays within a mean KL of {budget:g}: {least:g} gives {kl[least]:.3g}"
            + (", the least" if len(kl) > 1 else "")
        )
    return CoefficientChoice(max(within, key=lambda c: (abs(c), -kl[c])), kl)
