"""What `explore` found, as a report: a document, lines, a table, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, Floats, IntArray
from mia.methods.explore_changes import NOTHING, Said
from mia.show.report import Report
from mia.show.text import rounded, visible

if TYPE_CHECKING:
    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.methods.attention import AttentionMaps
    from mia.methods.attribution import Attribution
    from mia.methods.explore_words import Words
    from mia.show.again import Again


@dataclass(frozen=True, eq=False)
class Alternatives:
    """What the model would say after each of n tokens.

    Attributes:
        ids, logprobs: (n, k) the best tokens, best first, and their natural log-probabilities.
        own, ranks: (n,) those of the token that the text has there; NaN and 0 after the last.
    """

    ids: IntArray
    logprobs: Floats
    own: Floats
    ranks: IntArray


@dataclass(frozen=True, eq=False)
class Lens:
    """What each layer would say after each of n tokens.

    Attributes:
        ids, probs: (n_layer, n, k) the best tokens, best first.
        followed: for each token (m,) ids: the text's next one, the model's alternatives, and all
            that some layer lists.
        logprobs, ranks: for each token (n_layer, m) of those; rank 1 is the most probable.
    """

    ids: IntArray
    probs: Array
    followed: list[IntArray]
    logprobs: list[Array]
    ranks: list[IntArray]


@dataclass(frozen=True, eq=False)
class Blocking:
    """How much less probable each token becomes if those after another may not attend to it.

    Attributes:
        drop: (n_token, n_key) nats, clean - blocked; NaN where the key is not before the token that
            predicts this one.
        floor: (n,) the largest change of each token's log-probability by a change of 1e-5.
    """

    drop: Floats
    floor: Floats


@dataclass(frozen=True)
class Branch:
    """What follows if an alternative stands in place of a generated token.

    Attributes:
        at: index of the token that it replaces; token: the alternative's id.
        tokens, logprobs: what the model generates after it.
    """

    at: int
    token: int
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True, eq=False)
class Explored(Report):
    """A text, and what the model computes at each of its tokens. `save("page.html")` writes a page.

    Attributes:
        tokens: of the prompt and of what was generated after it.
        n_prompt: how many are the prompt's.
        attention, attribution, blocking: None where the architecture has no such thing, and
            `missing` says why. The attribution is one for each token but the first, None for one
            whose parts do not add up.
        branches: continuations of other tokens.
        pieces: {"id", "text"} of every token that something here names.
        words: what commands need.
        label, said: what the text is called, and how the changes are said with which it was generated.
        changed: the changed text, if this is the unchanged one beside it.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    n_prompt: int
    alternatives: Alternatives
    lens: Lens
    attention: AttentionMaps | None
    attribution: Sequence[Attribution | None] | None
    blocking: Blocking | None
    branches: Sequence[Branch]
    missing: dict[str, str]
    pieces: Mapping[int, dict[str, Any]]
    words: Words
    label: str = "the text"
    said: Said = NOTHING
    changed: Explored | None = None

    @property
    def views(self) -> list[Explored]:
        """The texts of the page."""
        return [self] if self.changed is None else [self, self.changed]

    def document(self) -> dict[str, Any]:
        """All but the attention and the tokens that are followed, which only the page has."""
        changed = {} if self.changed is None else {"changed": self.changed.document()}
        changes = {"changes": self.said.text} if self.said.text else {}
        return {
            "model": self.facts.document(),
            **changes,
            "tokens": [t.document() for t in self.tokens],
            "n_prompt": self.n_prompt,
            "alternatives": [self._after(i) for i in range(len(self.tokens))],
            "lens": [
                [self._listed(ids, np.log(p)) for ids, p in zip(*layer, strict=True)]
                for layer in zip(self.lens.ids, self.lens.probs, strict=True)
            ],
            "attribution": None if self.attribution is None else [*map(_shares, self.attribution)],
            "blocking": None
            if self.blocking is None
            else {"drop": rounded(self.blocking.drop), "noise_floor": rounded(self.blocking.floor)},
            "branches": [
                {
                    "at": b.at,
                    "token": self.pieces[b.token],
                    "tokens": self._listed(b.tokens, b.logprobs, "logprob"),
                }
                for b in self.branches
            ],
            "missing": self.missing,
            **changed,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record for each token and each of its alternatives; of two texts with `view`."""
        return [
            {**({} if self.changed is None else {"view": e.label}), **row}
            for e in self.views
            for row in e._rows()
        ]

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"token_index": i, "rank": rank, **entry}
            for i in range(1, len(self.tokens))
            for rank, entry in enumerate(self._after(i - 1)["top"], 1)
        ]

    def plain(self) -> str:
        """The generated tokens, each with its probability and what it could have been."""
        if self.changed is None:
            return self._lines()
        return f"unchanged:\n{self._lines()}\nchanged:\n{self.changed._lines()}"

    def _lines(self) -> str:
        lines = []
        for i in range(self.n_prompt, len(self.tokens)):
            a = self.alternatives
            top = "|".join(
                f"{visible(e['text'])} {e['prob']:.2f}" for e in self._after(i - 1)["top"]
            )
            p = float(np.exp(a.own[i - 1]))
            lines.append(f"{i}: {visible(self.tokens[i].label)} {p:.2f}, of {top}")
        return "\n".join(lines)

    def page(self, run: Mapping[str, Any] | None = None, again: Again | None = None) -> str:
        """A page that shows all of it and needs nothing else; it has commands of its own."""
        from mia.show.explorer import explorer_page

        return explorer_page(self)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which cannot reach the notebook around it."""
        from mia.show.markup import element

        return element(
            "iframe",
            "",
            srcdoc=self.page(),
            sandbox="allow-scripts",
            title="mia explore",
            style="width:100%;height:50rem;border:1px solid #8888;border-radius:4px",
        )

    def _after(self, i: int) -> dict[str, Any]:
        a = self.alternatives
        return {
            "token_index": i,
            "top": self._listed(a.ids[i].tolist(), a.logprobs[i]),
            "logprob_of_next": rounded(a.own[i]),
            "rank_of_next": int(a.ranks[i]) or None,
        }

    def _listed(
        self, ids: Sequence[int], logprobs: Sequence[float], name: str = "prob"
    ) -> list[dict[str, Any]]:
        numbers = np.asarray(logprobs, np.float64)
        shown = rounded(np.exp(numbers) if name == "prob" else numbers)
        return [{**self.pieces[int(t)], name: x} for t, x in zip(ids, shown, strict=True)]


def _shares(s: Attribution | None) -> dict[str, Any] | None:
    if s is None:
        return None
    names = ("logit", "embed", "bias", "attn", "mlp", "heads")
    return {name: rounded(getattr(s, name)) for name in names}
