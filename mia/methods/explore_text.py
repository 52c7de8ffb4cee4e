"""All that a page shows of one text: a run that reads it, and one of what else it could have been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, IntArray
from mia.edits import Edit
from mia.errors import ModelError
from mia.lenses.followed import follow
from mia.methods.attention import AttentionMaps, maps_of, maps_request
from mia.methods.attribution import Attribution, attribution_request, shares_of
from mia.methods.explore_changes import NOTHING, Said
from mia.methods.explore_parts import (
    N_NUDGES,
    BestAfter,
    LossAfter,
    blocked,
    cannot_block,
    columns_request,
    edits_on,
    lacking,
    nudged,
    read_lens,
    residuals,
)
from mia.methods.explore_reports import Alternatives, Blocking, Branch, Explored, Lens
from mia.methods.explore_words import words_of
from mia.progress import Progress, step
from mia.request import Request, Result, Sampling

if TYPE_CHECKING:
    from mia.model import Model

#: tokens after an alternative, beside the alternative itself
_BRANCH = 16


@dataclass(frozen=True)
class Settings:
    """How a text is explored: see `mia.methods.explore.explore`."""

    n_predict: int
    k: int
    branches: int
    sampling: Sampling


def explore_text(
    model: Model,
    prompt: Sequence[int],
    written: Sequence[int],
    how: Settings,
    *,
    edits: Sequence[Edit] = (),
    label: str = "the text",
    said: Said = NOTHING,
) -> Explored:
    """Reads all that a page needs of a text that is there.

    Args:
        prompt, written: its tokens, those given and those generated after them.
        edits: changes of the prompt's run, with which the text was generated.
        label, said: what the page calls the text, and how it says the changes.
    """
    whole = [*prompt, *written]
    with step("reading") as bar:
        reading = _Reading(model, whole, how.k, edits_on(edits, len(prompt), len(whole)), bar)
    alternatives = reading.alternatives()
    starts = _branch_starts(whole, len(prompt), alternatives, how.branches)
    with step("changing") as bar:
        grown, blocking = _changed(model, whole, starts, how, len(prompt), edits, bar)
    if isinstance(blocking, str):
        reading.missing["blocking"] = blocking
    lens = reading.lens(alternatives)
    named = {*whole, *lens.ids.ravel().tolist(), *alternatives.ids.ravel().tolist()}
    named |= {t for branch in grown for t in branch.tokens}
    return Explored(
        facts=model.facts,
        tokens=model.token_rows(whole),
        n_prompt=len(prompt),
        alternatives=alternatives,
        lens=lens,
        attention=reading.attention,
        attribution=reading.attribution(),
        blocking=None if isinstance(blocking, str) else blocking,
        branches=grown,
        missing=reading.missing,
        pieces={t: model.described(t) for t in named},
        words=words_of(
            model,
            whole,
            alternatives,
            n_predict=how.n_predict,
            k=how.k,
            branches=how.branches,
            sampling=how.sampling,
        ),
        label=label,
        said=said,
    )


class _Reading:
    """What one run of the whole text gave.

    Attributes:
        attention: None where the architecture has no patterns.
        missing: part -> why it is left out.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int],
        k: int,
        edits: Sequence[Edit],
        bar: Progress | None,
    ):
        self.model, self.tokens, self.k, self.edits = model, tokens, k, edits
        self.missing: dict[str, str] = {}
        every = range(len(tokens))
        requests = {
            "lens": columns_request(model, tokens, every, k, edits),
            "attention": maps_request(model, tokens, edits=edits),
            # of the token before each token, which predicts it
            "attribution": attribution_request(model, tokens, every[:-1], edits=edits),
        }
        for part in ("attention", "attribution"):
            if (why := lacking(model, requests[part])) is not None:
                self.missing[part] = why
        chosen = {p: r for p, r in requests.items() if p not in self.missing}
        results = model.run(list(chosen.values()), progress=bar)
        self._chosen = chosen
        self._results = dict(zip(chosen, results, strict=True))
        self.attention: AttentionMaps | None = None
        if "attention" in chosen:
            self.attention = maps_of(model, chosen["attention"], self._results["attention"])

    def alternatives(self) -> Alternatives:
        """The best tokens after each token, and where the text's own next one stands."""
        return BestAfter.gathered(self._results["lens"].value)

    def lens(self, alternatives: Alternatives) -> Lens:
        """What each layer says after each token, and all of it followed through the layers."""
        n = len(self.tokens)
        rows = residuals(self.model, self._results["lens"].captures)
        ids, probs = read_lens(self.model, rows, self.k)
        followed: list[IntArray] = []
        for i in range(n):
            listed = [*self.tokens[i + 1 : i + 2], *alternatives.ids[i].tolist()]
            listed += ids[:, i].ravel().tolist()
            followed.append(np.array(list(dict.fromkeys(listed)), np.intp))
        logprobs, ranks = self._follow(rows, followed)
        return Lens(ids, probs, followed, logprobs, ranks)

    def _follow(
        self, rows: Array, followed: Sequence[IntArray]
    ) -> tuple[list[Array], list[IntArray]]:
        """(n_layer, m) for the m tokens that are followed at each token of the text."""
        n_layer, n, _ = rows.shape
        most = max(map(len, followed))
        # one rectangle: the rows' lists are filled up with their first token
        padded = np.stack([np.pad(f, (0, most - len(f)), mode="edge") for f in followed])
        every = follow(
            self.model.lens, rows.reshape(n_layer * n, -1), np.tile(padded, (n_layer, 1))
        )
        logprobs = every.logprobs.reshape(n_layer, n, most)
        ranks = every.ranks.reshape(n_layer, n, most)
        sizes = [len(f) for f in followed]
        return (
            [logprobs[:, i, :m] for i, m in enumerate(sizes)],
            [ranks[:, i, :m] for i, m in enumerate(sizes)],
        )

    def attribution(self) -> list[Attribution | None] | None:
        """The shares of each token's logit, of all but the first; None for one whose parts do not
        add up."""
        if "attribution" in self.missing:
            return None
        answers = [[t] for t in self.tokens[1:]]
        shares = shares_of(
            self.model, self._chosen["attribution"], self._results["attribution"], answers
        )
        errors = [s for s in shares if isinstance(s, ModelError)]
        if len(errors) == len(shares):
            self.missing["attribution"] = (
                "the changes write into the residual too, so the parts of the model do not add up to it"
                if self.edits
                else str(errors[0])
            )
            return None
        return [None if isinstance(s, ModelError) else s[0] for s in shares]


