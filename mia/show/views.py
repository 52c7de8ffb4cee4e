"""From a result to the parts of a page: maps, curves and tables for the documents that are known, and
for any other its rows as a table.

A document is known by its entries, so that one that was saved from Python, which does not say what
made it, is shown as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mia.errors import UsageError
from mia.show.again import Again
from mia.show.page import (
    Axis,
    Bar,
    BarList,
    Code,
    Command,
    Curve,
    Heading,
    HeatMap,
    LensGrid,
    Line,
    Manifest,
    Of,
    Paragraph,
    Part,
    Table,
    page,
)
from mia.show.sweep_view import sweep_parts
from mia.show.text import safe
from mia.show.values import Document, array, number_or_none, texts

#: maps of one result, and rows of a table, at most
_MAPS, _ROWS = 24, 2000
#: entries that say how a result was made, not what it is
_MADE_BY = ("model", "run")


def result_page(
    document: Document,
    rows: Sequence[Mapping[str, Any]] | None = None,
    again: Again | None = None,
) -> str:
    """The page of one result."""
    title = _title(document)
    return page(title, [*result_parts(document, rows, again), *_made_with(document, again)])


def results_page(results: Sequence[tuple[str, Document, Again | None]], *, title: str) -> str:
    """The page of several results: of each the file's name, its document, and its command line.

    Raises `UsageError` for a document whose entries do not belong together.
    """
    parts: list[Part] = []
    for file, document, again in results:
        shown = result_parts(document, None, again)
        parts += [Heading(f"{_title(document)} ({file})"), *shown, *_made_with(document, again)]
    return page(title, parts)


def is_known(document: Document) -> bool:
    """Whether it looks like a result: it says what made it, or has a view."""
    made = any(isinstance(document.get(name), Mapping) for name in _MADE_BY)
    return made or any(all(name in document for name in entries) for entries, _ in _VIEWS)


def result_parts(
    document: Document,
    rows: Sequence[Mapping[str, Any]] | None = None,
    again: Again | None = None,
) -> list[Part]:
    """A result without what made it.

    Args:
        rows: of a result that is not known; by default the records that the document has.
        again: the command line that made it.

    Raises `UsageError` where its entries do not belong together.
    """
    fits = [view for entries, view in _VIEWS if all(name in document for name in entries)]
    try:
        if fits:
            parts = [*_prompt(document), *fits[0](document, again)]
        else:
            parts = _generic(document, rows)
        for part in [*parts, *_made_with(document, None)]:
            part.html(0)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError,
            UsageError) as err:  # fmt: skip
        raise UsageError(f"its entries do not belong together ({safe(repr(err)):.100})") from err
    return parts


# -- what all have ---------------------------------------------------------------------


def _title(document: Document) -> str:
    run, model = document.get("run"), document.get("model")
    name = run.get("command") if isinstance(run, Mapping) else None
    of = model.get("name") if isinstance(model, Mapping) else None
    first = f"mia {name}" if isinstance(name, str) and name else "result"
    return f"{first} · {of}" if of else first


def _prompt(document: Document) -> list[Part]:
    tokens = document.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return []
    return [Paragraph("".join(str(t["text"]) for t in tokens))]


def _made_with(document: Document, again: Again | None) -> list[Part]:
    parts: list[Part] = []
    if again is not None:
        parts.append(Code(again.line(), title="To run it again"))
    entries = {k: document[k] for k in _MADE_BY if document.get(k)}
    return [*parts, Manifest(entries)] if entries else parts


# -- the lens --------------------------------------------------------------------------


def _lens(d: Document, again: Again | None) -> list[Part]:
    lens = d["lens"]
    sites = list(dict.fromkeys(str(r["site"]) for r in lens))
    positions = list(dict.fromkeys(int(r["token_index"]) for r in lens))
    cells = {(r["site"], r["token_index"]): r for r in lens}
    grid = [[cells[s, p] for p in positions] for s in sites]
    if len(positions) == 1:
        n = max(len(r["top"]) for r in lens)
        columns = ["site", "entropy", *(str(i + 1) for i in range(n))]
        rows = [[row[0]["site"], row[0].get("entropy"), *_ranked(row[0], n)] for row in grid]
        return [Table("The best tokens of each layer, with their probability", columns, rows)]
    pieces = {int(t["index"]): str(t["text"]) for t in d.get("tokens") or []}
    probs = array([[r["top"][0]["prob"] for r in row] for row in grid])
    entropy = array([[r.get("entropy") for r in row] for row in grid])
    by_entropy = _argument(d, "colour_by") == "entropy" and bool(np.isfinite(entropy).all())
    shown, other = (entropy, probs) if by_entropy else (probs, entropy)
    return [
        LensGrid(
            title="The token that each layer would say next",
            top=[[_best(r) for r in row] for row in grid],
            values=shown,
            rows=Axis("site", sites),
            columns=Axis("token", positions, [pieces.get(p, str(p)) for p in positions]),
            name="entropy" if by_entropy else "probability",
            unit="nats" if by_entropy else "",
            largest=None if by_entropy else 1.0,
            others=[("probability" if by_entropy else "entropy", other)]
            if by_entropy or np.isfinite(entropy).any()
            else [],
            command=() if again is None else again.cell({"token_idx": Of.COLUMN}),
        )
    ]


def _best(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(str(t["text"]), float(t["prob"])) for t in row["top"]]


def _ranked(row: Mapping[str, Any], n: int) -> list[str | None]:
    best: list[str | None] = [f'"{t["text"]}" {t["prob"]:.3f}' for t in row["top"]]
    return best + [None] * (n - len(best))


def _argument(d: Document, name: str) -> Any:
    run = d.get("run")
    return run["arguments"].get(name) if isinstance(run, Mapping) else None


# -- heads -----------------------------------------------------------------------------


def _head_map(title: str, values: Any, **more: Any) -> HeatMap:
    """(n_layer, n_head) numbers of heads."""
    a = array(values)
    layers, heads = Axis("layer", range(a.shape[0])), Axis("head", range(a.shape[1]))
    return HeatMap(title=title, values=a, rows=layers, columns=heads, **more)


def _of_head(again: Again | None) -> Command:
    """The command line for the head of a cell."""
    return () if again is None else again.cell({"heads": (Of.ROW, ".", Of.COLUMN)})


def _attribution(d: Document, again: Again | None) -> list[Part]:
    than = f' over "{d["against"]["text"]}"' if d.get("against") else ""
    layers = Axis("layer", range(len(d["attn"])))
    lines = [Line(name="attention", y=array(d["attn"])), Line(name="MLP", y=array(d["mlp"]))]
    facts = [[k, d.get(k)] for k in ("logit", "sum", "sum_after_capping", "embed", "bias")]
    return [
        Paragraph(f'what is written into the logit of "{d["answer"]["text"]}"{than}'),
        Table("The logit", ["part", "logit"], facts),
        Curve(
            title="Attention and MLP, by layer", x=layers, lines=lines, y_name="logit", signed=True
        ),
        _head_map("Heads", d["heads"], unit="logit"),
        _top_heads(d["top"], "logit"),
    ]


def _ablation(d: Document, again: Again | None) -> list[Part]:
    return [
        Paragraph(
            f'log-probability of "{texts(d["answer"])}": {number_or_none(d["logprob"])} nats'
        ),
        _head_map(
            "Drop in log-probability without a head",
            d["drop"],
            unit="nats",
            command=_of_head(again),
        ),
        _top_heads(d["top"], "nats"),
    ]


def _top_heads(top: Sequence[Mapping[str, Any]], unit: str) -> BarList:
    bars = [Bar(label=f"{t['layer']}.{t['head']}", value=float(t["value"])) for t in top]
    return BarList(title="The strongest heads", bars=bars, unit=unit)


def _head_scores(d: Document, again: Again | None) -> list[Part]:
    parts: list[Part] = [Paragraph(f"means over {d['prompts']} prompts")]
    parts += [_head_map(name, scores, diverging=False) for name, scores in d["scores"].items()]
    return parts


def _attention(d: Document, again: Again | None) -> list[Part]:
    """Each map of a few heads; of many, where each head's weight goes."""
    weights = array(d["weights"])  # (n_layer, n_head, n_query, n_key)
    layers, heads = d["layers"], d["heads"]
    pieces = [str(t["text"]) for t in d["tokens"]]
    if weights.shape != (len(layers), len(heads), len(pieces), len(pieces)):
        raise ValueError(f"weights of shape {weights.shape}")
    if len(layers) * len(heads) <= _MAPS:
        token = Axis("token", range(len(pieces)), pieces)
        seen = np.tri(len(pieces), dtype=bool)
        return [
            HeatMap(
                title=f"layer {layer}, head {head}",
                values=np.where(seen, weights[i, k], np.nan),
                rows=Axis("query", token.values, token.labels),
                columns=Axis("key", token.values, token.labels),
                diverging=False,
            )
            for i, layer in enumerate(layers)
            for k, head in enumerate(heads)
        ]
    later = weights[:, :, 1:]  # the first token sees itself alone
    means = {
        "the first token": later[..., 0],
        "the token before": np.diagonal(weights, offset=-1, axis1=2, axis2=3),
        "the token itself": np.diagonal(later, offset=1, axis1=2, axis2=3),
    }
    return [
        HeatMap(
            title=f"Weight on {name}, mean over the queries behind the first token",
            values=a.mean(-1),
            rows=Axis("layer", layers),
            columns=Axis("head", heads),
            diverging=False,
            command=_of_head(again),
        )
        for name, a in means.items()
    ]


