"""How a `Why` looks: on a terminal, as a picture, as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.methods.why_findings import CausalMap, Components, LensAtEnd
from mia.methods.why_reports import NOT_A_SUM, Why, short
from mia.show.text import safe, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from mia.show.again import Again

#: spans with a number in the prompt, and bars of a picture
_NUMBERED, _BARS = 3, 12
#: above 0 and below it: told apart without colour too
_ABOVE, _BELOW = "█", "░"


def scores(found: Why) -> list[float | None]:
    """For each token the score of its span; None for those in none, or within the noise."""
    out: list[float | None] = [None] * len(found.tokens)
    sinks = {a.position for a in found.apart}
    for e in found.spans:
        for i in e.span.positions:
            if i not in sinks and found.above_floor(e.score):
                out[i] = e.score
    return out


def numbers(found: Why) -> dict[int, int]:
    """First token -> place in the ranking, of the spans that matter most."""
    best = [e for e in found.ranked[:_NUMBERED] if e.score > 0 and found.above_floor(e.score)]
    return {e.span.first: place for place, e in enumerate(best, 1)}


# -- terminal --------------------------------------------------------------------------


def table(found: Why, width: int) -> RenderableType:
    """The prompt, coloured by the spans' scores and with numbers at the first three, then bars, map
    and text."""
    from rich.console import Group
    from rich.text import Text

    from mia.show.grid import cells_fit, diverging_style, grid

    top = max((abs(e.score) for e in found.spans), default=0.0) or 1.0
    prompt = Text()
    places = numbers(found)
    for token, score in zip(found.tokens, scores(found), strict=True):
        if token.index in places:
            prompt.append(f" [{places[token.index]}]", style="bold")
        style = "" if score is None else diverging_style(score, top)
        style = "underline" if token.index in found.asking else style
        prompt.append(safe(token.text, "\n"), style=style)
    parts: list[RenderableType] = [Text(found.headline(), style="bold"), prompt, Text("")]
    parts.append(_bars(found, top, width))
    parts += [Text(line, style="dim") for line in found.notes()]
    m = found.map
    if isinstance(m, CausalMap):
        parts += [Text(""), *(Text(line) for line in found.map_lines(m))]
        if cells_fit(len(m.columns), width) and np.isfinite(m.restored(found.clean)).all():
            cells = grid(
                m.restored(found.clean),
                "share of the answer restored",
                width,
                diverging=True,
                names=m.layers,
                across="tokens",
                columns=[visible(c.label).strip() for c in m.columns],
            )
            parts.append(cells)
    if isinstance(found.components, Components):
        parts += [Text(""), *(Text(x) for x in found.component_lines(found.components))]
    if isinstance(found.lens, LensAtEnd):
        parts += [Text(""), *(Text(x) for x in found.lens_lines(found.lens))]
    parts += [
        Text(f"missing: {x}") for x in (m, found.components, found.lens) if isinstance(x, str)
    ]
    return Group(*parts)


def _bars(found: Why, top: float, width: int) -> RenderableType:
    from rich.text import Text

    most = max(10, min(24, width // 5))
    text = Text()
    text.append(
        f"{'score':>8s} {'blocked':>8s} {'alone':>8s}  {'':<{most}s} span ({found.how})\n", "dim"
    )
    for place, e in enumerate(found.ranked, 1):
        seen = found.above_floor(e.score)
        bar = (
            (_ABOVE if e.score > 0 else _BELOW) * max(round(abs(e.score) / top * most), 1)
            if seen
            else "·"
        )
        style = "dim" if not seen else "red" if e.score > 0 else "blue"
        text.append(f"{e.score:+8.3f} {e.blocked:+8.3f} {e.alone:+8.3f}  ")
        text.append(f"{bar:<{most}s}", style=style)
        text.append(f" {place}. {short(e.span.text, max(width - 34 - most, 20))}\n")
    return text


# -- picture ---------------------------------------------------------------------------


def picture(found: Why) -> Figure:
    """Bars of the spans, below them the map and the lens."""
    from mia.show import plots

    lower = [p for p in (found.map, found.lens) if isinstance(p, (CausalMap, LensAtEnd))]
    shown = found.ranked[:_BARS]
    height = 1.2 + 0.3 * len(shown)
    fig = plots.figure(11, height + (4.4 if lower else 0))
    upper: Any = fig
    if lower:
        upper, below = np.ravel(fig.subfigures(2, 1, height_ratios=[height, 4.4]))  # type: ignore[arg-type]
    _draw_spans(found, upper.add_subplot())
    if lower:
        axes = below.subplots(1, len(lower), squeeze=False)[0]
        for part, place in zip(lower, axes, strict=True):
            if isinstance(part, CausalMap):
                _draw_map(found, part, place, below)
            else:
                _draw_lens(part, place, found)
    return fig


def _draw_spans(found: Why, axes: Axes) -> None:
    from mia.show import plots

    shown = found.ranked[:_BARS]
    places = range(len(shown))
    colours = [
        "0.75" if not found.above_floor(e.score) else "#c2352f" if e.score > 0 else "#2a63b0"
        for e in shown
    ]
    axes.barh(places, [e.score for e in shown], color=colours)
    axes.plot([-e.blocked for e in shown], places, "k|", label="lost if it is blocked")
    axes.plot([e.alone for e in shown], places, "k.", label="gained if it is alone")
    axes.set_yticks(places, [short(e.span.text, 52) for e in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_xlabel("nats of the answer's log-probability")
    axes.legend(fontsize=8, frameon=False)
    title = f"{found.facts.name} · why {visible(found.answer_text)!r}?"
    axes.set_title(plots.wrapped(title, 8), fontsize=10, loc="left")


def _draw_map(found: Why, m: CausalMap, axes: Axes, fig: Any) -> None:
    from mia.show import plots

    shares = m.restored(found.clean)
    image = axes.imshow(shares, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", origin="lower")
    labels = [plots.short(visible(c.label)) for c in m.columns]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    some = range(0, len(m.layers), max(len(m.layers) // 10, 1))
    axes.set_yticks(some, [str(m.layers[i]) for i in some], fontsize=7)
    axes.set_ylabel("layer")
    axes.set_title("restored by one residual, noise on the best span", fontsize=9, loc="left")
    fig.colorbar(image, ax=axes, label="share", fraction=0.04, pad=0.01)


def _draw_lens(lens: LensAtEnd, axes: Axes, found: Why) -> None:
    axes.plot(lens.layers, lens.prob, "o-", markersize=3, color="#c2352f")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"probability of {visible(found.answer[0].text)!r}")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_title("the lens at the last token", fontsize=9, loc="left")


# -- page ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Prompt:
    """The prompt, each token with its span's colour."""

    found: Why

    def html(self, n: int) -> str:
        from mia.show.markup import element, number, shade, text

        found = self.found
        top = max((abs(e.score) for e in found.spans), default=0.0) or 1.0
        places = numbers(found)
        out = []
        for token, score in zip(found.tokens, scores(found), strict=True):
            if token.index in places:
                out.append(element("b", text(f" [{places[token.index]}] ")))
            shown = text(token.text, keep="\n")
            if token.index in found.asking:
                out.append(element("u", shown, title="asks"))
            elif score is None:
                out.append(shown)
            else:
                colour = shade(score, top, diverging=True)
                tip = f"{number(score, signed=True)} nats"
                out.append(element("span", shown, class_=colour, title=tip))
        legend = "red: the span makes the answer likelier; blue: less likely; underlined: what asks"
        return element("p", "".join(out), class_="words") + element(
            "p", text(legend), class_="note"
        )


