"""Attention maps: what each head of each layer attends to.

Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; the per-head reading is Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits". Weighting by the norm of
the value is Kobayashi et al. 2020 (arXiv 2004.10102), "Attention is Not Only a Weight".

| in the papers                | here                                                     |
|------------------------------|----------------------------------------------------------|
| A^h, softmax(QK^T/sqrt(d))   | `AttentionMaps.weights[layer, h]`, (n_query, n_key)      |
| query i, key j               | positions in the prompt; j > i is 0                      |
| v_j^h                        | `v`, (n_head_kv, head_dim) per token                     |
| alpha_ij ||f(x_j)||          | `value_weighted`: A_ij^h times the norm of v_j^h         |

Deviation: Kobayashi et al. take the norm after W_O, of what a head would write. Here it is the
norm of the value itself, before W_O (`attribution` has what heads write).

With grouped queries, head h reads key and value head h // (n_head / n_head_kv).

Flash attention makes no patterns: a run that reads them has it off, other runs have it on where
the type of the cache allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mia.arrays import Array, norms
from mia.edits import Edit, resolve_tokens
from mia.errors import UsageError
from mia.ranges import Head, Heads, Ranges, parse_heads, parse_layers
from mia.request import Capture, Request, Result, one_or_more
from mia.show.report import Report
from mia.show.text import rounded, visible
from mia.sites import Site

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.model import Model
    from mia.show.again import Again

#: more maps than this are not shown or drawn one by one
_LARGE = 12


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The attention of some layers over one prompt.

    Attributes:
        tokens: the prompt's token ids.
        layers: those of the maps, in order.
        weights: (len(layers), n_head, n_query, n_key); a query's weights sum to 1, keys are
            by position. With `value_weighted` each weight is multiplied by the norm of the value
            that it moves, and rows no longer sum to 1.
    """

    tokens: list[int]
    layers: list[int]
    weights: Array
    value_weighted: bool = False

    def __getitem__(self, head: tuple[int, int]) -> Array:
        """The map of one head, `maps[layer, head]`: (n_query, n_key)."""
        layer, h = head
        if layer not in self.layers or not 0 <= h < self.weights.shape[1]:
            raise UsageError(
                f"there is no map of layer {layer}, head {h}; layers {', '.join(map(str, self.layers))}, "
                f"heads 0 to {self.weights.shape[1] - 1}"
            )
        return self.weights[self.layers.index(layer), h]


def attention_maps(
    model: Model,
    tokens: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    edits: Edit | Sequence[Edit] = (),
    value_weighted: bool = False,
) -> AttentionMaps:
    """Runs a prompt and reads the attention of every head.

    Args:
        tokens: the prompt's token ids.
        layers: all by default.
        edits: changes while it runs.
        value_weighted: multiply each weight by the norm of the value that it moves.
    """
    request = maps_request(model, tokens, layers=layers, edits=edits, values=value_weighted)
    result = model.run([request])[0]
    return maps_of(model, request, result, value_weighted=value_weighted)


def maps_request(
    model: Model,
    tokens: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    edits: Edit | Sequence[Edit] = (),
    values: bool = False,
    queries: Sequence[int] | None = None,
) -> Request:
    """The request behind `attention_maps`, to be run together with others. `queries`: those whose
    patterns are read (not with `values`); all by default."""
    names = ("attn_pattern", "v") if values else ("attn_pattern",)
    numbers = range(model.n_layer) if layers is None else layers
    sites = [Site(name, i) for i in numbers for name in names]
    capture = Capture(sites, queries)
    return Request(list(tokens), one_or_more(edits, Edit), [capture], logits=None)


