"""One self-contained page of attention maps: nothing is fetched, it opens from a file.

The page's own text, style and code are `data/attention.html`; here the numbers go into it:
lower triangles of 16-bit weights, so that 270 maps of 64 tokens take 1.5 MB.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.errors import UsageError
from mia.io.files import write_bytes
from mia.show.plots import INFERNO
from mia.show.text import safe


def attention_page(
    weights: Array,
    *,
    layers: Sequence[int],
    heads: Sequence[int],
    pieces: Sequence[str],
    title: str,
    about: str = "",
    bar: str = "weight",
) -> str:
    """The page as text.

    Args:
        weights: (n_layer, n_head, n_query, n_key) of n queries and the same n keys; what lies
            above the diagonal is not kept.
        pieces: the text of each token, as it should be shown.
        bar: what the numbers are.
    """
    n = len(pieces)
    if weights.shape != (len(layers), len(heads), n, n):
        raise UsageError(
            f"maps of shape {weights.shape} are not of {len(layers)} layers, {len(heads)} heads and {n} tokens"
        )
    top = float(weights.max()) or 1.0
    rows, columns = np.tril_indices(n)
    packed = np.rint(weights[..., rows, columns] / top * 65535).astype("<u2")
    data = {
        "title": safe(title),
        "about": safe(about, "\n"),
        "bar": safe(bar),
        "layers": [int(i) for i in layers],
        "heads": [int(h) for h in heads],
        "tokens": [safe(p) for p in pieces],
        "max": top,
        "colours": INFERNO,
        "weights": base64.b64encode(packed.tobytes()).decode(),
    }
    # inside a script element "<" could end it
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    template = files("mia").joinpath("data/attention.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", text, 1)


def terminal_page(parts: Sequence[Any], *, title: str) -> str:
    """A page of what a terminal would show, below each other: rich's renderables or plain text."""
    from html import escape
    from io import StringIO

    from rich.console import Console

    console = Console(
        record=True, file=StringIO(), width=100_000, color_system="truecolor", no_color=False
    )
    for part in parts:
        console.print(part, markup=False, highlight=False, crop=False)
        console.print()
    code = "".join(
        line.rstrip() + "\n"
        for line in console.export_html(inline_styles=True, code_format="{code}").splitlines()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"</head>\n<body><h1>{escape(title)}</h1>\n"
        f'<pre style="line-height:1.25">{code}</pre></body></html>\n'
    )


def write_page(path: str | Path, page: str) -> None:
    """Writes a page, whole or not at all. Raises `FileError`."""
    write_bytes(path, page.encode())