def why_page(found: Why, run: Mapping[str, Any] | None, again: Again | None) -> str:
    """The page; `run` and `again` as of `Report.page`."""
    from mia.show.page import Bar, BarList, Code, Heading, Manifest, Paragraph, Part, Table, page

    parts: list[Part] = [Heading("Which spans"), _Prompt(found)]
    parts.append(
        BarList(
            title="score of each span: the mean of what the answer loses if it is blocked, and gains "
            "if it is alone",
            bars=[Bar(label=short(e.span.text), value=e.score) for e in found.ranked],
            unit="nats",
            floor=0.0 if np.isnan(found.floor) else found.floor,
            note=NOT_A_SUM,
        )
    )
    rows = [
        [e.score, e.blocked, e.alone, f"{e.span.first}..{e.span.end - 1}", e.span.text.strip()]
        for e in found.ranked
    ]
    parts.append(Table("spans", ["score", "blocked", "alone", "tokens", "text"], rows))
    parts.append(Paragraph("\n".join(found.notes()[:-1])))
    if isinstance(found.map, CausalMap):
        parts += _map_parts(found, found.map)
    if isinstance(found.components, Components):
        parts += _component_parts(found, found.components)
    if isinstance(found.lens, LensAtEnd):
        parts += _lens_parts(found, found.lens)
    for part in (found.map, found.components, found.lens):
        if isinstance(part, str):
            parts.append(Paragraph(f"missing: {part}"))
    if again is not None:
        parts.append(Code(again.line(), title="To run it again"))
    parts.append(Manifest(run or found.facts.document()))
    return page(f"Why {visible(found.answer_text)!r}?", parts, about=found.headline())


