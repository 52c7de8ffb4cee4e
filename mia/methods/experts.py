"""Routing: which experts of a mixture each token goes to.

Sources: Shazeer et al. 2017 (arXiv 1701.06538), eqs. 2 to 5; load and its entropy as in Fedus et
al. 2021 (arXiv 2101.03961) and Jiang et al. 2024 (arXiv 2401.04088), section 5.

| in the papers                | here                                                        |
|------------------------------|-------------------------------------------------------------|
| h(x), W_g x                  | `LayerRouting.logits`, the site `router`                    |
| p(x)                         | `LayerRouting.scores`: softmax or sigmoid, sums to 1        |
| top-k                        | `LayerRouting.experts`, the site `experts`                  |
| G(x)_i                       | `LayerRouting.weights`, the site `expert_weights`           |
| f_i, share of tokens of i    | `LayerRouting.load`; it sums to k                           |

Deviations: scores are those before a bias of the choice. Models with sigmoids have no distribution
over experts; their scores are divided by their sum to have one. Shared experts are not routed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, IntArray
from mia.edits import Edit
from mia.errors import UsageError
from mia.methods.expert_ablation import expert_counts
from mia.ranges import Ranges, compact, parse_layers, parse_tokens
from mia.request import Capture, Request, one_or_more
from mia.show.report import Report
from mia.show.text import rounded, visible
from mia.sites import Site

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.model import Model
    from mia.show.again import Again

#: what a report shows of the routing: the choice of each token, or the load of each expert
VIEWS = ("tokens", "load")
#: columns of a terminal that name a layer
_LAYER = 6


@dataclass(frozen=True, eq=False)
class LayerRouting:
    """One layer's routing of n tokens.

    Attributes:
        logits: (n, n_expert), of the router; -inf for experts that an edit took out of the choice.
        scores: (n, n_expert), what the gate makes of them, each row divided by its sum.
        experts: (n, n_expert_used), those chosen, the best first.
        weights: (n, n_expert), what each expert's output is multiplied by; 0 if not chosen.
    """

    layer: int
    logits: Array
    scores: Array
    experts: IntArray
    weights: Array

    @property
    def n_expert(self) -> int:
        return self.logits.shape[1]

    @property
    def load(self) -> Array:
        """(n_expert,): the share of tokens that chose each expert."""
        counts = np.bincount(self.experts.ravel(), minlength=self.n_expert)
        return np.asarray(counts / len(self.experts), np.float32)

    @property
    def entropy(self) -> float:
        """Of a token's scores, the mean over tokens, in nats: 0 if one expert has it all."""
        return float(_entropy(self.scores).mean())

    @property
    def load_entropy(self) -> float:
        """Of the load over experts, in nats: `log(n_expert)` if all are used alike."""
        return float(_entropy(self.load / self.load.sum()))

    def chosen(self, row: int) -> list[tuple[int, float]]:
        """(expert, weight) of one token, the best first."""
        return [(e, float(self.weights[row, e])) for e in self.experts[row].tolist()]


def _entropy(p: Array) -> Array:
    """Of each row, in nats."""
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(-(p * logs).sum(-1), np.float32)


