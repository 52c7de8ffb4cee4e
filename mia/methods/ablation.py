"""Ablation of heads: what breaks without them.

Sources: zero and mean ablation of heads as in Olsson et al. 2022 (arXiv 2209.11895) and Wang
et al. 2022 (arXiv 2211.00593), resampling as in Chan et al. 2022, "Causal Scrubbing".

| in the papers                 | here                                                     |
|-------------------------------|----------------------------------------------------------|
| head (l, h)                   | `Head(layer, head)`, written 3.5                         |
| zero / mean / resample        | `head_ablation.head_edits`, at `head_out`, before W_O    |
| p(answer) clean and ablated   | `head_sweep`, `ablate`: log-probabilities                |

Deviation: `resample` draws from other tokens of the same prompt, `resample-from` from a file;
causal scrubbing draws from other inputs.

"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.losses import AnswerLogProb
from mia.measure.prompts import check_answer
from mia.methods.head_ablation import head_edits
from mia.progress import step
from mia.ranges import (
    Head,
    Heads,
    Ranges,
    by_layer,
    every_head,
    parse_heads,
    parse_tokens,
    top_heads,
)
from mia.request import Request, one_or_more
from mia.show.report import Report
from mia.show.text import rounded, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.methods.changes import Changes
    from mia.model import Model
    from mia.progress import Progress


# -- the answer ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sweep:
    """What each head contributes to an answer.

    Attributes:
        clean: the answer's log-probability (nats), its tokens summed.
        ablated: (n_layer, n_head) the same without each head; NaN for heads that were left out.
    """

    clean: float
    ablated: Array

    @property
    def drop(self) -> Array:
        """(n_layer, n_head): clean - ablated; large if the answer needs the head."""
        return np.float32(self.clean) - self.ablated


def head_sweep(
    model: Model,
    tokens: Sequence[int],
    answer: Sequence[int],
    *,
    heads: Sequence[Head] | None = None,
    edits_of: Callable[[Head], Sequence[Edit]] | None = None,
    edits: Edit | Sequence[Edit] = (),
    progress: Progress | None = None,
) -> Sweep:
    """Ablates one head after the other, all in one run.

    Args:
        answer: token ids that should follow the prompt.
        heads: all by default.
        edits_of: the ablation of a head. By default zero at the tokens whose logits predict the
            answer: the prompt's last, and the answer's except its last.
        edits: other changes, made in every run.
    """
    if not len(answer):
        raise UsageError("the answer is empty")
    whole = [*tokens, *answer[:-1]]
    positions = range(len(tokens) - 1, len(whole))

    def zero(head: Head) -> list[Edit]:
        return head_edits(model, [head], tokens=positions)

    ablation = edits_of or zero
    chosen = every_head(model.n_layer, model.n_head) if heads is None else heads
    metric = AnswerLogProb(answer)
    edits = one_or_more(edits, Edit)
    requests = [Request(whole, edits, logits=positions, metric=metric)]
    requests += [
        Request(whole, [*edits, *ablation(h)], logits=positions, metric=metric) for h in chosen
    ]
    results = model.run(requests, progress=progress)
    ablated = np.full((model.n_layer, model.n_head), np.nan, np.float32)
    for head, result in zip(chosen, results[1:], strict=True):
        ablated[head] = result.value
    return Sweep(results[0].value, ablated)


# -- the experiment --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadAblation(Report):
    """How much less likely an answer becomes without each head.

    Attributes:
        answer: what should follow the prompt, and its tokens.
        positions: the tokens where heads are ablated, counted through prompt and answer; None
            for all.
        k: how many heads the text lists.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    answer: str
    answer_tokens: Sequence[Token]
    positions: list[int] | None
    sweep: Sweep
    k: int

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "answer": [t.document() for t in self.answer_tokens],
            "ablated_at": "all" if self.positions is None else self.positions,
            "logprob": rounded(self.sweep.clean),
            "drop": rounded(self.sweep.drop),
            "top": self._top(),
        }

    def rows(self) -> list[dict[str, Any]]:
        logprob, drop = self.sweep.ablated, self.sweep.drop
        return [
            head.document(logprob=float(logprob[head]), drop=float(drop[head]))
            for head in every_head(*drop.shape)
            if np.isfinite(drop[head])
        ]

    def plain(self) -> str:
        clean = self.sweep.clean
        lines = [f"log-probability of {visible(self.answer)!r}: {clean:.4f}"]
        for t in self._top():
            ablated = f"{clean - t['value']:.4f} (drop {t['value']:+.4f})"
            lines.append(f"without {t['layer']}.{t['head']}: {ablated}")
        return "\n".join(lines)

    def table(self, width: int) -> RenderableType:
        """The drops as coloured cells, then the text."""
        from rich.console import Group

        from mia.show.grid import grid

        cells = grid(self.sweep.drop, "drop in log-probability", width, diverging=True)
        return Group(cells, super().table(width))

    def plot(self, path: str | Path) -> None:
        """Draws the drops as a heatmap, layers down, heads across."""
        from mia.show import plots

        fig = plots.heatmap(
            self.sweep.drop,
            x="head",
            y="layer",
            bar="drop (nats)",
            title=f"{self.facts.name} · drop in the log-probability of {visible(self.answer)!r} without a head",
            diverging=True,
        )
        plots.save(fig, path)

    def _top(self) -> list[dict[str, Any]]:
        drop = self.sweep.drop
        return [h.document(value=rounded(drop[h])) for h in top_heads(drop, self.k, by_size=True)]


def ablate(
    model: Model,
    prompt: str | Sequence[int],
    answer: str,
    *,
    heads: Heads | None = None,
    tokens: Ranges | None = None,
    changes: Changes | None = None,
    k: int = 10,
) -> HeadAblation:
    """Ablates every head in turn, in one run, and measures the log-probability of an answer.

    Args:
        prompt: a text or token ids.
        answer: what should follow the prompt.
        heads: only these (`mia.ranges`); all by default.
        tokens: where heads are ablated (`mia.ranges`); "*" is all, by default the tokens whose
            logits predict the answer.
        changes: how heads are ablated (zero by default), and other changes, which are made in
            every run.
        k: how many heads the text lists.

    Raises:
        UsageError: the answer is empty.
        RangeError: no such head or token.
    """
    ids = model.ids(prompt)
    answer_ids = model.continuation(model.piece(ids[-1]), answer)
    if not answer_ids:
        raise UsageError("the answer is empty")
    check_answer(model, ids, answer)
    whole = [*ids, *answer_ids[:-1]]
    positions: list[int] | None = list(range(len(ids) - 1, len(whole)))
    if tokens is not None:
        everywhere = isinstance(tokens, str) and tokens in ("*", "all")
        positions = None if everywhere else parse_tokens(tokens, len(ids))
    chosen = parse_heads("*.*" if heads is None else heads, model.n_layer, model.n_head)
    edits_of: Callable[[Sequence[Head]], list[Edit]]
    edits_of, edits = partial(head_edits, model, tokens=positions), []
    if changes is not None:
        edits_of = changes.head_ablation(model, whole, list(by_layer(chosen)), positions)
        edits = changes.without_ablation_method().edits(model, ids)
    with step("ablating") as bar:
        sweep = head_sweep(
            model,
            ids,
            answer_ids,
            heads=chosen,
            edits_of=lambda head: edits_of([head]),
            edits=edits,
            progress=bar,
        )
    return HeadAblation(
        facts=model.facts,
        tokens=model.token_rows(ids),
        answer=answer,
        answer_tokens=model.token_rows(answer_ids),
        positions=positions,
        sweep=sweep,
        k=k,
    )
