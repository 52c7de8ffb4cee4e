"""The parts of `mia.methods.why` besides the spans: the causal map, the heads and MLPs, the lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mia.edits import Edit
from mia.errors import ModelError, SiteError
from mia.measure.answers import Metric
from mia.measure.losses import AnswerLogProb, log_softmax
from mia.measure.noise import nudge
from mia.methods.attribution import attribute_logit
from mia.methods.head_ablation import head_edits
from mia.methods.sweep import run_cells
from mia.methods.why_findings import (
    CausalMap,
    Column,
    Component,
    Components,
    LensAtEnd,
    Prompted,
    Reading,
)
from mia.progress import step
from mia.ranges import Head, top_heads
from mia.request import Capture, Request
from mia.sites import Site
from mia.spans import Span
from mia.sweeps.axes import Axis, Cell, Grid, Place
from mia.sweeps.changes import Base, noises, patch_from

if TYPE_CHECKING:
    from mia.model import Model

#: a prompt of more tokens has columns for those of the best span and of what asks; the others share one
_COLUMNS = 40
#: tokens of the best span and of what asks that have columns of their own, at most
_OWN = 16
#: token-forwards that a map may need: a longer prompt has fewer layers
_FORWARDS = 4000
_DRAWS, _NOISE = 2, 3.0
#: changes by 1e-5 for a map, in each draw, and for the components
_NULL = 4


# -- the causal map --------------------------------------------------------------------


class _ColumnGrid(Grid):
    """Cells of a layer and the tokens of a column."""

    def place(self, cell: Cell) -> Place:
        values = self.values(cell)
        return replace(self.rest, layers=(values["layer"],), tokens=values["token"])


def causal_map(
    model: Model, asked: Prompted, span: Span, *, labels: Sequence[str], seed: int = 0
) -> CausalMap | str:
    """What of the answer each residual restores in a run with noise on a span's embeddings.

    Args:
        labels: of the prompt's tokens.

    Returns the map, or why there is none.
    """
    sites = [s for s in model.topology.sites if s.name == "resid_post"]
    if len(sites) < model.n_layer or Site("embed") not in model.topology.sites:
        return f"{model.name} has no residual that could be restored in every layer"
    columns = _columns(asked, span, labels, model)
    layers = _layers(model.n_layer, len(asked.whole), columns)
    metric = Metric("logprob", AnswerLogProb(asked.answer), len(asked.answer))
    clean = Base(asked.whole)
    seeds = range(seed, seed + _DRAWS)
    keys = asked.without_sinks(span)
    draws = noises(model, asked.whole, keys, scale=_NOISE, seeds=seeds)
    grid = _ColumnGrid(
        (Axis("layer", tuple(layers)), Axis("token", tuple(c.positions for c in columns))),
        Place("resid_post", tuple(layers), (0,)),
        model.n_layer,
    )
    every = {i: i for i in range(len(asked.whole))}
    patch = patch_from(
        model,
        clean,
        [Site("resid_post", i) for i in layers],
        every,
        into=Base(clean.tokens, draws[:1]),
    )
    with step("restoring residuals") as bar:
        runs = [
            run_cells(model, Base(clean.tokens, [d]), grid, patch, metric, null=_NULL, progress=bar)
            for d in draws
        ]
    return CausalMap(
        layers=layers,
        columns=columns,
        values=np.mean([r.values for r in runs], axis=0),
        corrupted=float(np.mean([r.unchanged for r in runs])),
        floor=float(np.max([r.floor for r in runs])),
        n_draws=_DRAWS,
    )


def _columns(asked: Prompted, span: Span, labels: Sequence[str], model: Model) -> list[Column]:
    """A column for each token, or, of a long prompt, for those of the span and of what asks."""
    n = len(asked.tokens)
    own = set(range(n))
    if n > _COLUMNS:
        own = {*list(span.positions)[-_OWN:], *list(asked.asking)[-_OWN:]}
    rest = tuple(i for i in range(n) if i not in own and i not in asked.sinks)
    out = [Column(labels[i], (i,)) for i in sorted(own) if i not in asked.sinks]
    if rest:
        out.append(Column("all others", rest))
    for i, token in enumerate(asked.answer[:-1], n):
        out.append(Column(f"{model.piece(token)} (answer)", (i,)))
    return out


def _layers(n_layer: int, n_tokens: int, columns: Sequence[Column]) -> list[int]:
    """Every layer, or every second, third …, with the last, so that the map stays affordable."""
    suffixes = sum(n_tokens - c.positions[0] for c in columns) * _DRAWS
    for width in range(1, n_layer + 1):
        layers = sorted({*range(n_layer - 1, -1, -width)})
        above = sum(n_layer - i for i in layers) / n_layer
        if suffixes * above <= _FORWARDS:
            break
    return layers


# -- heads and MLPs --------------------------------------------------------------------


def components(model: Model, asked: Prompted, spans: Sequence[Span], *, k: int) -> Components | str:
    """The heads and MLPs that write most of the answer's first token, by direct logit attribution,
    what the answer loses without each, and what these heads look at.

    Returns them, or why there are none.
    """
    try:
        shares = attribute_logit(model, asked.tokens, asked.answer[0])
    except (ModelError, SiteError) as err:
        return str(err)
    heads = top_heads(shares.heads, k, by_size=True)
    order = np.argsort(-np.abs(shares.mlp), kind="stable")[:k]
    mlps = [int(i) for i in order]
    drops, floor = _ablated(model, asked, heads, mlps)
    reads = _reads(model, asked, heads, spans)
    listed = [
        Component("head", h.layer, h.head, float(shares.heads[h]), d, r)
        for h, d, r in zip(heads, drops, reads, strict=False)
    ]
    listed += [
        Component("mlp", i, None, float(shares.mlp[i]), d)
        for i, d in zip(mlps, drops[len(heads) :], strict=True)
    ]
    return Components(shares, listed, floor)


def _ablated(
    model: Model, asked: Prompted, heads: Sequence[Head], mlps: Sequence[int]
) -> tuple[list[float], float]:
    """What the answer's log-probability loses without each head and MLP, where the answer is read."""
    metric = AnswerLogProb(asked.answer)
    positions = list(range(len(asked.tokens) - 1, len(asked.whole)))

    def measured(edits: Sequence[Edit]) -> Request:
        return Request(asked.whole, edits, logits=positions, metric=metric)

    changes = [head_edits(model, [h], tokens=positions) for h in heads]
    changes += [[Edit(Site("mlp_out", i), "zero", tokens=positions)] for i in mlps]
    blocks = [*(h.layer for h in heads), *mlps]
    nulls = [
        [Edit(Site("resid_pre", i), nudge(seed), tokens=positions)]
        for seed, i in enumerate(sorted(blocks)[:: max(len(blocks) // _NULL, 1)])
    ]
    with step("ablating") as bar:
        requests = [measured(e) for e in ([], *changes, *nulls)]
        clean, *values = [float(r.value) for r in model.run(requests, progress=bar)]
    floor = max(abs(v - clean) for v in values[len(changes) :])
    return [clean - v for v in values[: len(changes)]], floor


def _reads(
    model: Model, asked: Prompted, heads: Sequence[Head], spans: Sequence[Span]
) -> list[Reading | None]:
    """What each head looks at from the prompt's last token."""
    sites = [Site("attn_pattern", i) for i in sorted({h.layer for h in heads})]
    if any(s not in model.unfused_topology.sites for s in sites):
        return [None] * len(heads)
    capture = Capture(sites, len(asked.tokens) - 1)
    result = model.run([Request(asked.tokens, captures=[capture], logits=None)])[0]
    out: list[Reading | None] = []
    sinks = sorted(asked.sinks)
    for h in heads:
        weights = result.captures[Site("attn_pattern", h.layer)][0, h.head]  # (n_keys,)
        by_span = [float(weights[asked.without_sinks(s)].sum()) for s in spans]
        best = int(np.argmax(by_span))
        asking = [i for i in asked.asking if i not in asked.sinks]
        out.append(
            Reading(best, by_span[best], float(weights[asking].sum()), float(weights[sinks].sum()))
        )
    return out


# -- the lens --------------------------------------------------------------------------


def lens_at_end(model: Model, asked: Prompted) -> LensAtEnd | str:
    """The answer's first token in each layer's residual at the prompt's last token.

    Returns it, or why there is none.
    """
    layers = [i for i in range(model.n_layer) if Site("resid_post", i) in model.topology.sites]
    sites = [Site("resid_post", i) for i in layers]
    try:
        lens = model.lens
        capture = Capture(sites, len(asked.tokens) - 1)
        result = model.run([Request(asked.tokens, captures=[capture], logits=None)])[0]
    except (ModelError, SiteError) as err:
        return str(err)
    logits = lens.logits(np.concatenate([result.captures[s] for s in sites]))  # (n, n_vocab)
    first = asked.answer[0]
    best = logits.argmax(1)
    logprobs = log_softmax(logits)
    rows = range(len(layers))
    return LensAtEnd(
        layers=layers,
        prob=[float(np.exp(logprobs[i, first])) for i in rows],
        rank=[1 + int((logits[i] > logits[i, first]).sum()) for i in rows],
        top=model.token_rows(best),
        top_prob=[float(np.exp(logprobs[i, best[i]])) for i in rows],
    )