# -- changed runs ----------------------------------------------------------------------


def _branch_starts(
    whole: Sequence[int], n_prompt: int, alternatives: Alternatives, branches: int
) -> list[tuple[int, int]]:
    """(index of a generated token, the token that takes its place) of each branch."""
    starts = []
    for t in range(n_prompt, len(whole)):
        others = [i for i in alternatives.ids[t - 1].tolist() if i != whole[t]]
        starts += [(t, other) for other in others[:branches]]
    return starts


def _changed(
    model: Model,
    whole: Sequence[int],
    starts: Sequence[tuple[int, int]],
    how: Settings,
    n_prompt: int,
    edits: Sequence[Edit],
    bar: Progress | None,
) -> tuple[list[Branch], Blocking | str]:
    """The continuations of alternatives, and the text with each token's keys blocked: one run."""
    requests = []
    for t, other in starts:
        # what ends the turn ends the text
        n = 0 if model.ends_turn(other) else min(n_prompt + how.n_predict - t - 1, _BRANCH)
        own = edits_on(edits, n_prompt, t + 1)
        request = Request([*whole[:t], other], own, logits=None, n_predict=n, logprobs=True)
        requests.append(replace(request, sampling=how.sampling))
    blocks = _blocks(model, whole, edits_on(edits, n_prompt, len(whole) - 1))
    if isinstance(blocks, str):
        results = model.run(requests, progress=bar) if requests else []
        return _branches(starts, results), blocks
    results = model.run([*requests, *blocks], progress=bar)
    return _branches(starts, results), _blocking(whole, results[len(requests) :])


def _branches(starts: Sequence[tuple[int, int]], results: Sequence[Result]) -> list[Branch]:
    return [
        Branch(t, other, r.tokens, r.logprobs)
        for (t, other), r in zip(starts, results, strict=False)
    ]


def _blocks(model: Model, whole: Sequence[int], edits: Sequence[Edit]) -> list[Request] | str:
    """The text as it is, with nudges, and with each token but the last two hidden from those
    after it; or why that cannot be run."""
    if (why := cannot_block(model)) is not None:
        return why
    read = range(len(whole) - 1)

    def changed(more: Sequence[Edit], first: int = 0) -> Request:
        metric = LossAfter(whole[first + 1 :])
        return Request(whole[:-1], [*edits, *more], logits=read[first:], metric=metric)

    requests = [changed([]), *(changed([nudged(seed)]) for seed in range(N_NUDGES))]
    # what stands before a key's first query is as it was
    requests += [changed(blocked(model, read[key:], key), key + 1) for key in read[:-1]]
    return requests


def _blocking(whole: Sequence[int], results: Sequence[Result]) -> Blocking:
    losses = [np.asarray(r.value, np.float64) for r in results]
    clean, nudged, blocked = losses[0], losses[1 : N_NUDGES + 1], losses[N_NUDGES + 1 :]
    n = len(whole)
    drop = np.full((n, n), np.nan)
    for key, loss in enumerate(blocked):
        drop[key + 2 :, key] = loss - clean[key + 1 :]
    floor = np.full(n, np.nan)
    floor[1:] = np.abs(np.stack(nudged) - clean).max(0)
    return Blocking(drop, floor)
