"""What a sweep does in each cell: from a place to the edits there.

Sources: rows of another run, Meng et al. 2022 (arXiv 2202.05262) and Wang et al. 2022
(2211.00593); ablation and blocked attention as in `mia.methods.head_ablation` and
`mia.methods.knockout`; directions added as in `mia.steering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, norms
from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.noise import nudge
from mia.methods.knockout import Block, block_edits
from mia.ranges import Head
from mia.request import Capture, Request
from mia.sites import BY_KEY, KINDS, Site
from mia.sweeps.axes import Place

if TYPE_CHECKING:
    from mia.model import Model
    from mia.vectors import Vector


@dataclass(frozen=True, eq=False)
class Base:
    """A run: token ids, and edits that are made in it."""

    tokens: Sequence[int]
    edits: Sequence[Edit] = ()

    def followed(self, tokens: Sequence[int]) -> Base:
        """The same with more tokens behind."""
        return Base([*self.tokens, *tokens], self.edits)


class Change:
    """What is done at a place."""

    def prepare(self, places: Sequence[Place], nudges: Sequence[Nudge]) -> None:
        """Runs whatever the edits of these cells need, all in one run."""

    def edits(self, place: Place) -> list[Edit]:
        raise NotImplementedError

    def reference(self) -> list[Edit]:
        """The edits of the run that cells are compared with."""
        return []

    def changed_tokens(self, place: Place) -> Sequence[int]:
        """The tokens whose rows a cell changes."""
        return place.tokens

    def nudged(self, nudge: Nudge) -> list[Edit]:
        """Edits that are too small to matter (`mia.measure.noise`)."""
        return nudge.edits

    def random(self, place: Place, seed: int) -> list[Edit] | None:
        """Edits as large as those of a place, at random; None where there is no such thing."""
        return None


@dataclass(frozen=True, eq=False)
class Nudge:
    """What measures the noise of a cell: the whole residual that the cell's block reads, at the rows
    that it changes, times 1 + 1e-5. A few numbers of one head would flip too few roundings."""

    edits: list[Edit]

    @classmethod
    def at(cls, model: Model, place: Place, rows: Sequence[int], seed: int) -> Nudge:
        site = Site("resid_pre", min(place.layers))
        if not KINDS[place.site].layered:
            site = Site(place.site)
        elif site not in model.topology.sites:
            site = sites_of(place)[0]
        return cls([Edit(site, nudge(seed), tokens=list(rows))] if rows else [])


def sites_of(place: Place) -> list[Site]:
    if not KINDS[place.site].layered:
        return [Site(place.site)]
    return [Site(place.site, layer) for layer in place.layers]


# -- rows of another run ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Patch(Change):
    """Rows of a source run replace those of the run that is changed.

    Attributes:
        rows: site -> (n_source_tokens, width) of the source run; at a site by key
            (n_source_tokens, n_head, n_keys).
        source: token of the changed run -> row that takes its place.
        n_head: of the sites that have heads.
        first: the first token at which the two runs differ. Rows before it are the same, for no
            token sees a later one: they are left, and a cell of such tokens alone costs nothing.
    """

    rows: Mapping[Site, Array]
    source: Mapping[int, int]
    n_head: Mapping[Site, int] = field(default_factory=dict)
    first: int = 0

    def edits(self, place: Place) -> list[Edit]:
        tokens = [t for t in place.tokens if t >= self.first]
        if not tokens:
            return []
        taken = [self.source[t] for t in tokens]
        out = []
        for site in sites_of(place):
            if site.name in BY_KEY:
                put = _put_lines(self.rows[site], place.heads)
                out.append(Edit(site, put, tokens=tokens, heads=place.heads))
                continue
            value = self.rows[site][taken]
            if place.heads is not None:
                heads = value.reshape(len(value), self.n_head[site], -1)
                value = heads[:, list(place.heads)].reshape(len(value), -1)
            if place.neurons is not None:
                value = value[:, list(place.neurons)]
            edit = Edit(
                site,
                "replace",
                value,
                tokens=tokens,
                heads=place.heads,
                dims=place.neurons,
            )
            out.append(edit)
        return out


def _put_lines(lines: Array, heads: Sequence[int] | None) -> Callable[[Array], Array]:
    """A function that puts a query's line of another run in place of its own.

    Args:
        lines: (n_tokens, n_head, n_keys) of the other run.
        heads: those that are replaced; None for all.
    """
    chosen = lines if heads is None else lines[:, list(heads)]

    def put(h: Array) -> Array:
        n_keys = h.shape[1] // chosen.shape[1]  # a query sees itself and all before it
        return chosen[n_keys - 1, :, :n_keys].reshape(h.shape)

    return put


def first_difference(base: Base, source: Base) -> int:
    """The first token at which two runs differ: in its id, or by an edit at it."""
    n = min(len(base.tokens), len(source.tokens))
    differ = [i for i in range(n) if base.tokens[i] != source.tokens[i]]
    edited = [p for b in (base, source) for e in b.edits for p in e.positions(len(b.tokens))]
    return min([*differ, *edited], default=n)


def patch_from(
    model: Model,
    source: Base,
    sites: Iterable[Site],
    tokens: Mapping[int, int],
    *,
    into: Base | None = None,
) -> Patch:
    """Runs the source and keeps its rows at some sites.

    Args:
        tokens: token of the changed run -> token of the source run.
        into: the changed run, if it is known.

    Raises `UsageError` for a site whose rows have a number for each key, if the tokens are not
    paired with those at the same places.
    """
    sites = list(sites)
    shifted = any(changed != other for changed, other in tokens.items())
    for site in sites:
        if site.name in BY_KEY and (shifted or not tokens):
            raise UsageError(
                f"{site} has a number for each key: it is patched between prompts whose tokens are "
                "paired from the start"
            )
    request = Request(source.tokens, source.edits, [Capture(sites)], logits=None)
    rows = model.run([request])[0].captures
    headed = [s for s in sites if s.kind.headed and s.name not in BY_KEY]
    shapes = model.topology.sites
    first = 0 if into is None or shifted else first_difference(into, source)
    return Patch(rows, dict(tokens), {s: shapes[s].shape[0] for s in headed}, first)


# -- other changes ---------------------------------------------------------------------


class Zero(Change):
    """Rows become zero."""

    def edits(self, place: Place) -> list[Edit]:
        return [
            Edit(s, "zero", tokens=place.tokens, heads=place.heads, dims=place.neurons)
            for s in sites_of(place)
        ]


@dataclass(frozen=True, eq=False)
class Steer(Change):
    """A vector added, times the place's coefficient."""

    vector: Vector

    def edits(self, place: Place) -> list[Edit]:
        return self._added(place, {i: self.vector[i] for i in self._layers(place)})

    def random(self, place: Place, seed: int) -> list[Edit]:
        """A direction of the same norm at each layer, uniform over the sphere."""
        rng = np.random.default_rng(seed)
        directions = {}
        for i in self._layers(place):
            d = rng.normal(size=self.vector[i].shape)
            directions[i] = (d / np.linalg.norm(d) * norms(self.vector[i])).astype(np.float32)
        return self._added(place, directions)

    def _layers(self, place: Place) -> list[int]:
        return [i for i in place.layers if i in self.vector.layers]

    def _added(self, place: Place, directions: Mapping[int, Array]) -> list[Edit]:
        site, at = self.vector.site, place.tokens
        return [
            Edit(Site(site, i), "add", d, tokens=at, coeff=place.coeff)
            for i, d in directions.items()
        ]


