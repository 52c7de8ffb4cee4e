"""The experiments that a sweep can make: which run is changed, and what is done in its cells.

Patching("The Colosseum is in the city of")      # rows of the prompt's run into that one's
Patching(noise_on="Eiffel Tower")                # into runs of the prompt with noise (tracing)
PatchingPairs(load_prompt_pairs("ioi.jsonl"))    # for each pair of a file
PathPatching("Mary and Ann …", "q:9.6,9.9")      # what heads send to these queries alone
Ablation(), Ablation(mean_of="The weather is")   # zero, or the mean over a prompt's tokens
Steering(vector)                                 # a vector added
Blocking()                                       # nobody after a token may look at it
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from mia.datasets.prompt_pairs import PromptPair
from mia.errors import UsageError
from mia.sites import BY_KEY, Site
from mia.sweeps.axes import Grid
from mia.sweeps.changes import (
    Base,
    BlockKeys,
    Change,
    Steer,
    Zero,
    aligned,
    noises,
    patch_from,
    sites_of,
)
from mia.sweeps.paths import PathPatch, Receiver, parse_receivers

if TYPE_CHECKING:
    from mia.model import Model
    from mia.vectors import Vector

Prompt = str | Sequence[int]
Into = Literal["corrupted", "clean"]


@dataclass(frozen=True, eq=False)
class Case:
    """One run to change.

    Attributes:
        base: the run that is changed.
        tokens: positions of it that can be changed.
        answer, against: token ids that should follow the prompt, and that should not; or none.
        source: the run that rows come from, if they come from one, and which of its tokens goes
            to which of `tokens`.
    """

    base: Base
    tokens: Sequence[int]
    answer: Sequence[int]
    against: Sequence[int]
    source: Base | None = None
    pairing: Mapping[int, int] = field(default_factory=dict)

    def followed(self, answer: Sequence[int]) -> Case:
        """The same with tokens behind each prompt."""
        source = None if self.source is None else self.source.followed(answer)
        return replace(self, base=self.base.followed(answer), source=source)


@dataclass(frozen=True)
class Asked:
    """A prompt, what should follow it and what should not; empty texts for none."""

    prompt: Prompt | None
    answer: str = ""
    against: str = ""

    def ids(self, model: Model) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the three. Raises `UsageError` if there is no prompt."""
        if self.prompt is None:
            raise UsageError("there is no prompt")
        prompt = model.ids(self.prompt)
        before = model.piece(prompt[-1])
        answer, against = (
            model.continuation(before, t) if t else [] for t in (self.answer, self.against)
        )
        return prompt, answer, against


class Experiment:
    """What is done in the cells of a sweep."""

    #: what it can be swept over
    axes: tuple[str, ...] = ("layer", "head", "token", "site", "neuron")

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def site(self) -> str | None:
        """The only site that it changes; None for any."""
        return None

    @property
    def layers(self) -> Sequence[int] | None:
        """The only layers that it can change; None for any."""
        return None

    def cases(self, model: Model, asked: Asked) -> list[Case]:
        """The runs to change: several for draws of noise, or for a file of pairs."""
        raise NotImplementedError

    def change(self, model: Model, case: Case, grid: Grid) -> Change:
        raise NotImplementedError

    def n_source(self, model: Model, case: Case) -> int:
        """Tokens of the run whose rows are kept at every site of the sweep."""
        return 0 if case.source is None else len(case.source.tokens)

    def bytes_per_cell(self, model: Model, case: Case) -> int:
        """What is kept for each cell besides its edits."""
        return 0

    def check(self, names: Sequence[str], tokens: Sequence[int], case: Case) -> None:
        """Raises `UsageError` where cells would do nothing. `names`: the axes; `tokens`: those of the
        axis, or of every cell."""


