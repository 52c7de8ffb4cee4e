"""A task vector on smollm2: "answer with the capital", carried from one prompt into another.

Source: Hendel et al. 2023 (arXiv 2310.15916), with one prompt and one layer; `task_vectors` is the
method. The logit lens of the patched run is `logit_lens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.edits import Edit
from mia.lenses.table import LensRow, LensTable
from mia.request import Capture, Request, Result
from mia.show.report import Report
from mia.show.text import visible
from mia.sites import Site

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.model import Model

SOURCE = (
    "Q: Egypt\nA: Cairo\n\nQ: Norway\nA: Oslo\n\nQ: Japan\nA: Tokyo\n\nQ: Italy\nA: Rome\n\n"
    "Q: Spain\nA:"
)
SITE = "l_out-21"
COUNTRIES = ("France", "Russia", "Germany")
#: the first layer of the lens, and how many tokens it lists
_FIRST, _TOP = 17, 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What follows a query without the task vector, and with it."""

    query: str
    plain: str
    patched: str

    def document(self) -> dict[str, str]:
        return {"query": self.query, "plain": self.plain, "patched": self.patched}


@dataclass(frozen=True, eq=False)
class Demo(Report):
    """The task vector's answers, and the lens of the first patched run.

    Attributes:
        tokens: of the first query.
        n_source: tokens of the prompt with the examples.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    n_source: int
    answers: list[Answer]
    lens: LensTable

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "source": SOURCE,
            "site": SITE,
            "answers": self.rows(),
            "lens": [row.document() for row in self.lens.lens],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [a.document() for a in self.answers]

    def plain(self) -> str:
        lens = [f"  {row.site:<9s}{self.lens.cells(row)}" for row in self.lens.lens]
        return "\n".join([self._story(), *lens])

    def table(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self._story()), self.lens.table(width))

    def _story(self) -> str:
        answers = "\n".join(
            f"  Q: {a.query:<8s} A:   plain ->{visible(a.plain):<10s} patched ->{visible(a.patched)}"
            for a in self.answers
        )
        examples = SOURCE.replace("\n\n", "  ").replace("\n", " ")
        return (
            f"Five questions and four answers, {self.n_source} tokens; what the last token holds "
            f"at {SITE} is the task:\n\n  {examples}\n\n"
            f"That vector, put at the last token of a prompt without examples:\n\n{answers}\n\n"
            f"The logit lens of the patched run, last token of 'Q: {self.answers[0].query} A:' "
            f"({SITE} is where the vector came in):\n"
        )


def demo() -> Demo:
    """Carries "answer with the capital" from one prompt into another, on smollm2."""
    from mia.model import Model

    with Model("smollm2", bos=True) as model:
        source = model.tokenize(SOURCE)
        task = model.look(source, SITE, tokens=-1)[SITE]  # (1, n_embd)
        patch = Edit(SITE, "replace", task, tokens=-1)
        queries = [model.tokenize(f"Q: {c}\nA:") for c in COUNTRIES]
        requests = []
        for ids in queries:
            requests.append(Request(ids, n_predict=1, logits=None))
            requests.append(Request(ids, [patch], [Capture("l_out", -1)], logits=None, n_predict=1))
        results = model.run(requests)
        texts = [model.text(r.tokens) for r in results]
        answers = [Answer(*row) for row in zip(COUNTRIES, texts[::2], texts[1::2], strict=True)]
        tokens = model.token_rows(queries[0])
        return Demo(
            facts=model.facts,
            tokens=tokens,
            n_source=len(source),
            answers=answers,
            lens=_lens(model, results[1], tokens),
        )


def _lens(model: Model, result: Result, tokens: Sequence[Token]) -> LensTable:
    """The last token at the layers around the patched one."""
    layers = range(_FIRST, model.n_layer)
    rows = np.concatenate([result.captures[Site("resid_post", i)] for i in layers])
    read = model.lens.read(rows, _TOP)
    lens = []
    for layer, ids, probs, entropy in zip(layers, read.ids, read.probs, read.entropy, strict=True):
        top = [
            {**model.described(int(t)), "prob": round(float(p), 4)}
            for t, p in zip(ids, probs, strict=True)
        ]
        lens.append(LensRow(f"l_out-{layer}", layer, len(tokens) - 1, top, float(entropy)))
    return LensTable(model.facts, tokens, lens, n_tokens=1)