@dataclass(frozen=True, eq=False)
class BlockKeys(Change):
    """Some queries may not attend to the place's tokens, in its layers and heads.

    Attributes:
        queries: positions that may not look; those before a key never could.
    """

    model: Model
    queries: Sequence[int]

    def changed_tokens(self, place: Place) -> list[int]:
        return [q for q in self.queries if q not in place.tokens]

    def edits(self, place: Place) -> list[Edit]:
        heads = range(self.model.n_head) if place.heads is None else place.heads
        block = Block(
            self.changed_tokens(place),
            list(place.tokens),
            heads=[Head(i, h) for i in place.layers for h in heads],
        )
        return block_edits(self.model, block) if block.queries else []


# -- corrupted runs --------------------------------------------------------------------


def noises(
    model: Model,
    tokens: Sequence[int],
    subject: Sequence[int],
    *,
    scale: float,
    seeds: Iterable[int],
) -> list[Edit]:
    """Gaussian noise on the embeddings of the subject's tokens (Meng et al. 2022, sec. 2.1), an
    edit for each seed.

    Args:
        subject: positions of its tokens.
        scale: standard deviations of noise, in standard deviations of the prompt's embeddings (Meng
            et al. take 3, and all subjects of their data).
    """
    rows = model.look(tokens, "embed")["embed"]
    sigma, shape = scale * float(rows.std(dtype=np.float64)), (len(subject), rows.shape[1])
    draws = (np.random.default_rng(seed).normal(0, sigma, shape) for seed in seeds)
    return [Edit("embed", "add", d.astype(np.float32), tokens=list(subject)) for d in draws]


def aligned(n_changed: int, n_source: int, align: str | None) -> dict[int, int]:
    """Token of the changed run -> token of the source run.

    Args:
        align: "start" pairs tokens of equal index, "end" those as far from the end; None wants
            prompts of one length.

    Raises `UsageError` for prompts of two lengths without it.
    """
    if align not in (None, "start", "end"):
        raise UsageError(f"prompts are aligned at the start or the end, not {align!r}")
    if n_changed != n_source and align is None:
        raise UsageError(
            f"the prompts have {n_changed} and {n_source} tokens: say whether tokens are paired "
            "from the start or from the end, or make them of one length"
        )
    shift = n_source - n_changed if align == "end" else 0
    return {i: i + shift for i in range(n_changed) if 0 <= i + shift < n_source}