def _map_parts(found: Why, m: CausalMap) -> list[Any]:
    from mia.show.page import Axis, Heading, HeatMap, Paragraph

    shares = m.restored(found.clean)
    gap = abs(found.clean - m.corrupted)
    heat = HeatMap(
        title="share of the answer's log-probability that one residual restores",
        values=shares,
        rows=Axis("layer", list(m.layers)),
        columns=Axis(
            "token", [c.positions[0] for c in m.columns], [visible(c.label) for c in m.columns]
        ),
        floor=m.floor / gap if gap else 0.0,
        top=1.0,
        note=f"0: as with noise ({m.corrupted:.3f} nats), 1: as without ({found.clean:.3f} nats); "
        f"mean over {m.n_draws} draws. Residuals hand on what they hold, so shares do not add up.",
    )
    return [Heading("Where it goes"), Paragraph("\n".join(found.map_lines(m))), heat]


def _component_parts(found: Why, c: Components) -> list[Any]:
    from mia.show.page import Axis, Heading, HeatMap, Paragraph, Table

    rows = [[x.name, x.share, x.drop, found.reading_text(x)] for x in c.listed]
    s = c.shares
    shares = HeatMap(
        title=f"what each head writes into the logit of {visible(found.answer[0].text)!r}",
        values=s.heads,
        rows=Axis("layer", range(len(s.heads))),
        columns=Axis("head", range(s.heads.shape[1])),
        note="direct logit attribution, the final norm held fixed",
    )
    return [
        Heading("Which components"),
        Table("heads and MLPs", ["part", "logit", "answer loses without it", "looks at"], rows),
        Paragraph(found.component_lines(c)[-1]),
        shares,
    ]


def _lens_parts(found: Why, lens: LensAtEnd) -> list[Any]:
    from mia.show.page import Axis, Curve, Heading, Line, Table

    name = visible(found.answer[0].text)
    curve = Curve(
        title=f"probability of {name!r} in each layer's residual at the last token",
        x=Axis("layer", list(lens.layers)),
        lines=[Line(name=name, y=list(lens.prob))],
        y_name="probability",
    )
    rows = [
        [i, visible(t.text), p, own, rank]
        for i, t, p, own, rank in zip(
            lens.layers, lens.top, lens.top_prob, lens.prob, lens.rank, strict=True
        )
    ]
    titles = ["layer", "says", "probability", f"probability of {name!r}", "its rank"]
    return [Heading("The lens at the end"), curve, Table("layer by layer", titles, rows)]
