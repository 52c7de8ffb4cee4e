"""Path patching: what one head writes, followed to where it is read.

Source: Wang et al. 2022 (arXiv 2211.00593), sec. 3.1 and appendix B.

| in the paper                            | here                                              |
|-----------------------------------------|---------------------------------------------------|
| x_orig, x_new                           | `PathPatching`: prompt, corrupted                 |
| sender head h                           | the cell (layer, head) of the sweep               |
| receivers R                             | `Receiver`: heads' q, k or v, or a residual       |
| all other heads frozen to x_orig        | `freeze`: every head at every token               |
| MLPs are run, not frozen                | the same                                          |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mia.arrays import Array
from mia.edits import Edit
from mia.errors import UsageError
from mia.ranges import by_layer, parse_heads, parse_layers
from mia.request import Capture, Request
from mia.sites import HEADED, KINDS, Site
from mia.sweeps.axes import Place
from mia.sweeps.changes import Base, Change, Nudge, Patch

if TYPE_CHECKING:
    from mia.model import Model


@dataclass(frozen=True)
class Receiver:
    """Where a path ends: a site, and some of its heads."""

    site: Site
    heads: tuple[int, ...] | None = None


def parse_receivers(text: str, model: Model) -> list[Receiver]:
    """`q:9.6,9.9`, `v:7.*;resid_pre:10`: sites with heads, or with layers where they have none.

    Raises `UsageError` or `RangeError`.
    """
    out: list[Receiver] = []
    for part in text.split(";"):
        name, colon, where = (x.strip() for x in part.partition(":"))
        if not colon or name not in KINDS or not KINDS[name].layered or KINDS[name].by_key:
            raise UsageError(
                f"receivers {part!r} are not SITE:HEADS, like q:9.6,9.9, or SITE:LAYERS, like "
                "resid_pre:10"
            )
        if name not in HEADED:
            layers = parse_layers(where, model.n_layer, "receivers")
            out += [Receiver(Site(name, layer)) for layer in layers]
            continue
        n_head = model.n_head_kv if KINDS[name].shape[0] == "n_head_kv" else model.n_head
        heads = by_layer(parse_heads(where, model.n_layer, n_head, "receivers"))
        out += [Receiver(Site(name, layer), tuple(h)) for layer, h in heads.items()]
    return out


def freeze(model: Model, base: Base) -> list[Edit]:
    """Every head at every token held at what it writes in a run."""
    rows = model.look(base.tokens, "head_out", edits=base.edits)
    tokens = range(len(base.tokens))
    return [
        Edit(Site("head_out", i), "replace", rows[f"head_out.{i}"], tokens=tokens)
        for i in range(model.n_layer)
    ]


class PathPatch(Change):
    """A sender's rows of the source run reach the receivers along direct paths alone."""

    def __init__(self, model: Model, base: Base, patch: Patch, receivers: Sequence[Receiver]):
        self._model, self._base, self._patch = model, base, patch
        self._receivers = receivers
        self._frozen = freeze(model, base)
        #: what each receiver reads (n_tokens, width): in a cell, under a nudge, with all heads frozen
        self._read: dict[Place | Nudge | None, list[Array]] = {}

    def prepare(self, places: Sequence[Place], nudges: Sequence[Nudge]) -> None:
        self._read.clear()
        if not self._receivers:
            return
        sent: dict[Place | Nudge | None, list[Edit]] = {None: []}
        sent |= {place: self._patch.edits(place) for place in places}
        sent |= {nudge: nudge.edits for nudge in nudges}
        captures = [Capture(r.site) for r in self._receivers]
        held = [*self._base.edits, *self._frozen]
        requests = [
            Request(self._base.tokens, [*held, *edits], captures, logits=None)
            for edits in sent.values()
        ]
        for key, result in zip(sent, self._model.run(requests), strict=True):
            read = [result.captures[r.site] for r in self._receivers]
            self._read[key] = [self._of(r, a) for r, a in zip(self._receivers, read, strict=True)]

    def _of(self, receiver: Receiver, rows: Array) -> Array:
        if receiver.heads is None:
            return rows
        n = self._model.topology.sites[receiver.site].shape[0]
        chosen = rows.reshape(len(rows), n, -1)[:, list(receiver.heads)]
        return chosen.reshape(len(rows), -1).copy()

    def edits(self, place: Place) -> list[Edit]:
        """Without receivers a path ends at the logits, and one run is enough."""
        return self._received(place, self._patch.edits(place))

    def reference(self) -> list[Edit]:
        return self._received(None, [])

    def nudged(self, nudge: Nudge) -> list[Edit]:
        return self._received(nudge, nudge.edits)

    def _received(self, key: Place | Nudge | None, sent: list[Edit]) -> list[Edit]:
        if not self._receivers:
            return [*self._frozen, *sent]
        tokens = range(len(self._base.tokens))
        return [
            Edit(r.site, "replace", rows, tokens=tokens, heads=r.heads)
            for r, rows in zip(self._receivers, self._read[key], strict=True)
        ]