# -- patching --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Patching(Experiment):
    """Rows of one run replace those of another.

    Attributes:
        corrupted: the other prompt.
        noise_on: instead of one, a text in the prompt whose tokens' embeddings get noise (causal
            tracing, Meng et al. 2022).
        noise: its standard deviation, in those of the embeddings.
        draws, seed: of the noise.
        into: which run is changed: the corrupted one gets rows of the clean one ("corrupted"), or
            the other way.
        align: which tokens are paired where the prompts have two lengths: "start", "end".
    """

    corrupted: Prompt | None = None
    noise_on: str | None = None
    noise: float = 3.0
    draws: int = 10
    seed: int = 0
    into: Into = "corrupted"
    align: str | None = None

    def __post_init__(self) -> None:
        if (self.corrupted is None) == (self.noise_on is None):
            raise UsageError("a patch needs a corrupted prompt, or a text to put noise on")
        if self.into not in ("corrupted", "clean"):
            raise UsageError(f"rows go into the corrupted or the clean run, not {self.into!r}")
        if not self.noise > 0 or self.draws < 1:
            raise UsageError(f"noise of {self.noise} in {self.draws} draws: both must be positive")

    @property
    def title(self) -> str:
        return _title(self.into)

    def cases(self, model: Model, asked: Asked) -> list[Case]:
        clean, answer, against = asked.ids(model)
        if self.noise_on is None:
            assert self.corrupted is not None
            pairs = [(Base(clean), Base(model.ids(self.corrupted)))]
        else:
            subject = tokens_of(model, clean, self.noise_on)
            seeds = range(self.seed, self.seed + self.draws)
            edits = noises(model, clean, subject, scale=self.noise, seeds=seeds)
            pairs = [(Base(clean), Base(clean, [edit])) for edit in edits]
        return [_patched(*p, answer, against, self.into, self.align) for p in pairs]

    def change(self, model: Model, case: Case, grid: Grid) -> Change:
        assert case.source is not None
        return patch_from(model, case.source, grid_sites(grid), case.pairing, into=case.base)


@dataclass(frozen=True, eq=False)
class PatchingPairs(Experiment):
    """Rows of one run replace those of another, for each pair of a list.

    Attributes:
        pairs: see `mia.datasets.prompt_pairs`.
        into, align: as of `Patching`.
        bos: put the BOS in front; None for what the model asks for.
    """

    pairs: Sequence[PromptPair]
    into: Into = "corrupted"
    align: str | None = None
    bos: bool | None = None

    @property
    def title(self) -> str:
        return _title(self.into)

    def cases(self, model: Model, asked: Asked) -> list[Case]:
        out = []
        for pair in self.pairs:
            clean, corrupted = (model.ids(t, bos=self.bos) for t in (pair.clean, pair.corrupted))
            _, answer, against = Asked(
                clean, pair.answer or asked.answer, pair.against or asked.against
            ).ids(model)
            runs = Base(clean), Base(corrupted)
            out.append(_patched(*runs, answer, against, self.into, self.align))
        return out

    def change(self, model: Model, case: Case, grid: Grid) -> Change:
        assert case.source is not None
        return patch_from(model, case.source, grid_sites(grid), case.pairing, into=case.base)


@dataclass(frozen=True, eq=False)
class PathPatching(Experiment):
    """Heads of the corrupted run reach some receivers of the clean run along direct paths alone: all
    other heads are held at the clean run (Wang et al. 2022). The sweep's site is `head_out`.

    Attributes:
        corrupted: the other prompt.
        receivers: `q:9.6,9.9`, `v:7.*;resid_pre:10`; empty for the logits.
        align: as of `Patching`.
    """

    corrupted: Prompt
    receivers: str = ""
    align: str | None = None

    @property
    def title(self) -> str:
        return f"paths of the corrupted run to {self.receivers or 'the logits'}"

    @property
    def site(self) -> str:
        return "head_out"

    def cases(self, model: Model, asked: Asked) -> list[Case]:
        clean, answer, against = asked.ids(model)
        runs = Base(clean), Base(model.ids(self.corrupted))
        return [_patched(*runs, answer, against, "clean", self.align)]

    def change(self, model: Model, case: Case, grid: Grid) -> Change:
        assert case.source is not None
        sites = grid_sites(grid)
        patch = patch_from(model, case.source, sites, case.pairing, into=case.base)
        return PathPatch(model, case.base, patch, self._receivers(model))

    def _receivers(self, model: Model) -> list[Receiver]:
        return parse_receivers(self.receivers, model) if self.receivers else []

    def n_source(self, model: Model, case: Case) -> int:
        return len(case.base.tokens) + super().n_source(model, case)  # the heads that are held

    def bytes_per_cell(self, model: Model, case: Case) -> int:
        shapes = model.topology.sites
        widths = [prod(shapes[r.site].shape) for r in self._receivers(model)]
        return 4 * len(case.base.tokens) * sum(widths)


def _title(into: Into) -> str:
    source = "clean" if into == "corrupted" else "corrupted"
    return f"rows of the {source} run in the {into} one"


