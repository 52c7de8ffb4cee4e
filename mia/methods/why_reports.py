"""The report of `mia.methods.why`, as text, table, picture, page and document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.methods.why_findings import (
    Apart,
    CausalMap,
    Component,
    Components,
    LensAtEnd,
    SpanEffect,
)
from mia.ranges import compact
from mia.show.report import Report
from mia.show.text import columns, rounded, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.show.again import Again

_LONGEST, _LISTED = 70, 5
NOT_A_SUM = (
    "Scores of spans are no shares and do not add up: two spans that say the same replace each other, "
    "and two that need each other count twice."
)


@dataclass(frozen=True, eq=False)
class Why(Report):
    """Which spans of a prompt and which parts of the model made an answer.

    Attributes:
        answer: its tokens; said: whether the model says it, greedily.
        how: how the prompt was cut; asking: the positions of what asks.
        apart: attention sinks.
        clean, bare: the answer's log-probability (nats, its tokens summed) in the whole prompt, and
            in one of what asks alone.
        floor: the largest change that one by 1e-5 made (of `n_null`); NaN if none was tried.
        token_forwards: how many the spans took.
        map, components, lens: None where they were not asked for, a text that says why there is none.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    answer: Sequence[Token]
    said: bool
    how: str
    spans: Sequence[SpanEffect]
    asking: range
    apart: Sequence[Apart]
    clean: float
    bare: float
    floor: float
    n_null: int
    token_forwards: int
    map: CausalMap | str | None = None
    components: Components | str | None = None
    lens: LensAtEnd | str | None = None

    @property
    def ranked(self) -> list[SpanEffect]:
        """The spans by score, the largest first."""
        return sorted(self.spans, key=lambda e: -e.score)

    def above_floor(self, value: float) -> bool:
        return not abs(value) <= self.floor

    @property
    def answer_text(self) -> str:
        return "".join(t.text for t in self.answer)

    @property
    def asking_text(self) -> str:
        return "".join(self.tokens[i].text for i in self.asking)

    # -- data ----------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "answer": [t.named() for t in self.answer],
            "answer_is_greedy": self.said,
            "logprob": rounded(self.clean),
            "logprob_of_asking_alone": rounded(self.bare),
            "noise_floor": rounded(self.floor),
            "null": self.n_null,
            "cut_into": self.how,
            "asking": [self.asking.start, self.asking.stop],
            "apart": [{"token": a.position, "blocked": rounded(a.blocked)} for a in self.apart],
            "spans": [self._span(e, round=True) for e in self.ranked],
            "token_forwards": self.token_forwards,
            "map": _part(self.map, self._map),
            "components": _part(self.components, self._components),
            "lens": _part(self.lens, _lens),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record for each span, in the order of the prompt."""
        return [self._span(e) for e in self.spans]

    def _span(self, e: SpanEffect, *, round: bool = False) -> dict[str, Any]:
        numbers = {"blocked": e.blocked, "alone": e.alone, "score": e.score}
        return {
            "first": e.span.first,
            "end": e.span.end,
            "text": e.span.text,
            **({k: rounded(v) for k, v in numbers.items()} if round else numbers),
            "above_floor": self.above_floor(e.score),
        }

    def _map(self, m: CausalMap) -> dict[str, Any]:
        return {
            "layers": list(m.layers),
            "columns": [{"label": c.label, "tokens": list(c.positions)} for c in m.columns],
            "logprob": rounded(m.values),
            "restored": rounded(m.restored(self.clean)),
            "corrupted": rounded(m.corrupted),
            "noise_floor": rounded(m.floor),
            "draws": m.n_draws,
        }

    def _components(self, c: Components) -> dict[str, Any]:
        s = c.shares
        return {
            "logit": rounded(s.logit),
            "sum": rounded(s.total),
            "embed": rounded(s.embed),
            "heads": rounded(s.heads),
            "attn": rounded(s.attn),
            "mlp": rounded(s.mlp),
            "bias": rounded(s.bias),
            "noise_floor": rounded(c.floor),
            "listed": [
                {
                    "kind": x.kind,
                    "layer": x.layer,
                    "head": x.head,
                    "share": rounded(x.share),
                    "drop": rounded(x.drop),
                    **self._reading(x),
                }
                for x in c.listed
            ],
        }

    def _reading(self, x: Component) -> dict[str, Any]:
        r = x.reading
        if r is None:
            return {}
        span = self.spans[r.span].span
        return {
            "looks_at": [span.first, span.end],
            "weight": rounded(r.weight),
            "weight_of_asking": rounded(r.asking),
            "weight_of_sinks": rounded(r.sinks),
        }

    # -- text ----------------------------------------------------------------------------

    def plain(self) -> str:
        return "\n".join([self.headline(), self._span_lines(), *self.notes(), *self._part_lines()])

    def headline(self) -> str:
        said = " (what the model says)" if self.said else ""
        return (
            f"answer {visible(self.answer_text)!r}{said}: log-probability {self.clean:.4f} nats, "
            f"probability {math.exp(self.clean):.3g}"
        )

    def _span_lines(self) -> str:
        lines = [
            [
                f"{e.score:+.3f}{'' if self.above_floor(e.score) else ' *'}",
                f"{e.blocked:+.3f}",
                f"{e.alone:+.3f}",
                _range(e.span.positions),
                short(e.span.text),
            ]
            for e in self.ranked
        ]
        titles = ["score", "blocked", "alone", "tokens", f"span ({self.how})"]
        body = columns(titles[:4], [line[:4] for line in lines]).split("\n")
        ends = [titles[4], *(line[4] for line in lines)]
        return "\n".join(f"{a}  {b}" for a, b in zip(body, ends, strict=True))

    def notes(self) -> list[str]:
        """What has to be known of the spans."""
        out = [
            f"asks: tokens {_range(self.asking)} {short(self.asking_text)!r}, in every run; "
            f"alone it gives the answer {self.bare:.4f}"
        ]
        for a in self.apart:
            out.append(
                f"apart: token {a.position} {visible(self.tokens[a.position].text)!r} is an attention "
                f"sink: not ranked, for without it ({a.blocked:+.3f}) all tokens attend otherwise"
            )
        if self.n_null:
            out.append(
                f"noise floor {self.floor:.2g} nats ({self.n_null} changes by 1e-5); * lies within it"
            )
        return [*out, NOT_A_SUM]

    def _part_lines(self) -> list[str]:
        out = []
        if isinstance(self.map, CausalMap):
            out += self.map_lines(self.map)
        if isinstance(self.components, Components):
            out += self.component_lines(self.components)
        if isinstance(self.lens, LensAtEnd):
            out += self.lens_lines(self.lens)
        return [*out, *(f"missing: {p}" for p in self._parts() if isinstance(p, str))]

    def _parts(self) -> list[Any]:
        return [self.map, self.components, self.lens]

    def map_lines(self, m: CausalMap) -> list[str]:
        shares = m.restored(self.clean)
        head = (
            f"noise on the best span ({m.n_draws} draws): log-probability {m.corrupted:.4f}; "
            "restored by one residual, as a share:"
        )
        if not np.isfinite(shares).all():
            return [f"{head} the noise changes nothing"]
        best = [int(i) for i in shares.argmax(0)]
        order = sorted(range(len(best)), key=lambda c: -shares[best[c], c])[:_LISTED]
        cells = [
            f"layer {m.layers[best[c]]} {visible(m.columns[c].label)!r} {shares[best[c], c]:.2f}"
            for c in order
        ]
        return [f"{head} {' | '.join(cells)}"]

    def component_lines(self, c: Components) -> list[str]:
        first, s = visible(self.answer[0].text), c.shares
        rows = [
            [
                x.name,
                f"{x.share:+.3f}",
                f"{x.drop:+.3f}{'' if abs(x.drop) > c.floor else ' *'}",
                self.reading_text(x),
            ]
            for x in c.listed
        ]
        titles = [f"writes {first!r}", "logit", "answer loses without it", "looks at"]
        return [
            columns(titles, rows),
            f"embedding {s.embed:+.3f}, attention {s.attn.sum():+.3f}, MLPs {s.mlp.sum():+.3f}, biases "
            f"{s.bias:+.3f}: {s.total:.3f} (the model's own logit: {s.logit:.3f}); what the answer loses "
            "does not add up, for parts replace each other",
        ]

    def reading_text(self, x: Component) -> str:
        r = x.reading
        if r is None:
            return ""
        where = _range(self.spans[r.span].span.positions)
        return f"{where} {r.weight:.2f}, what asks {r.asking:.2f}, sinks {r.sinks:.2f}"

    def lens_lines(self, lens: LensAtEnd) -> list[str]:
        start = lens.first_from
        told = "never" if start is None else f"from layer {start} on"
        shown = [
            f"{i} {visible(t.text)!r} {p:.2g}, answer #{rank} {own:.2g}"
            for i, t, p, rank, own in zip(
                lens.layers, lens.top, lens.top_prob, lens.rank, lens.prob, strict=True
            )
        ]
        some = range(len(shown) - 1, -1, -max(len(shown) // 6, 1))
        layers = " | ".join(shown[i] for i in sorted(some))
        return [
            f"lens at the last token: {visible(self.answer[0].text)!r} is first {told}; {layers}"
        ]

    # -- shown ---------------------------------------------------------------------------

    def table(self, width: int) -> RenderableType:
        from mia.methods.why_shown import table

        return table(self, width)

    def plot(self, path: str | Path) -> None:
        """Draws the spans' scores, and the map and the lens if there are any."""
        from mia.methods.why_shown import picture
        from mia.show import plots

        plots.save(picture(self), path)

    def page(self, run: Mapping[str, Any] | None = None, again: Again | None = None) -> str:
        """One self-contained page of all parts."""
        from mia.methods.why_shown import why_page

        return why_page(self, run, again)


def short(text: str, most: int = _LONGEST) -> str:
    """A span's text on one line, its middle left out where it is long."""
    line = visible(text.strip())
    return line if len(line) <= most else f"{line[: most // 2 - 1]} … {line[-most // 2 + 2 :]}"


def _range(positions: Sequence[int]) -> str:
    return compact(list(positions))


def _part(part: Any, document: Any) -> Any:
    return {"missing": part} if isinstance(part, str) else None if part is None else document(part)


def _lens(lens: LensAtEnd) -> list[dict[str, Any]]:
    return [
        {
            "layer": i,
            "prob": rounded(p, 8),
            "rank": rank,
            "top": {**t.named(), "prob": rounded(q, 8)},
        }
        for i, p, rank, t, q in zip(
            lens.layers, lens.prob, lens.rank, lens.top, lens.top_prob, strict=True
        )
    ]
