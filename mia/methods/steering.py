"""Steering: a direction pushed into a site while the model runs.

Sources: addition, Turner et al. 2023 (arXiv 2308.10248) and Rimsky et al. 2023
(2312.06681); removing a direction, Arditi et al. 2024 (2406.11717, eq. 4); a floor under
the projection, as "clamping" of features in Templeton et al. 2024.

For a row h of the site, a direction v, its unit v̂ and a coefficient c:

| operator     | h becomes                                  | `Edit.op`         |
|--------------|--------------------------------------------|-------------------|
| `add`        | h + c·v                                    | `add`             |
| `ablate`     | h - (h·v̂)v̂                                 | `project_out`     |
| `ablate-add` | h - (h·v̂)v̂ + c·v                           | `project_out_add` |
| `replace`    | c·v                                        | `replace`         |
| `clamp`      | h, with h·v̂ raised to c|v| where it is less| `clamp`           |
| `cap`        | h, with h·v̂ lowered to c|v| where it is more| `cap`            |
| `mod:func`   | func(h, v, c), rows (n, width)             | a function        |

An `add` at all tokens at `resid_post` goes through llama.cpp's control vector
(`explain` tells), which costs nothing; all else goes through the callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.edits import Edit, Tokens
from mia.errors import UsageError
from mia.plugins import load_function
from mia.request import Request
from mia.sites import Site, parse
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]
#: rows (n, width), direction (width,), coefficient -> rows
Operator = Callable[[Array, Array, float], Array]

_OPS = {
    "add": "add",
    "ablate": "project_out",
    "ablate-add": "project_out_add",
    "replace": "replace",
    "clamp": "clamp",
    "cap": "cap",
}
OPERATORS = tuple(_OPS)
#: those that no coefficient changes
WITHOUT_COEFF = ("ablate",)
#: what `choose_coefficient` tries where nothing else is said
CANDIDATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True, eq=False)
class Steering:
    """A vector and how to push it.

    Attributes:
        op: an operator of the module's table, or a function (rows, v, c) -> rows.
        coeff: c.
        layers: of those that the vector has; None for all.
        tokens: prompt tokens; None for all. `slice(i, None)` is token i and later.
        generated: also at generated tokens; by default where `tokens` is None.
        keep_norm: keep the norm of each row.
    """

    vector: Vector
    op: str | Operator = "add"
    coeff: float = 1.0
    layers: Sequence[int] | None = None
    tokens: Tokens = None
    generated: bool | None = None
    keep_norm: bool = False

    def edits(self) -> list[Edit]:
        """One edit per layer. Requests must share them to be steered by a control vector.

        Raises `UsageError` where the operator is not known or the vector has none of the layers.
        """
        chosen = self.vector if self.layers is None else self.vector.at(self.layers)
        op, name = self.op, self.op if isinstance(self.op, str) else ""
        if isinstance(op, str) and op not in _OPS:
            if ":" not in op:
                raise UsageError(
                    f"unknown operator {op!r}; known: {', '.join(OPERATORS)}, or module:function"
                )
            op = load_function(op)
        edits = []
        for layer in chosen.layers:
            v = chosen[layer]
            if not isinstance(op, str):
                what, value, coeff = _bound(op, v, self.coeff, name), None, 1.0
            elif op == "replace":
                what, value, coeff = "replace", np.float32(self.coeff) * v, 1.0
            else:
                what, value, coeff = _OPS[op], v, self.coeff
            edits.append(
                Edit(
                    Site(chosen.site, layer),
                    what,
                    value,
                    tokens=self.tokens,
                    generated=self.generated,
                    coeff=coeff,
                    keep_norm=self.keep_norm,
                )
            )
        return edits

    def check(self, model: Model) -> None:
        """Raises `UsageError` where the vector does not fit the model."""
        check_fits(model, self.vector)


def _bound(f: Operator, v: Array, c: float, name: str) -> Any:
    def bound(rows: Array) -> Array:
        return f(rows, v, c)

    # what `explain` shows
    own = getattr(f, "__qualname__", type(f).__name__)
    bound.__name__ = name or f"{getattr(f, '__module__', '')}:{own}"
    return bound


def check_fits(model: Model, vector: Vector, source: str | None = None) -> None:
    """Raises `UsageError` where a vector has another width or more layers than the model."""
    width = model.n_embd
    if vector.site not in ("resid_post", "resid_pre"):
        found = model.topology.sites.get(Site(vector.site, 0))
        if found is None or vector.site == "attn_pattern":
            raise UsageError(
                f"{source or vector.name}: {model.name} has no vectors at {vector.site}"
            )
        width = int(np.prod(found.shape))
    vector.check(model.n_layer, width, source)


class Handle:
    """Steering that stays on a model until it is removed; a context manager too."""

    def __init__(self, model: Model, edits: Sequence[Edit]):
        self._model, self.edits = model, list(edits)
        model.standing_edits.extend(self.edits)

    def remove(self) -> None:
        """Takes the steering off. A second time does nothing."""
        mine = {id(e) for e in self.edits}
        self._model.standing_edits[:] = [e for e in self._model.standing_edits if id(e) not in mine]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def steer(model: Model, *what: Vector | Steering, **how: Any) -> Handle:
    """Puts vectors on a model: every run is steered until `Handle.remove`.

    Args:
        how: fields of `Steering` for those given as plain vectors.
    """
    steerings = [s if isinstance(s, Steering) else Steering(s, **how) for s in what]
    for s in steerings:
        s.check(model)
    return Handle(model, [e for s in steerings for e in s.edits()])


def explain(model: Model, edits: Sequence[Edit], *, alone: bool = True) -> list[dict[str, Any]]:
    """Which path each edit takes, and why it is not the control vector.

    Args:
        alone: whether all requests of the run have just these edits and nothing is captured.

    Returns:
        For each edit `site`, `operator`, `path` ("control vector" or "callback"), `why`.
    """
    from mia.model import is_control_vector

    sites = [parse(e.site, model.n_layer) for e in edits]
    fits = [is_control_vector(e, s) for e, s in zip(edits, sites, strict=True)]
    out = []
    for edit, site, fit in zip(edits, sites, fits, strict=True):
        if fit and all(fits) and alone:
            path, why = "control vector", ""
        elif fit and all(fits):
            path, why = "callback", "a control vector steers all requests of a run alike"
        elif fit:
            path, why = "callback", "other edits of this run need the callback"
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
class Choice:
    """A coefficient within a budget, and the mean KL (nats per token) of all that were tried."""

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

    All candidates read the same text, prompt and continuation, as sequences of one batch.
    """
    total, count = np.zeros(len(candidates)), 0
    for prompt in prompts:
        tokens = list(prompt)
        if n_predict:
            tokens += model.run([Request(prompt, logits=None, n_predict=n_predict)])[0].tokens
            # the last token chosen is not read by anything
            tokens.pop()
        # edits at tokens counted from the end must find them where the prompt has them
        at = slice(len(prompt) - 1, None)
        results = model.run(
            [
                Request(
                    tokens, [_along_text(e, len(prompt), len(tokens)) for e in edits], logits=at
                )
                for edits in [(), *candidates]
            ]
        )
        logp = [_log_softmax(r.logits) for r in results if r.logits is not None]  # (n_at, n_vocab)
        base = logp[0]
        weight = np.exp(base)
        for i, steered in enumerate(logp[1:]):
            total[i] += float((weight * (base - steered)).sum())
        count += len(base)
    return (total / count).astype(np.float32)