def _patched(
    clean: Base,
    corrupted: Base,
    answer: Sequence[int],
    against: Sequence[int],
    into: Into,
    align: str | None,
) -> Case:
    source, base = (clean, corrupted) if into == "corrupted" else (corrupted, clean)
    pairing = aligned(len(base.tokens), len(source.tokens), align)
    return Case(base, list(pairing), answer, against, source, pairing)


# -- other changes ---------------------------------------------------------------------


class _OnePrompt(Experiment):
    """An experiment on one prompt."""

    def cases(self, model: Model, asked: Asked) -> list[Case]:
        prompt, answer, against = asked.ids(model)
        return [Case(Base(prompt), range(len(prompt)), answer, against)]


@dataclass(frozen=True, eq=False)
class Ablation(_OnePrompt):
    """Rows become zero, or the mean over the tokens of another prompt."""

    mean_of: Prompt | None = None

    @property
    def title(self) -> str:
        return "zero" if self.mean_of is None else "the mean over another prompt"

    def n_source(self, model: Model, case: Case) -> int:
        return 0 if self.mean_of is None else len(model.ids(self.mean_of))

    def change(self, model: Model, case: Case, grid: Grid) -> Change:
        if self.mean_of is None:
            return Zero()
        sites = grid_sites(grid)
        if by_key := [s for s in sites if s.name in BY_KEY]:
            raise UsageError(f"{by_key[0]} has a number for each key: it has no mean over tokens")
        patch = patch_from(model, Base(model.ids(self.mean_of)), sites, {})
        means = {
            s: rows.mean(0, dtype=np.float64)[None].astype(np.float32)
            for s, rows in patch.rows.items()
        }
        return replace(patch, rows=means, source=dict.fromkeys(case.tokens, 0))


@dataclass(frozen=True, eq=False)
class Steering(_OnePrompt):
    """A vector is added, times the coefficient of a cell."""

    vector: Vector
    axes = ("layer", "token", "coeff")

    @property
    def title(self) -> str:
        return f"{self.vector.name} added"

    @property
    def site(self) -> str:
        return self.vector.site

    @property
    def layers(self) -> Sequence[int]:
        return self.vector.layers

    def change(self, model: Model, case: Case, grid: Grid) -> Change:
        model.check_vector(self.vector)
        return Steer(self.vector)


@dataclass(frozen=True, eq=False)
class Blocking(_OnePrompt):
    """The prompt's later tokens may not attend to those of a cell (Geva et al. 2023)."""

    queries: Sequence[int] | None = None
    axes = ("layer", "head", "token")

    @property
    def title(self) -> str:
        return "attention to these tokens blocked"

    @property
    def site(self) -> str:
        return "attn_scores"

    def check(self, names: Sequence[str], tokens: Sequence[int], case: Case) -> None:
        if "token" not in names and len(tokens) == len(case.base.tokens):
            raise UsageError("with all tokens hidden nobody is left to look: choose some tokens")

    def change(self, model: Model, case: Case, grid: Grid) -> Change:
        queries = range(len(case.base.tokens)) if self.queries is None else self.queries
        return BlockKeys(model, queries)


# -- small steps -----------------------------------------------------------------------


def grid_sites(grid: Grid) -> list[Site]:
    """Every site that some cell changes."""
    return list(dict.fromkeys(s for cell in grid.cells() for s in sites_of(grid.place(cell))))


def tokens_of(model: Model, tokens: Sequence[int], text: str) -> list[int]:
    """The positions of the tokens that spell a text, at its last place in the prompt.

    Raises `UsageError` where the prompt does not contain it.
    """
    ends, whole = [], ""
    for i in range(len(tokens)):
        whole = model.detokenize(tokens[: i + 1])
        ends.append(len(whole))
    start = whole.rfind(text)
    if start < 0 or not text:
        raise UsageError(f"the prompt does not contain {text!r}")
    starts = [0, *ends[:-1]]
    end = start + len(text)
    return [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < end and b > start]


def swapped(text: str, swaps: Mapping[str, str]) -> str:
    """A text with words replaced, all at once, so that A for B and B for A is an exchange.

    Raises `UsageError` for a word that is not there.
    """
    for word in swaps:
        if not word or word not in text:
            raise UsageError(f"the prompt does not contain {word!r}")
    words = sorted(swaps, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, words)), lambda m: swaps[m[0]], text)