def maps_of(
    model: Model, request: Request, result: Result, *, value_weighted: bool = False
) -> AttentionMaps:
    """The maps in the result of a `maps_request`."""
    layers = [s.layer for s in result.captures if s.name == "attn_pattern" and s.layer is not None]
    # captured as (n_query, n_head, n_key)
    weights = np.stack([result.captures[Site("attn_pattern", i)] for i in layers]).swapaxes(1, 2)
    if value_weighted:
        lengths = [
            value_norms(result.captures[Site("v", i)], model.n_head_kv, model.n_head)
            for i in layers
        ]
        weights = weights * np.stack(lengths)[:, :, None, :]
    tokens = [int(t) for t in request.tokens]
    return AttentionMaps(tokens, layers, np.ascontiguousarray(weights), value_weighted)


def value_norms(v: Array, n_head_kv: int, n_head: int) -> Array:
    """||v_j^h|| for each head h and key j: (n_head, n_key), from rows (n_key, n_head_kv × head_dim)."""
    lengths = norms(v.reshape(len(v), n_head_kv, -1)).T  # (n_head_kv, n_key)
    return np.repeat(lengths, n_head // n_head_kv, axis=0).astype(np.float32)


# -- the experiment --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Attention(Report):
    """The attention of heads over one prompt; `report[layer, head]` is a map (n_query, n_key).

    Attributes:
        maps: of all heads of the layers.
        heads: the columns of the smallest grid that has the chosen heads.
        chosen: the heads that were asked for; None for all of the layers.
        query: the token whose `k` strongest keys the text lists.
        tokenizer_sha256: for the metadata of a file.
    """

    own_endings: ClassVar[tuple[str, ...]] = (".safetensors",)

    facts: ModelFacts
    tokens: Sequence[Token]
    maps: AttentionMaps
    heads: list[int]
    chosen: list[Head] | None
    query: int
    k: int
    tokenizer_sha256: str

    @property
    def layers(self) -> list[int]:
        return self.maps.layers

    @property
    def weights(self) -> Array:
        """(len(layers), len(heads), n_query, n_key)."""
        return self.maps.weights[:, self.heads]

    def __getitem__(self, head: tuple[int, int]) -> Array:
        return self.maps[head]

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "value_weighted": self.maps.value_weighted,
            "layers": self.layers,
            "heads": self.heads,
            "weights": rounded(self.weights),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record for each head, query and key that the query sees."""
        return [
            {"layer": i, "head": h, "query": q, "key": k, "weight": weight}
            for i, h in self._listed()
            for q, row in enumerate(self.maps[i, h].tolist())
            for k, weight in enumerate(row[: q + 1])
        ]

    def plain(self) -> str:
        """The strongest keys of one query, a line for each head."""
        lines = [f"query {self.query}: {visible(self.tokens[self.query].label)}"]
        for head in self._listed():
            row = self.maps[head][self.query]
            strongest = [key for key in row.argsort()[::-1][: self.k] if row[key] > 0]
            keys = (f"{key}:{visible(self.tokens[key].label)} {row[key]:.2f}" for key in strongest)
            lines.append(f"{head}: {'|'.join(keys)}")
        return "\n".join(lines)

    def table(self, width: int) -> RenderableType:
        """The whole maps of up to a dozen chosen heads; of more the strongest keys."""
        from rich.console import Group
        from rich.text import Text

        from mia.show import grid

        if self.chosen is None or len(self.chosen) > _LARGE:
            return super().table(width)
        if not grid.map_fits(len(self.tokens), width):
            wide = f"a map of {len(self.tokens)} tokens is wider than this terminal; a picture shows it"
            return Group(Text(wide, style="dim"), super().table(width))
        parts = []
        for head in self.chosen:
            a = self.maps[head]
            title = f"layer {head.layer} · head {head.head} (most: {a.max():.3g})"
            parts += [Text(title, style="bold"), grid.attention_map(a, self._pieces())]
        return Group(*parts)

    def plot(self, path: str | Path) -> None:
        """Draws all maps, layers down, heads across; up to a dozen chosen heads large. An .html
        is a page to hover and click."""
        from mia.show import plots
        from mia.show.html import write_page

        if Path(path).suffix.lower() == ".html":
            write_page(path, self.page())
            return
        title, bar = self._title()
        if self.chosen is not None and len(self.chosen) <= _LARGE:
            names = [f"layer {i} · head {h}" for i, h in self.chosen]
            maps = np.stack([self.maps[head] for head in self.chosen])
            fig = plots.large_maps(maps, names=names, pieces=self._pieces(), title=title, bar=bar)
            plots.save(fig, path)
        else:
            grid = plots.attention_grid(
                self.weights,
                layers=self.layers,
                heads=self.heads,
                pieces=self._pieces(),
                title=title,
                bar=bar,
            )
            plots.save(grid, path)

    def save(self, path: str | Path) -> None:
        """Writes safetensors, one tensor (n_layer, n_head, n_query, n_key) `attention` or
        `value_weighted`; for other endings as every report. Raises `FileError`."""
        if Path(path).suffix.lower() not in self.own_endings:
            super().save(path)
            return
        from mia.io.activations import Activations
        from mia.io.provenance import as_strings

        arguments = {"tokens": self.maps.tokens, "layers": self.layers, "heads": self.heads}
        metadata = {
            **self.facts.metadata(),
            "tokenizer_sha256": self.tokenizer_sha256,
            **as_strings(arguments),
        }
        name = "value_weighted" if self.maps.value_weighted else "attention"
        Activations({name: self.weights}, metadata).save(path)

    def page(self, run: Mapping[str, Any] | None = None, again: Again | None = None) -> str:
        """All maps on a page of their own, to hover and click."""
        from mia.show.html import attention_page

        title, bar = self._title()
        pieces = [visible(p) for p in self._pieces()]
        return attention_page(
            self.weights,
            layers=self.layers,
            heads=self.heads,
            pieces=pieces,
            title=title,
            about="".join(pieces) + (f"\n{again.line()}" if again else ""),
            bar=bar,
        )

    def _title(self) -> tuple[str, str]:
        """Of a picture, and what its colours are."""
        title = f"{self.facts.name} · attention over {len(self.tokens)} tokens"
        return (
            title,
            "weight × norm of the value" if self.maps.value_weighted else "attention weight",
        )

    def _listed(self) -> list[Head]:
        if self.chosen is not None:
            return self.chosen
        return [Head(i, h) for i in self.layers for h in self.heads]

    def _pieces(self) -> list[str]:
        return [t.label for t in self.tokens]


def attention(
    model: Model,
    prompt: str | Sequence[int],
    *,
    layers: Ranges | None = None,
    heads: Heads | None = None,
    token: int = -1,
    k: int = 5,
    value_weighted: bool = False,
    edits: Edit | Sequence[Edit] = (),
) -> Attention:
    """Runs a prompt and reads what heads attend to.

    Args:
        prompt: a text or token ids.
        layers, heads: only these (`mia.ranges`); all by default.
        token: the query whose strongest keys the text lists.
        k: how many keys.
        value_weighted: multiply each weight by the norm of the value that it moves.
        edits: changes while it runs.

    Raises:
        UsageError: no head is left.
        RangeError: no such layer, head or token.
    """
    ids = model.ids(prompt)
    (query,) = resolve_tokens(token, len(ids))
    numbers = sorted(parse_layers("*" if layers is None else layers, model.n_layer))
    columns, chosen = list(range(model.n_head)), None
    if heads is not None:
        chosen = [h for h in parse_heads(heads, model.n_layer, model.n_head) if h.layer in numbers]
        if not chosen:
            raise UsageError(f"no head of {heads} is in layers {layers}")
        numbers = sorted({h.layer for h in chosen})
        columns = sorted({h.head for h in chosen})
    maps = attention_maps(model, ids, layers=numbers, edits=edits, value_weighted=value_weighted)
    return Attention(
        facts=model.facts,
        tokens=model.token_rows(ids),
        maps=maps,
        heads=columns,
        chosen=chosen,
        query=query,
        k=k,
        tokenizer_sha256=model.tokenizer_hash,
    )