def _along_text(edit: Edit, n_prompt: int, n_text: int) -> Edit:
    """The edit of a prompt and its continuation as an edit of the text that both are."""
    if edit.tokens is None and edit.on_generated:
        return edit
    at = edit.positions(n_prompt)
    value = edit.value
    if edit.on_generated:
        at = [*at, *range(n_prompt, n_text)]
        if value is not None and np.ndim(value) == 2 and len(value) == 1:
            value = np.asarray(value)[0]
    return replace(edit, tokens=at, generated=False, value=value)


def choose_coefficient(
    model: Model,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[Steering],
    budget: float,
    *,
    candidates: Sequence[float] = CANDIDATES,
    n_predict: int = 16,
) -> Choice:
    """The coefficient of largest size whose mean KL from the unsteered run stays within a budget.

    Of c and -c that both do, the one of less KL. Each candidate is judged by itself: where KL
    is not monotone in the size, a coefficient may be chosen though a smaller one is beyond the
    budget (`Choice.kl` has them all).

    Raises:
        UsageError: none does, the budget is not positive, or several candidates are given for
            operators that have no coefficient.
    """
    if not budget > 0:
        raise UsageError(f"a KL budget of {budget} is not positive")
    if len(candidates) > 1 and all(s.op in WITHOUT_COEFF for s in steerings):
        raise UsageError(
            f"operator {steerings[0].op!r} has no coefficient that a KL budget could choose"
        )
    edits = [[e for s in steerings for e in replace(s, coeff=c).edits()] for c in candidates]
    found = mean_kl(model, prompts, edits, n_predict=n_predict)
    kl = {float(c): float(k) for c, k in zip(candidates, found, strict=True)}
    within = [c for c, k in kl.items() if k <= budget]
    if not within:
        least = min(kl, key=lambda c: kl[c])
        raise UsageError(
            f"no coefficient stays within a mean KL of {budget:g}: {least:g} gives {kl[least]:.3g}"
            + (", the least" if len(kl) > 1 else "")
        )
    return Choice(max(within, key=lambda c: (abs(c), -kl[c])), kl)


def _log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
