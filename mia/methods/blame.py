"""Blame: in which block two files of one model part.

Source: activation patching (Wang et al. 2022, arXiv 2211.00593) between two models in place of two
prompts, as Prakash et al. 2024 (2402.14811) patch between a model and its finetune.

`a` is the base, x_i its residual behind block i, B_i the other model's block i, KL(a ‖ ·) the mean over
the scored tokens. All tokens are patched.

| number        | what is run                                         | what it says                           |
|---------------|-----------------------------------------------------|----------------------------------------|
| `alone`       | a, with B_i(x_(i-1)) in place of x_i                | what b's block i alone does to a       |
| `own_error`   | the length of B_i(x_(i-1)) - x_i over x_i - x_(i-1) | how wrong b's block i writes           |
| `patched`     | b, with x_i in place of its own residual            | what the blocks above i still do       |
| `share`       | `patched` of block i-1 minus `patched` of block i   | its part of the KL; the parts add up   |
| `attn`, `mlp` | b, with a's output of this part in place of its own | what of the KL that takes away         |

`alone` names the layer: it is one block, on the base's own inputs, so that errors from below are not
counted again, and it is weighed by what follows from it. `own_error` names the block whose weights are
coarsest, also if nothing follows from it.

Some runs of both models are changed by 1e-5 of a row (`mia.measure.noise`): the KL that this moves is the
noise floor of `alone` (in a) and of the others (in b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, Floats, norms
from mia.edits import Edit
from mia.errors import SiteError
from mia.measure.divergence import RESOLUTION, KlTo
from mia.measure.noise import nudge
from mia.progress import step
from mia.request import Capture, Request, Result
from mia.show.text import rounded
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

#: changes by 1e-5 in each model
NULL = 4
PARTS = ("attn_out", "mlp_out")
EMBEDDING, UNEMBEDDING = "embedding", "unembedding"


@dataclass(frozen=True, slots=True)
class Blamed:
    """One block, or the embedding or unembedding; numbers as in the module's table, in nats of KL.

    Attributes:
        place: "embedding", "layer 3", "unembedding".
        alone, own_error, share: None where this cannot be measured.
        patched: None for the unembedding, behind which nothing follows.
        attn, mlp: what a's output of the part takes away from the KL.
        attn_error, mlp_error: |b's part - a's| / |a's|, on a's input of the block.
    """

    place: str
    layer: int | None
    alone: float | None = None
    own_error: float | None = None
    patched: float | None = None
    share: float | None = None
    attn: float | None = None
    mlp: float | None = None
    attn_error: float | None = None
    mlp_error: float | None = None

    def document(self) -> dict[str, Any]:
        names = self.__slots__[2:]
        values = {n: getattr(self, n) for n in names}
        return {
            "place": self.place,
            "layer": self.layer,
            **{n: None if v is None else rounded(v, 10) for n, v in values.items()},
        }


@dataclass(frozen=True, eq=False)
class Blame:
    """Where two models part.

    Attributes:
        rows: the embedding, each layer, the unembedding.
        kl: KL(a ‖ b) of the unchanged run, the mean over the scored tokens.
        floor_a, floor_b: the largest KL to the base, and change of KL, that a change by 1e-5 made, or
            for the base none at all, and no less than float32 logits can tell (1e-7); `floor_b` is NaN
            if none was tried.
        floor_own: the largest error of a block of the base on its own input, computed in another batch;
            NaN if none was tried.
        n_tokens, n_scored: tokens of the text that was run, and those whose KL is measured.
    """

    rows: list[Blamed]
    kl: float
    floor_a: float
    floor_b: float
    floor_own: float
    n_tokens: int
    n_scored: int

    def ranked(self) -> list[Blamed]:
        """The rows by `alone`, the largest first; those within the noise floor by `own_error`, after
        all others."""
        floor = self.floor_a

        def key(row: Blamed) -> tuple[float, float]:
            alone = row.alone or 0.0
            return (alone if alone > floor else 0.0, row.own_error or 0.0)

        return sorted(self.rows, key=key, reverse=True)

    def coarsest(self) -> Blamed | None:
        """The layer with the largest `own_error`; None if none is above the noise floor."""
        floor = float(np.nan_to_num(self.floor_own))
        rows = [r for r in self.rows if r.layer is not None and (r.own_error or 0.0) > floor]
        return max(rows, key=lambda r: r.own_error or 0.0, default=None)

    def document(self) -> dict[str, Any]:
        return {
            "n_tokens": self.n_tokens,
            "n_scored": self.n_scored,
            "kl": rounded(self.kl, 10),
            "noise_floor_a": rounded(self.floor_a, 10),
            "noise_floor_b": rounded(self.floor_b, 10),
            "noise_floor_own_error": rounded(self.floor_own, 10),
            "places": [r.document() for r in self.rows],
            "ranked": [r.place for r in self.ranked()],
        }


def blame(
    a: Model,
    b: Model,
    tokens: Sequence[int],
    positions: Sequence[int],
    *,
    parts: bool = True,
    null: int = NULL,
) -> Blame:
    """Which block of `b` makes its predictions differ from those of `a`, by patching.

    One planned run of each model, after one that reads the base.

    Args:
        tokens: token ids of a text.
        positions: those whose next-token distributions are compared.
        parts: patch each attention's and MLP's output too, two thirds of the work.
        null: how many changes by 1e-5 measure the noise floor of each model.

    Raises:
        SiteError: a model has no `resid_post` in some layer.
        UsageError: the models do not fit together.
    """
    sites = _Sites.of(a, b, PARTS if parts else ())
    with step("reading the base"):
        base = a.run([sites.request(tokens, positions, captures=sites.all)])[0]
    assert base.logits is not None
    divergence = KlTo(base.logits)

    def kl(logits: Array) -> float:
        return float(divergence(logits).mean())

    with step("patching") as bar:
        patched = b.run(sites.patches(tokens, positions, base, kl, null), progress=bar)
    with step("trying each block alone") as bar:
        alone = a.run(sites.alone(tokens, positions, base, patched, kl, null), progress=bar)
    return _summary(sites, tokens, positions, base, patched, alone)


@dataclass(frozen=True)
class _Sites:
    """What both models have, and the requests of an experiment in their order.

    Attributes:
        start: the embedding, and the end of each block.
        parts: of each layer.
    """

    start: list[Site]
    parts: list[Site]
    has_embed: bool

    @classmethod
    def of(cls, a: Model, b: Model, names: Sequence[str]) -> _Sites:
        residuals = [Site("resid_post", i) for i in range(a.n_layer)]
        for model in (a, b):
            for site in residuals:
                if site not in model.topology.sites:
                    raise SiteError(f"{model.name} has no {site}, by which models are compared")
        both = a.topology.sites.keys() & b.topology.sites.keys()
        parts = [Site(p, i) for i in range(a.n_layer) for p in names]
        has_embed = Site("embed") in both
        start = [Site("embed")] * has_embed + residuals
        return cls(start, [s for s in parts if s in both], has_embed)

    @property
    def all(self) -> list[Site]:
        return [*self.start, *self.parts]

    def behind(self, i: int) -> list[Site]:
        """What the block behind `start[i]` writes."""
        layer = i if self.has_embed else i + 1
        sites = [*self.start[i + 1 : i + 2], *(s for s in self.parts if s.layer == layer)]
        return sites if i + 1 < len(self.start) else []

    def request(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        edits: Sequence[Edit] = (),
        captures: Sequence[Site] = (),
        metric: Any = None,
    ) -> Request:
        reads = [Capture(list(captures))] if captures else []
        return Request(tokens, edits, reads, logits=positions, metric=metric)

    def nudged(self, null: int) -> list[Site]:
        n = min(null, len(self.start))
        return [self.start[int((i + 0.5) * len(self.start) / n)] for i in range(n)]

    def patches(
        self, tokens: Sequence[int], positions: Sequence[int], base: Result, kl: Any, null: int
    ) -> list[Request]:
        """Of b: unchanged, each of `start` patched, each of `parts` patched, and the nudges."""
        request = partial(self.request, tokens, positions, metric=kl)
        first = self.start[:1] if self.has_embed else []
        out = [request(captures=[*first, *self.block_without_input()])]
        for i, site in enumerate(self.start):
            out.append(request([_put(site, base.captures[site])], self.behind(i)))
        out += [request([_put(s, base.captures[s])]) for s in self.parts]
        return out + [request([Edit(s, nudge(i))]) for i, s in enumerate(self.nudged(null))]

    def block_without_input(self) -> list[Site]:
        """What block 0 writes, where no embedding can be patched in: both models' is the same then, or
        its difference is counted to this block."""
        if self.has_embed:
            return []
        return [self.start[0], *(s for s in self.parts if s.layer == 0)]

    def written(self, patched: Sequence[Result]) -> list[Array]:
        """b's embedding, and what its blocks write when they are given a's residual: as `start`."""
        return [patched[0 if i == 0 else i].captures[site] for i, site in enumerate(self.start)]

    def alone(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        base: Result,
        patched: Sequence[Result],
        kl: Any,
        null: int,
    ) -> list[Request]:
        """Of a: unchanged, each of `start` as b writes it, the nudges, and what changes nothing."""
        request = partial(self.request, tokens, positions, metric=kl)
        out = [request()]
        for site, rows in zip(self.start, self.written(patched), strict=True):
            out.append(request([_put(site, rows)]))
        chosen = self.nudged(null)
        out += [request([Edit(s, nudge(i))]) for i, s in enumerate(chosen)]
        # its own rows, in another batch: what its blocks then write is as far off as rounding goes
        own = [(self.start.index(s), base.captures[s]) for s in chosen]
        return out + [request([_put(self.start[i], x)], self.behind(i)) for i, x in own]


def _put(site: Site, rows: Array) -> Edit:
    return Edit(site, "replace", rows, tokens=range(len(rows)))


def _summary(
    sites: _Sites,
    tokens: Sequence[int],
    positions: Sequence[int],
    base: Result,
    patched: Sequence[Result],
    alone: Sequence[Result],
) -> Blame:
    n = len(sites.start)
    unchanged = float(patched[0].value)
    after = [float(r.value) for r in patched[1 : n + 1]]
    of_part = {
        s: unchanged - float(r.value) for s, r in zip(sites.parts, patched[n + 1 :], strict=False)
    }
    written = sites.written(patched)
    rows = []
    for i, site in enumerate(sites.start):
        before = unchanged if i == 0 else after[i - 1]
        numbers: dict[str, Any] = {
            "alone": float(alone[i + 1].value),
            "patched": after[i],
            "share": before - after[i],
        }
        x, y = base.captures[site], written[i]
        if site.layer is None:
            rows.append(Blamed(EMBEDDING, None, own_error=_error(y - x, x), **numbers))
            continue
        update = x - base.captures[sites.start[i - 1]] if i else x
        numbers["own_error"] = _error(y - x, update)
        for part, name in zip(PARTS, ("attn", "mlp"), strict=True):
            where = Site(part, site.layer)
            if where in of_part:
                own = base.captures[where]
                theirs = patched[i].captures[where]
                numbers |= {name: of_part[where], f"{name}_error": _error(theirs - own, own)}
        rows.append(Blamed(f"layer {site.layer}", site.layer, **numbers))
    rows.append(Blamed(UNEMBEDDING, None, alone=after[-1], share=after[-1]))
    nulls_b = [abs(float(r.value) - unchanged) for r in patched[n + 1 + len(sites.parts) :]]
    # the base itself, among the others: in another batch it rounds otherwise than alone
    nulls_a = [float(r.value) for r in [alone[0], *alone[n + 1 :]]]
    return Blame(
        rows,
        unchanged,
        max([RESOLUTION, *nulls_a]),
        max([RESOLUTION, *nulls_b]) if nulls_b else float("nan"),
        _own_floor(sites, base, alone[len(alone) - len(sites.nudged(len(nulls_b))) :]),
        len(tokens),
        len(positions),
    )


def _own_floor(sites: _Sites, base: Result, same: Sequence[Result]) -> float:
    """The largest error of a block of the base on its own input, NaN if none was tried."""
    errors = []
    for result, source in zip(same, sites.nudged(len(same)), strict=True):
        for site in sites.start:
            if site in result.captures:
                x = base.captures[site]
                errors.append(_error(result.captures[site] - x, x - base.captures[source]))
    return max(errors, default=float("nan"))


def _error(difference: Array, of: Array) -> float:
    """The mean over tokens of |difference| / |of|."""
    lengths: Floats = norms(of)
    ratio = norms(difference) / np.where(lengths > 0, lengths, 1)
    return float(ratio.mean())