@dataclass(frozen=True, eq=False)
class Routing(Report):
    """The routing of a prompt; `report[layer]` is one layer's.

    Attributes:
        layers: a `LayerRouting` for each layer with experts.
        positions: the tokens that they are of.
        k: how many experts of the load the text lists.
        view: what a picture and a terminal show, of `VIEWS`.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    layers: list[LayerRouting]
    positions: list[int]
    k: int
    view: str

    def __getitem__(self, layer: int) -> LayerRouting:
        for routing in self.layers:
            if routing.layer == layer:
                return routing
        have = ", ".join(str(r.layer) for r in self.layers)
        raise UsageError(f"there is no routing of layer {layer}; there is of {have}")

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "positions": self.positions,
            "layers": [
                {
                    "layer": r.layer,
                    "experts": r.experts.tolist(),
                    "weights": rounded(r.weights),
                    "logits": rounded(r.logits),
                    "load": rounded(r.load),
                    "entropy": rounded(r.entropy),
                    "load_entropy": rounded(r.load_entropy),
                }
                for r in self.layers
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record for each layer, token and chosen expert."""
        return [
            {
                "layer": r.layer,
                "token_index": p,
                "text": self.tokens[p].text,
                "rank": rank,
                "expert": e,
                "weight": w,
            }
            for r in self.layers
            for row, p in enumerate(self.positions)
            for rank, (e, w) in enumerate(r.chosen(row), 1)
        ]

    def plain(self) -> str:
        """For each layer its load, then a line for each token."""
        lines = []
        for r in self.layers:
            lines.append(f"Layer {r.layer}: {self._summary(r)}")
            for row, p in enumerate(self.positions):
                cells = "|".join(f"{e} {w:.2f}" for e, w in r.chosen(row))
                lines.append(f"{p}: {visible(self.tokens[p].text)}: {cells}")
        return "\n".join(lines)

    def _summary(self, r: LayerRouting) -> str:
        busiest = np.argsort(-r.load, kind="stable")[: self.k].tolist()
        load = "|".join(f"{e} {r.load[e]:.2f}" for e in busiest if r.load[e] > 0)
        return (
            f"{r.n_expert} experts, entropy {r.entropy:.2f}, load {load}, "
            f"its entropy {r.load_entropy:.2f} of {np.log(r.n_expert):.2f}"
        )

    def table(self, width: int) -> RenderableType:
        """Layers down; across the tokens with the experts they chose, coloured by the share of
        the first, or the experts with their load."""
        from mia.show import grid

        if self.view == "load":
            load = self._loads()
            if grid.cells_fit(load.shape[1], width):
                return grid.grid(
                    load, "load", width, names=[r.layer for r in self.layers], across="experts"
                )
            return super().table(width)
        texts, shares = self._choices()
        cell = max(len(text) for row in texts for text in row) + 1
        if _LAYER + cell * len(self.positions) > width:
            return super().table(width)
        return grid.words(
            texts,
            shares,
            title=f"{_TITLES['tokens']} (layers down, tokens across)",
            rows=[str(r.layer) for r in self.layers],
            columns=self._pieces(),
        )

    def plot(self, path: str | Path) -> None:
        """Draws what `view` says; an .html is a page with both and the numbers."""
        from mia.show import plots
        from mia.show.html import write_page

        if Path(path).suffix.lower() == ".html":
            write_page(path, self.page())
        elif self.view == "load":
            figure = plots.heatmap(
                self._loads(),
                title=f"{self.facts.name} · {_TITLES['load']}",
                x="expert",
                y="layer",
                y_labels=[str(r.layer) for r in self.layers],
                bar="share of tokens",
            )
            plots.save(figure, path)
        else:
            from mia.show.token_grid import token_grid

            texts, shares = self._choices()
            figure = token_grid(
                texts,
                shares,
                title=f"{self.facts.name} · {_TITLES['tokens']}",
                x_labels=[self.tokens[p].text for p in self.positions],
                y_labels=[f"layer {r.layer}" for r in self.layers],
                bar="weight of the first",
            )
            plots.save(figure, path)

    def page(self, run: Mapping[str, Any] | None = None, again: Again | None = None) -> str:
        """Both views, and the numbers."""
        from dataclasses import replace

        from mia.show.html import terminal_page

        wide = 100_000  # a page scrolls
        parts = [replace(self, view=view).table(wide) for view in VIEWS]
        line = [again.line()] if again else []
        return terminal_page([*parts, self.plain(), *line], title=f"{self.facts.name} · routing")

    def _choices(self) -> tuple[list[list[str]], Array]:
        """The chosen experts as text, and the first one's weight as a share of all weights of its
        token: both (n_layer, n)."""
        texts = [[",".join(map(str, row)) for row in r.experts.tolist()] for r in self.layers]
        shares = []
        for r in self.layers:
            first = np.take_along_axis(r.weights, r.experts[:, :1], 1)[:, 0]  # (n,)
            total = r.weights.sum(1)
            shares.append(np.divide(first, total, out=np.zeros_like(first), where=total > 0))
        return texts, np.stack(shares)

    def _loads(self) -> Array:
        """(n_layer, most experts of a layer); NaN for experts that a layer has not."""
        out = np.full((len(self.layers), max(r.n_expert for r in self.layers)), np.nan)
        for i, r in enumerate(self.layers):
            out[i, : r.n_expert] = r.load
        return out

    def _pieces(self) -> list[str]:
        return [visible(self.tokens[p].text) for p in self.positions]


_TITLES = {
    "tokens": "experts that each token chose, the best first",
    "load": "load: share of tokens that chose each expert",
}


def experts(
    model: Model,
    prompt: str | Sequence[int],
    *,
    layers: Ranges | None = None,
    tokens: Ranges = "*",
    k: int = 5,
    view: str = "tokens",
    edits: Edit | Sequence[Edit] = (),
) -> Routing:
    """Runs a prompt and reads which experts its tokens go to.

    Args:
        prompt: a text or token ids.
        layers, tokens: only these (`mia.ranges`); all by default.
        k: how many experts of the load the text lists.
        view: what a picture and a terminal show, "tokens" or "load".
        edits: changes while it runs.

    Raises:
        SiteError: the model has no experts.
        RangeError: no such layer or token.
        UsageError: none of the layers has experts.
    """
    if view not in VIEWS:
        raise UsageError(f"unknown view {view!r}; known: {', '.join(VIEWS)}")
    counts = expert_counts(model)
    numbers = sorted(counts)
    if layers is not None:
        wanted = parse_layers(layers, model.n_layer)
        numbers = [i for i in numbers if i in wanted]
        if not numbers:
            raise UsageError(
                f"no layer of {layers} has experts; layers {compact(sorted(counts))} have"
            )
    ids = model.ids(prompt)
    positions = list(dict.fromkeys(parse_tokens(tokens, len(ids))))
    names = ("router", "experts", "expert_weights")
    capture = Capture([Site(name, i) for i in numbers for name in names], positions)
    result = model.run([Request(ids, one_or_more(edits, Edit), [capture], logits=None)])[0]
    routed = []
    for i in numbers:
        logits, chosen, weights = (result.captures[Site(name, i)] for name in names)
        scores = _scores(logits, model.topology.gate(i))
        routed.append(LayerRouting(i, logits, scores, chosen.astype(np.intp), weights))
    return Routing(model.facts, model.token_rows(ids), routed, positions, k, view)


def _scores(logits: Array, gate: str) -> Array:
    """What a gate makes of logits (n, n_expert), each row divided by its sum."""
    z = logits.astype(np.float64)
    if gate == "sigmoid":
        scores = 0.5 + 0.5 * np.tanh(z / 2)
    elif gate == "sqrt_softplus":
        scores = np.sqrt(np.logaddexp(0, z))
    else:
        scores = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(scores / scores.sum(1, keepdims=True), np.float32)
