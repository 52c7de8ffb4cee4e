"""Perplexity against the layer of an injection: Turner et al. 2023 (arXiv 2308.10248, section 4).

The paper's graph ("weddings") is `sweep`: the ratio of the steered to the plain perplexity of
each text, against the layer of the injection. Where we deviate: the paper scores documents by
the mean over sentences of GPT-2's log-probabilities with a BOS; here a text starts with a BOS if
the model asks for one or `bos` is true, and ratios are geometric means over texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array
from mia.datasets.shipped import read_lines
from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.estimates import Estimate, bootstrap_interval, format_estimate
from mia.measure.losses import TokenLoss
from mia.methods.actadd import Addition, difference, front_edit
from mia.notices import notice
from mia.progress import Progress, step
from mia.ranges import Ranges, parse_layers
from mia.request import Request
from mia.show.report import Report
from mia.show.text import visible
from mia.vectors import Vector
from mia.vectors.expression import named

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model

#: (layer, n_tokens) -> the edits of a text of this length
LayerEdits = Callable[[int, int], Sequence[Edit]]


@dataclass(frozen=True, slots=True)
class LayerSweep:
    """Ratio of steered to plain perplexity, by injection layer.

    Attributes:
        layers: (n_layers,) list.
        log_ratio: (n_layers, n_texts) natural log of the ratio of each text.
        skipped: texts left out, having less than two tokens.
    """

    layers: list[int]
    log_ratio: Array
    skipped: int = 0

    @property
    def n_texts(self) -> int:
        return int(self.log_ratio.shape[1])

    @property
    def ratio(self) -> Array:
        """(n_layers,) geometric mean over texts."""
        return np.exp(self.log_ratio.mean(1))

    def estimates(self, rng: np.random.Generator) -> list[Estimate]:
        """`ratio` with its 95 % interval, for each layer."""
        return [
            Estimate(float(ratio), float(low), float(high), self.n_texts)
            for ratio, (low, high) in zip(self.ratio, self.interval(rng), strict=True)
        ]

    def interval(self, rng: np.random.Generator, n: int = 1000) -> Array:
        """(n_layers, 2) 95 % interval of the mean, by bootstrap over texts."""
        return np.exp(bootstrap_interval(self.log_ratio, rng, n=n).T).astype(np.float32)


def by_layer(
    model: Model,
    texts: Sequence[Sequence[int]],
    edits: LayerEdits,
    layers: Sequence[int],
    *,
    progress: Progress | None = None,
) -> LayerSweep:
    """How steering at each layer changes the perplexity of each text, in one call of the model.

    Args:
        edits: (layer, n_tokens) -> the edits of a text of this length.

    Raises:
        UsageError: no text has two tokens, or one is longer than the context.
    """
    for i, tokens in enumerate(texts):
        if len(tokens) > model.n_ctx:
            raise UsageError(f"text {i} has {len(tokens)} tokens; the context holds {model.n_ctx}")
    scored = [t for t in texts if len(t) > 1]
    if not scored:
        raise UsageError("no text has two tokens to score")
    requests, places = [], []
    for i, layer in enumerate([None, *layers]):
        for j, tokens in enumerate(scored):
            changes = () if layer is None else edits(layer, len(tokens))
            targets = np.asarray(tokens[1:])
            requests.append(
                Request(
                    tokens, changes, logits=slice(0, len(tokens) - 1), metric=TokenLoss(targets)
                )
            )
            places.append((i, j))
    nll = np.empty((len(layers) + 1, len(scored)))
    for (i, j), r in zip(places, model.run(requests, progress=progress), strict=True):
        nll[i, j] = r.value.mean()
    return LayerSweep(list(layers), (nll[1:] - nll[0]).astype(np.float32), len(texts) - len(scored))


# -- the experiment ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SweptTexts:
    """One group of texts: their ratio at each layer.

    Attributes:
        ratio: of steered to plain perplexity, the geometric mean over texts, for each layer.
        n_skipped: texts left out, having less than two tokens.
    """

    ratio: list[Estimate]
    n_texts: int
    n_skipped: int

    def document(self) -> dict[str, Any]:
        return {
            "ratio": [e.document() for e in self.ratio],
            "n_texts": self.n_texts,
            "n_skipped": self.n_skipped,
        }


@dataclass(frozen=True, eq=False)
class PerplexitySweep(Report):
    """Ratio of steered to plain perplexity, by injection layer, for groups of texts.

    Attributes:
        about: what was injected, as the document has it.
    """

    facts: ModelFacts
    seed: int
    about: dict[str, Any]
    layers: list[int]
    texts: dict[str, SweptTexts]

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "seed": self.seed,
            **self.about,
            "layers": self.layers,
            "sweep": {name: group.document() for name, group in self.texts.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"texts": name, "layer": layer, **ratio.document()}
            for name, group in self.texts.items()
            for layer, ratio in zip(self.layers, group.ratio, strict=True)
        ]

    def plain(self) -> str:
        titles = "  ".join(f"{visible(name) + ' ratio [95 %]':<26s}" for name in self.texts)
        lines = [f"layer  {titles}"]
        for i, layer in enumerate(self.layers):
            cells = [format_estimate(g.ratio[i].document()) for g in self.texts.values()]
            lines.append(f"{layer:5d}  " + "  ".join(f"{c:<26s}" for c in cells))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        from mia.show import plots

        figure = plots.curves(
            self.layers,
            {k: [e.value for e in g.ratio] for k, g in self.texts.items()},
            intervals={
                k: ([e.low for e in g.ratio], [e.high for e in g.ratio])
                for k, g in self.texts.items()
            },
            x_label="injection layer",
            y_label="perplexity, steered / plain",
        )
        plots.save(figure, path)


def sweep(
    model: Model,
    texts: Mapping[str, str | Path],
    injection: Vector | str | Addition,
    *,
    coeff: float = 1.0,
    layers: Ranges | None = None,
    bos: bool | None = None,
    seed: int = 0,
) -> PerplexitySweep:
    """Ratio of steered to plain perplexity of texts, by injection layer.

    Args:
        texts: name of a group -> a file with one text per line, or a shipped one.
        injection: a vector (a value, a file or arithmetic), or the two texts of an activation
            addition, whose own layer and coefficient do not matter.
        coeff: how much of it.
        layers: which (`mia.ranges`); by default all that there are.
        seed: of the intervals, by bootstrap over texts.

    Raises:
        UsageError: no texts, a text longer than the context, or a vector that does not fit.
    """
    if not texts:
        raise UsageError("there are no texts to sweep over")
    lines = {name: read_lines(source) for name, source in texts.items()}
    if isinstance(injection, Addition):
        edits, chosen, about = _addition(model, injection, coeff, layers, bos)
    else:
        edits, chosen, about = _vector(model, injection, coeff, layers)
    rng = np.random.default_rng(seed)
    groups = {}
    for name, source in texts.items():
        tokens = _tokenized(model, lines[name], bos, str(source))
        with step(name) as bar:
            ratios = by_layer(model, tokens, edits, chosen, progress=bar)
        if ratios.skipped:
            notice(
                f"{source}: {ratios.skipped} of {len(tokens)} lines have no token to score and "
                "are left out"
            )
        groups[name] = SweptTexts(ratios.estimates(rng), ratios.n_texts, ratios.skipped)
    return PerplexitySweep(model.facts, seed, about, chosen, groups)


def _tokenized(
    model: Model, lines: Mapping[int, str], bos: bool | None, source: str
) -> list[list[int]]:
    """Tokens of each line. Raises `UsageError` naming a line that the context does not hold."""
    texts = []
    for n, line in lines.items():
        tokens = model.tokenize(line, bos=bos)
        if len(tokens) > model.n_ctx:
            raise UsageError(
                f"{source}, line {n}: {len(tokens)} tokens; the context holds {model.n_ctx}"
            )
        texts.append(tokens)
    return texts


def _addition(
    model: Model, addition: Addition, coeff: float, layers: Ranges | None, bos: bool | None
) -> tuple[LayerEdits, list[int], dict[str, Any]]:
    """The edits, the layers, and what a document says of both."""
    chosen = list(range(model.n_layer)) if layers is None else parse_layers(layers, model.n_layer)
    h = difference(model, addition, chosen, bos=bos)

    def front(layer: int, n: int) -> list[Edit]:
        # of a text shorter than the addition, only the first rows
        return [front_edit(h[layer][:n], coeff, layer, n)]

    return front, chosen, {"plus": addition.plus, "minus": addition.minus, "coeff": coeff}


def _vector(
    model: Model, vector: Vector | str, coeff: float, layers: Ranges | None
) -> tuple[LayerEdits, list[int], dict[str, Any]]:
    v, name = named(vector, model.facts)
    model.check_vector(v, name)
    chosen = v.layers_among(layers, model.n_layer, name)
    by_layer = {i: v.edits(coeff=coeff, layers=[i]) for i in chosen}
    about = {"steer": [{"vector": name, "site": v.site, "layers": chosen}], "coeff": coeff}
    return lambda layer, n: by_layer[layer], chosen, about