# -- texts -----------------------------------------------------------------------------


def _steered(d: Document, again: Again | None) -> list[Part]:
    rows = [["baseline", d["baseline"]]] if d.get("baseline") is not None else []
    rows += [[f"{r['coeff']:g}", r["output"]] for r in d["steered"]]
    parts: list[Part] = [Table("Continuations", ["coefficient", "text"], rows)]
    if d.get("kl"):
        kl = Line(name="", y=[r["kl"] for r in d["kl"]])
        x = Axis("coefficient", [r["coeff"] for r in d["kl"]])
        parts.append(
            Curve(title="KL from the unsteered run", x=x, lines=[kl], y_name="nats per token")
        )
    return parts


def _perplexity(d: Document, again: Again | None) -> list[Part]:
    names = ("perplexity", "changed", "ratio", "n_tokens", "n_scored", "window", "stride")
    rows = [[name, d[name]] for name in names if d.get(name) is not None]
    return [Table("Perplexity", ["", "value"], rows)]


def _perplexity_sweep(d: Document, again: Again | None) -> list[Part]:
    lines = []
    for name, group in d["sweep"].items():
        ratio = group["ratio"]
        y, low, high = (array([r[k] for r in ratio]) for k in ("value", "low", "high"))
        lines.append(Line(name=name, y=y, low=low, high=high))
    x = Axis("injection layer", d["layers"])
    return [Curve(title="Perplexity, steered over plain", x=x, lines=lines, y_name="ratio")]


