"""Two questions about a prompt that decide what is measured: does its first token count, and is
the answer the token that would follow?

Sources: attention sinks, Xiao et al. 2023 (arXiv 2309.17453); their large activations, Sun et al.
2024 (2402.17762).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import norms
from mia.errors import SiteError
from mia.notices import notice
from mia.request import Request

if TYPE_CHECKING:
    from mia.model import Model

_TEXT = "The river runs down to the sea."
#: a sink's residual is some hundred times as long as the others'
SINK = 10.0
#: how many times likelier another spelling must be, and how likely
_MUCH, _LIKELY = 10.0, 0.01


def first_token_is_sink(model: Model) -> bool:
    """Whether the model makes an attention sink of the first token of a text without a BOS: in
    some layer its residual is 10 times as long as the median of the others."""
    return first_over_others(model) > SINK


def first_over_others(model: Model) -> float:
    """The length of the first token's residual, in medians of the others', without a BOS: the
    largest of all layers. Runs 8 tokens. 0 for a model without `resid_post`."""
    ids = model.tokenize(_TEXT, bos=False)[: min(8, model.n_ctx)]
    if len(ids) < 3:
        return 0.0
    try:
        rows = model.look(ids, "resid_post").stack()
    except SiteError:
        return 0.0
    lengths = norms(rows)  # (n_layer, n_tokens)
    return float((lengths[:, 0] / np.maximum(np.median(lengths[:, 1:], axis=1), 1e-30)).max())


def check_answer(model: Model, tokens: Sequence[int], answer: str) -> None:
    """A notice where an answer with a space in front, or without the one that it has, would be 10
    times likelier after the prompt, at least 1 %: as typed it is another token than the one that
    the model writes.

    Args:
        tokens: the prompt's token ids.
    """
    other = answer[1:] if answer.startswith(" ") else f" {answer}"
    before = model.piece(tokens[-1])
    ids, others = (model.continuation(before, text) for text in (answer, other))
    if not ids or not others or ids[0] == others[0] or not other.strip():
        return
    logits = model.run([Request(tokens)])[0].logits
    assert logits is not None
    logits = logits[-1].astype(np.float64)
    chance = np.exp(logits - np.logaddexp.reduce(logits))
    if chance[others[0]] > max(_LIKELY, _MUCH * chance[ids[0]]):
        notice(
            f"the token {model.piece(ids[0])!r} is measured, which has probability "
            f"{chance[ids[0]]:.2g}; {model.piece(others[0])!r} has {chance[others[0]]:.2g}: "
            f"is the answer {other!r}?"
        )
