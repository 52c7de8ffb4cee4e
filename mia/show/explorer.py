"""The page of `explore`: one file, the numbers in it as JSON, arrays of them as base64.

The page is `data/explore.html` with the style of every page (`data/page.html`), and with
`data/explorer.css` and `data/explorer.js`, which it shares with the page of `mia serve`
(`data/live.html`, `data/live.js`). The data are in a script element that no browser runs; the one
that is run is named by its hash in the page's policy. The shape of the data is what `embedded` in
`explorer.js` reads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.show.markup import colour_rules, text
from mia.show.text import safe, visible

if TYPE_CHECKING:
    from mia.methods.attention import AttentionMaps
    from mia.methods.attribution import Attribution
    from mia.methods.explore_reports import Explored


def explorer_page(e: Explored, title: str | None = None) -> str:
    """The page as text. `title`: of its window; the model's name by default."""
    # inside a script element "<" could end it
    data = json.dumps(explorer_data(e), ensure_ascii=True, separators=(",", ":"))
    before, after = _template("explore").split("<!--DATA-->")
    before = before.replace("<!--TITLE-->", text(title or f"{e.facts.name} · explore"), 1)
    return before + data.replace("<", "\\u003c") + after


def explorer_data(e: Explored) -> dict[str, Any]:
    """What the page reads: see `embedded` in `data/explorer.js`."""
    return {"version": 2, "views": [_view(view) for view in e.views]}


def _view(e: Explored) -> dict[str, Any]:
    return {
        "label": e.label,
        "changes": safe(e.said.text),
        "options": e.said.options,
        "python": e.said.python,
        "model": {
            "name": visible(e.facts.name),
            "architecture": visible(e.facts.architecture),
            "n_layer": e.facts.n_layer,
            "n_head": e.facts.n_head,
        },
        "tokens": [[t.id, visible(t.label), t.text] for t in e.tokens],
        "n_prompt": e.n_prompt,
        "pieces": pieces(e.pieces),
        "alternatives": {
            "ids": packed(e.alternatives.ids, "<u4"),
            "logprobs": packed(e.alternatives.logprobs, "<f4"),
            "own": packed(e.alternatives.own, "<f4"),
            "ranks": packed(e.alternatives.ranks, "<u4"),
        },
        "lens": _lens(e),
        "attention": None if e.attention is None else _triangles(e.attention),
        "attribution": None if e.attribution is None else _shares(e.attribution),
        "blocking": None
        if e.blocking is None
        else {
            "drop": packed(e.blocking.drop, "<f4"),
            "floor": packed(e.blocking.floor, "<f4"),
        },
        "branches": [[b.at, b.token, b.tokens, _short(b.logprobs)] for b in e.branches],
        "missing": {part: safe(why) for part, why in e.missing.items()},
        "words": {
            "model": e.words.model,
            "as_type": e.words.as_type,
            "bos": e.words.bos,
            "cut": e.words.cut,
            "prompts": e.words.prompts,
            "alternatives": e.words.alternatives,
            "answers": sorted(e.words.answers),
            "n_predict": e.words.n_predict,
            "k": e.words.k,
            "branches": e.words.branches,
            "sampling": e.words.sampling,
        },
    }


def packed(array: npt.ArrayLike, kind: str) -> dict[str, Any]:
    """An array as the page unpacks it: its shape, its type, its bytes."""
    a = np.ascontiguousarray(array, np.dtype(kind))
    data = base64.b64encode(a.tobytes()).decode()
    return {"shape": list(a.shape), "type": kind[1:], "data": data}


def pieces(described: Mapping[int, dict[str, Any]]) -> dict[int, list[str]]:
    """The text of each token: to be shown, and as it is where that differs."""
    out = {}
    for i, entry in sorted(described.items()):
        own: str = entry["text"]
        shown = visible(own)
        out[i] = [shown] if shown == own else [shown, own]
    return out


def _lens(e: Explored) -> dict[str, Any]:
    lens = e.lens
    return {
        "ids": packed(lens.ids, "<u4"),
        "probs": packed(lens.probs, "<f4"),
        "followed": [ids.tolist() for ids in lens.followed],
        # (n_layer, all the lists of tokens one behind the other)
        "logprobs": packed(np.concatenate(lens.logprobs, 1), "<f4"),
        "ranks": packed(np.concatenate(lens.ranks, 1), "<u4"),
    }


def _triangles(maps: AttentionMaps) -> dict[str, Any]:
    """Lower triangles of 16-bit weights (n_layer, n_head, n (n + 1) / 2), as shares of the largest."""
    top = float(maps.weights.max()) or 1.0
    rows, columns = np.tril_indices(maps.weights.shape[-1])
    shares = np.rint(maps.weights[..., rows, columns] / top * 65535)
    return {"largest": top, "weights": packed(shares, "<u2")}


def _shares(every: Sequence[Attribution | None]) -> dict[str, Any]:
    """For each token but the first; NaN where the parts do not add up."""
    one = next(s for s in every if s is not None)

    def stack(name: str) -> dict[str, Any]:
        shape = np.shape(getattr(one, name))
        none = np.full(shape, np.nan)
        return packed([none if s is None else getattr(s, name) for s in every], "<f4")

    return {name: stack(name) for name in ("logit", "embed", "bias", "attn", "mlp", "heads")}


def attribution_arrays(shares: Attribution) -> dict[str, Any]:
    """The shares of one token's logit."""
    return {
        "logit": shares.logit,
        "embed": shares.embed,
        "bias": shares.bias,
        "attn": packed(shares.attn, "<f4"),
        "mlp": packed(shares.mlp, "<f4"),
        "heads": packed(shares.heads, "<f4"),
    }


def _short(numbers: Sequence[float]) -> list[float]:
    return [round(x, 5) for x in numbers]


def live_page() -> str:
    """The page of a server, which asks it for all that it shows."""
    return _template("live")


@cache
def _template(name: str) -> str:
    """A page with its style and code, and a policy that names its script by its hash."""

    def data(file: str) -> str:
        return (files("mia") / "data" / file).read_text(encoding="utf-8")

    style = re.search(r"<style>(.*?)</style>", data("page.html"), re.S)
    assert style is not None
    rules = style[1].replace("/*COLOURS*/", colour_rules(), 1) + data("explorer.css")
    template = data(f"{name}.html").replace("/*STYLE*/", rules, 1)
    for mark, file in (("/*EXPLORER*/", "explorer.js"), ("/*LIVE*/", "live.js")):
        template = template.replace(mark, data(file), 1)
    script = re.search(r"<script>(.*?)</script>", template, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return template.replace("SCRIPT-HASH", f"sha256-{digest}", 1)