#: entries that a known document has -> its view; the first that fits
_VIEWS: Sequence[tuple[Sequence[str], Callable[[Document, Again | None], list[Part]]]] = (
    (("axes", "values", "unchanged", "metric"), sweep_parts),
    (("lens",), _lens),
    (("attn", "mlp", "heads", "logit"), _attribution),
    (("drop", "logprob", "ablated_at"), _ablation),
    (("scores", "prompts", "top"), _head_scores),
    (("weights", "layers", "heads", "tokens"), _attention),
    (("steered", "output"), _steered),
    (("perplexity", "n_scored"), _perplexity),
    (("sweep", "layers"), _perplexity_sweep),
)


# -- any other -------------------------------------------------------------------------


def _generic(document: Document, rows: Sequence[Mapping[str, Any]] | None) -> list[Part]:
    """The rows as a table; without rows, each list of records as one. Then all else, by name."""
    tables = {"Rows": rows} if rows else _records(document)
    rest = {k: v for k, v in document.items() if k not in tables and k not in _MADE_BY}
    parts: list[Part] = [_table(name, records) for name, records in tables.items()]
    left = {k: v for k, v in rest.items() if v not in (None, [], {})}
    return [*parts, Manifest(left, title="The rest")] if left else parts


def _records(document: Document) -> dict[str, Sequence[Mapping[str, Any]]]:
    return {
        name: value
        for name, value in document.items()
        if name not in _MADE_BY
        and isinstance(value, list)
        and value
        and all(isinstance(row, Mapping) for row in value)
    }


def _table(name: str, records: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(str(key) for row in records for key in row))
    rows = [[_shown(row.get(n)) for n in names] for row in records[:_ROWS]]
    more = f" (the first {_ROWS} of {len(records)})" if len(records) > _ROWS else ""
    return Table(f"{name}{more}", names, rows)


def _shown(value: Any) -> Any:
    """An entry of a table: an estimate with its interval, a list on one line."""
    if isinstance(value, Mapping):
        if {"value", "low", "high"} <= value.keys():
            ends = ", ".join(number_or_none(value[k]) for k in ("low", "high"))
            return f"{number_or_none(value['value'])} [{ends}]"
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " | ".join(str(_shown(v)) for v in value)
    return value
