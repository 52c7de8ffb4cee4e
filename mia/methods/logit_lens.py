"""Logit lens: what each layer would say next (nostalgebraist 2020).

The model's own final norm and unembedding, applied to a residual of any layer
(`mia.lenses.LogitLens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mia.edits import Edit
from mia.errors import UsageError
from mia.lenses.table import ColourBy, LensTable, check_colour_by, lens_rows
from mia.methods.patching import today
from mia.ranges import Ranges, parse_layers, parse_tokens
from mia.request import Capture, Request, one_or_more
from mia.sites import KINDS, LENS_READS, Site, parse_many, reads_as_attn_out, split_spelling

if TYPE_CHECKING:
    from mia.model import Model

#: the sites that "all" stands for
_ALL = ("embed", "attn_out", "resid_mid", "mlp_out", "resid_post")


def logit_lens(
    model: Model,
    prompt: str | Sequence[int],
    sites: str | Sequence[str] = "l_out",
    k: int = 5,
    *,
    layers: Ranges | None = None,
    tokens: Ranges = "*",
    edits: Edit | Sequence[Edit] = (),
    norm: bool = True,
    colour_by: ColourBy = "probability",
) -> LensTable:
    """Runs a prompt and reads sites through the lens.

    Args:
        prompt: a text or token ids.
        sites: sites that a lens reads, in any spelling, or "all".
        k: how many tokens of each row.
        layers, tokens: only these (`mia.ranges`).
        edits: changes while it runs.
        norm: False leaves out the division by the root mean square, as the first llama.cpp
            tools did.
        colour_by: what the colours of a picture say: the best token's "probability", or the
            "entropy" of all.

    Raises:
        UsageError: a site that a lens does not read, no site left, or an unknown colour.
    """
    check_colour_by(colour_by)
    ids = model.ids(prompt)
    labels = _labels(model, [sites] if isinstance(sites, str) else sites, layers)
    positions = parse_tokens(tokens, len(ids))
    captures = [Capture(list(labels), positions)]
    request = Request(ids, one_or_more(edits, Edit), captures, logits=None)
    result = model.run([request])[0]
    read = model.lens.read(np.concatenate([result.captures[s] for s in labels]), k, norm=norm)
    places = [(label, site, i) for site, label in labels.items() for i in positions]
    return LensTable(
        facts=model.facts,
        tokens=model.token_rows(ids),
        lens=lens_rows(read, places, model.described),
        n_tokens=len(positions),
        colour_by=colour_by,
    )


def _labels(model: Model, texts: Sequence[str], layers: Ranges | None) -> dict[Site, str]:
    """The sites in the order asked for, and what the report calls each."""
    allowed = None if layers is None else set(parse_layers(layers, model.n_layer))
    if allowed is not None and not any(_layered(text) for text in texts):
        raise UsageError(f"layers {layers}: {' '.join(texts)} has no layers")
    labels: dict[Site, str] = {}
    for text in texts:
        if text == "all":
            sites = [s for s in model.topology.sites if s.name in _ALL]
        else:
            sites = parse_many(today(text), model.n_layer)
        for s in sites:
            if not s.kind.lens:
                raise UsageError(f"a lens does not read {s}; it reads {', '.join(LENS_READS)}")
            if allowed is None or s.layer is None or s.layer in allowed:
                labels[s] = f"kqv_out-{s.layer}" if reads_as_attn_out(text) else s.llama
    if not labels:
        raise UsageError(f"no site of {' '.join(texts)} is in layers {layers}")
    return labels


def _layered(text: str) -> bool:
    return text == "all" or KINDS[split_spelling(text)[0]].layered
