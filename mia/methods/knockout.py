"""Attention knockout: what breaks when some queries may not attend to some keys.

Source: Geva et al. 2023 (arXiv 2304.14767), sec. 4.

| in the paper                  | here                                                     |
|-------------------------------|----------------------------------------------------------|
| M[r, c] = -inf, row r col c   | `Block`: query r may not attend to key c; `block_edits`  |

Deviation: Geva et al. block windows of layers for whole spans, here any queries, keys, layers and
heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mia.edits import Edit
from mia.engine.patterns import HiddenKeys
from mia.errors import UsageError
from mia.ranges import (
    Head,
    by_layer,
    every_head,
    names_heads,
    parse_heads,
    parse_layers,
    parse_tokens,
)
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model


@dataclass(frozen=True)
class Block:
    """Queries that may not attend to keys: positions of the prompt.

    Attributes:
        generated: generated tokens may not attend to these keys either.
        heads: in these heads; None for all of the model.
    """

    queries: list[int]
    keys: list[int]
    generated: bool = False
    heads: Sequence[Head] | None = None


def parse_block(text: str, n_tokens: int, n_layer: int, n_head: int) -> Block:
    """`5->0`, `3..7->0,1`, `-1->*@2..4` (layers) or `5->0@3.2,4.*` (heads).

    `5..->0` is query 5 and all that come after it, generated ones too.
    Raises `UsageError` or `RangeError` naming the valid range.
    """
    where = f"block {text!r}"
    m = re.fullmatch(r"\s*([^>@]+?)\s*->\s*([^>@]+?)\s*(?:@\s*(.+))?", text)
    if m is None:
        raise UsageError(f"{where} is not QUERIES->KEYS, like 5->0 or 3..7->0,1@2..4")
    open_end = m[1].endswith("..") or m[1] in ("*", "all")
    queries = parse_tokens(m[1], n_tokens, f"{where}: queries")
    keys = parse_tokens(m[2], n_tokens, f"{where}: keys")
    if not open_end and not any(k <= q for q in queries for k in keys):
        raise UsageError(
            f"{where}: no query sees these keys; a token can attend only to itself and earlier tokens"
        )
    return Block(
        queries, keys, open_end, None if m[3] is None else _heads(m[3], n_layer, n_head, where)
    )


def _heads(text: str, n_layer: int, n_head: int, where: str) -> list[Head]:
    """Heads, or all heads of layers."""
    if names_heads(text):
        return parse_heads(text, n_layer, n_head, f"{where}: heads")
    layers = parse_layers(text, n_layer, f"{where}: layers")
    return [Head(i, h) for i in layers for h in range(n_head)]


def block_edits(model: Model, block: Block) -> list[Edit]:
    """Edits of the scores before the softmax, so that the remaining weights still sum to 1.

    Raises `UsageError` while running if all keys of a query are blocked.
    """
    heads = every_head(model.n_layer, model.n_head) if block.heads is None else block.heads
    blocked = np.asarray(block.keys, np.intp)
    functions: dict[int, HiddenKeys] = {}  # one for several layers: their cells are the same
    return [
        Edit(
            Site("attn_scores", layer),
            functions.setdefault(len(chosen), HiddenKeys(lambda query: blocked, len(chosen))),
            tokens=block.queries,
            generated=block.generated,
            heads=chosen,
        )
        for layer, chosen in by_layer(heads).items()
    ]
