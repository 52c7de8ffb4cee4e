"""Hooks: a class to subclass, for looking at sites and changing them.

    rows = Hook("all").look(model, "The capital of France is")    # {Site: (n_tokens, width)}

    class Halve(Hook):
        sites = "mlp_out.3"
        tokens = -1

        def change(self, site, rows):        # while the model runs
            return rows / 2

        def read(self, index, seen):         # after each request, by its index
            print(seen[Site("mlp_out", 3)])

    Halve().run(model, [Request(model.tokenize("Hello"))])

A hook becomes edits and captures of ordinary requests, so that many requests with hooks
are planned like any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING

from mia.arrays import Array
from mia.edits import Edit, Tokens
from mia.request import Capture, Request, Result
from mia.sites import Site, parse_many

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress


class Hook:
    """What to look at or change, where and when.

    Attributes:
        sites: any spelling, or several; "all" is every site that the model's graph has.
        tokens: which prompt tokens, as in `Edit`; None for all.
        generated: also the generated tokens.
    """

    sites: str | Site | Sequence[str | Site] = "resid_post"
    tokens: Tokens = None
    generated: bool = False

    def __init__(
        self,
        sites: str | Site | Sequence[str | Site] | None = None,
        *,
        tokens: Tokens | EllipsisType = ...,
    ):
        """Arguments override class attributes; `tokens=None` means all tokens. A subclass with
        its own `__init__` need not call this one."""
        if sites is not None:
            self.sites = sites
        if tokens is not ...:
            self.tokens = tokens

    # -- for subclasses ------------------------------------------------------------

    def change(self, site: Site, rows: Array) -> Array:
        """New values for rows (n, width) of a site; called while the model runs, with the rows
        of several requests at once. Overriding it makes the hook an edit."""
        return rows

    def read(self, index: int, seen: Mapping[Site, Array]) -> None:
        """What request `index` had at the sites, (n_tokens, width) each, changes included.
        Overriding it makes the hook a capture, as does overriding nothing."""

    # -- use -----------------------------------------------------------------------

    def at(self, model: Model) -> list[Site]:
        """The sites meant. Raises `SiteError` or `RangeError`."""
        if self.sites == "all":
            return list(model.topology.sites)
        return parse_many(self.sites, model.n_layer)

    @property
    def changes(self) -> bool:
        return type(self).change is not Hook.change

    @property
    def reads(self) -> bool:
        return type(self).read is not Hook.read or not self.changes

    def edits(self, model: Model) -> list[Edit]:
        """One per site, the same objects each time, so that requests share work."""
        if not self.changes:
            return []
        # Made here, for a subclass may have an __init__ that does not call this class's.
        made: dict[Site, Edit] = vars(self).setdefault("_edits", {})
        for site in self.at(model):
            if site not in made:
                made[site] = Edit(
                    site, partial(self.change, site), tokens=self.tokens, generated=self.generated
                )
        return [made[s] for s in self.at(model)]

    def captures(self, model: Model) -> list[Capture]:
        return [Capture(self.at(model), self.tokens, self.generated)] if self.reads else []

    def on(self, model: Model, request: Request) -> Request:
        """The request with this hook's edits and captures after its own."""
        return replace(
            request,
            edits=(*request.edits, *self.edits(model)),
            captures=(*request.captures, *self.captures(model)),
        )

    def run(
        self, model: Model, requests: Iterable[Request], *, progress: Progress | None = None
    ) -> list[Result]:
        """Runs requests with this hook on; `read` is called for each afterwards."""
        results = model.run([self.on(model, r) for r in requests], progress=progress)
        if self.reads:
            for i, result in enumerate(results):
                self.read(i, result.by_capture[-1][1])  # `on` puts this hook's capture last
        return results

    def look(
        self, model: Model, prompt: str | Sequence[int], *, bos: bool | None = None
    ) -> dict[Site, Array]:
        """What one prompt has at the sites."""
        ids = model.tokenize(prompt, bos=bos) if isinstance(prompt, str) else prompt
        result = self.run(model, [Request(ids, logits=None)])[0]
        return {s: result.captures[s] for s in self.at(model)} if self.reads else {}
