"""mia's own fields of a request: what is changed while it runs, and what is read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.edits import OPERATORS, Edit
from mia.ranges import parse_layers, parse_tokens
from mia.request import Capture, Result
from mia.serve.fields import Fields, Refused
from mia.serve.limits import Limits
from mia.serve.store import Vectors
from mia.sites import BY_KEY, Site, parse_many
from mia.values import shown

if TYPE_CHECKING:
    from mia.io.activations import Activations
    from mia.model import Model

#: operators that take a vector; no function of Python's is ever called by its name
_OPERATORS = tuple(o.name for o in OPERATORS.values() if o.value and o.name != "mean")
#: edits that are remembered, so that a conversation's next turn has the same ones
_REMEMBERED = 256


@dataclass
class Asked:
    """mia's fields of one body, not yet for a prompt."""

    steer: list[Any] = field(default_factory=list)
    ablate: Any = None
    block: list[Any] = field(default_factory=list)
    patch: list[Any] = field(default_factory=list)
    lens: Any = None
    capture: list[Any] = field(default_factory=list)
    #: what patches took from other prompts, for all prompts of the body
    taken: dict[tuple[str, tuple[int, ...]], Activations] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Fields, limits: Limits) -> Asked:
        most = limits.changes
        return cls(
            steer=fields.several("steer", most),
            ablate=fields.take("ablate"),
            block=fields.several("block", most),
            patch=fields.several("patch", most),
            lens=fields.take("lens"),
            capture=fields.several("capture", most),
        )


@dataclass
class Reads:
    """What is read of a run, and how it is told when that is over.

    Attributes:
        size: numbers that are read at most.
        sites: of captures; each site is in one of them.
    """

    size: int = 0
    sites: set[Site] = field(default_factory=set)
    captures: list[Capture] = field(default_factory=list)
    tell: list[Callable[[Result, Sequence[int]], dict[str, Any]]] = field(default_factory=list)

    def document(self, result: Result, tokens: Sequence[int]) -> dict[str, Any]:
        """`tokens`: those of the prompt."""
        out: dict[str, Any] = {}
        for tell in self.tell:
            for name, told in tell(result, tokens).items():
                if name in out:  # another capture's sites
                    out[name].update(told)
                else:
                    out[name] = told
        return out


class Changer:
    """Makes edits and captures of what clients ask for. All of it runs in the thread that has the model."""

    def __init__(self, model: Model, vectors: Vectors, limits: Limits):
        self._model, self._vectors, self._limits = model, vectors, limits
        self._remembered: dict[str, list[Edit]] = {}

    def edits(self, asked: Asked, tokens: Sequence[int]) -> list[Edit]:
        """The edits for a prompt of these token ids."""
        edits: list[Edit] = []
        for i, given in enumerate(asked.patch):
            edits += self._patch(Fields(given, f"patch[{i}]"), len(tokens), asked)
        if asked.ablate is not None:
            edits += self._ablate(asked.ablate, tokens)
        for text in asked.block:
            edits += self._block(text, len(tokens))
        for i, given in enumerate(asked.steer):
            edits += self._steer(given, f"steer[{i}]", len(tokens))
        return edits

    def reads(self, asked: Asked, tokens: Sequence[int], n_predict: int) -> Reads:
        reads = Reads()
        n_fed = max(n_predict - 1, 0)
        if asked.lens is not None:
            self._lens(Fields(asked.lens, "lens"), reads, len(tokens), n_fed)
        for i, given in enumerate(asked.capture):
            self._capture(Fields(given, f"capture[{i}]"), reads, len(tokens), n_fed)
        return reads

    # -- changes -----------------------------------------------------------------------

    def _remember(self, key: str, make: Callable[[], list[Edit]]) -> list[Edit]:
        key = f"{self._vectors.version} {key}"
        edits = self._remembered.pop(key, None)
        if edits is None:
            edits = make()
            while len(self._remembered) >= _REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
        self._remembered[key] = edits
        return edits

    def _steer(self, given: Any, where: str, n: int) -> list[Edit]:
        def make() -> list[Edit]:
            from mia.steering import Steering

            fields = Fields({"vector": given} if isinstance(given, str) else given, where)
            text = fields.text("vector", most=self._limits.expression)
            if text is None:
                raise fields.refuse("vector", "is missing: the name of a vector")
            coeff = fields.number("coefficient", 1.0, -1e6, 1e6)
            op = fields.text("operator", "add")
            layers, tokens = fields.ranges("layers"), fields.ranges("tokens")
            generated = fields.flag("generated", tokens is None)
            keep_norm = fields.flag("keep_norm")
            fields.end()
            if op not in _OPERATORS:
                known = ", ".join(_OPERATORS)
                raise fields.refuse("operator", f"{shown(op)} is not known; known: {known}")
            vector = self._vectors.read(text)
            self._model.check_vector(vector, text)
            asked = None if layers is None else parse_layers(layers, self._model.n_layer)
            return Steering(
                vector,
                op,
                coeff,
                asked,
                None if tokens is None else parse_tokens(tokens, n),
                generated,
                keep_norm,
            ).edits()

        if isinstance(given, dict) and given.get("tokens") is not None:
            return make()  # they count from the end of this prompt
        return self._remember(json.dumps(["steer", given], sort_keys=True), make)

    def _ablate(self, given: Any, tokens: Sequence[int]) -> list[Edit]:
        from mia.methods.changes import Changes

        fields = Fields({"heads": given} if isinstance(given, (str, list)) else given, "ablate")
        heads, how = fields.take("heads"), fields.text("with", "zero")
        seed = fields.whole("seed", 0, 0, 2**32 - 2)
        attention, experts = fields.flag("attention"), fields.take("experts")
        fields.end()
        if how not in ("zero", "resample"):
            raise fields.refuse("with", f"{shown(how)} is not known; known: zero, resample")
        for name, value in (("heads", heads), ("experts", experts)):
            if isinstance(value, list):
                value = ",".join(str(x) for x in value[:10_000])
            if value is not None and (not isinstance(value, str) or len(value) > 100_000):
                raise fields.refuse(name, f"is like 3.5,4.*, not {shown(value)}")
            heads, experts = (value, experts) if name == "heads" else (heads, value)
        changes = Changes(
            ablate=heads,
            ablate_with=None if heads is None else how,
            ablate_attention=attention,
            ablate_seed=seed,
            ablate_experts=experts,
        )
        if how == "resample":
            return changes.prompt_edits(self._model, tokens)
        key = json.dumps(["ablate", heads, attention, experts])
        return self._remember(key, lambda: changes.prompt_edits(self._model, tokens))

    def _block(self, text: Any, n: int) -> list[Edit]:
        from mia.methods.knockout import block_edits, parse_block

        if not isinstance(text, str) or len(text) > 1000:
            raise Refused(
                f'block is like "5->0" or "3..7->0,1@2..4", not {shown(text)}', param="block"
            )
        return block_edits(
            self._model, parse_block(text, n, self._model.n_layer, self._model.n_head)
        )

    def _patch(self, fields: Fields, n: int, asked: Asked) -> list[Edit]:
        """A site of this prompt gets what another prompt has there, or numbers."""
        from mia.methods.patching import patch_edits

        site, prompt = fields.text("site", most=200), fields.take("prompt")
        values = fields.take("values")
        source, target = fields.ranges("from"), fields.ranges("to")
        mode: Any = fields.text("mode", "replace")
        fields.end()
        if site is None:
            raise fields.refuse("site", "is missing, like l_out-14")
        to: Any = "-1" if target is None else target
        if values is not None:
            rows = _rows(values, fields)
            sites = parse_many(site, self._model.n_layer)
            positions = parse_tokens(to, n)
            if mode not in ("replace", "add"):
                raise fields.refuse("mode", "is replace or add for values")
            return [Edit(s, mode, rows, tokens=positions) for s in sites]
        if not isinstance(prompt, (str, list)):
            raise fields.refuse("prompt", "is missing: a text or token ids; or give values")
        ids = self._model.ids(prompt)
        activations = self._taken(site, ids, asked)
        taken: Any = "-1" if source is None else source
        return patch_edits(
            self._model, site, [activations], n, from_tokens=taken, to_tokens=to, mode=mode
        )

    def _taken(self, site: str, ids: Sequence[int], asked: Asked) -> Activations:
        """What another prompt has at a site. Each is run once for a body."""
        key = (site, tuple(ids))
        if key not in asked.taken:
            n_tokens = sum(len(tokens) for _, tokens in asked.taken) + len(ids)
            if n_tokens > self._limits.patch_tokens:
                raise Refused(
                    f"patches take from prompts of {n_tokens} tokens; "
                    f"{self._limits.patch_tokens} are the most",
                    param="patch",
                )
            sites = parse_many(site, self._model.n_layer)
            self.check_size([(s, len(ids), len(ids)) for s in sites])
            asked.taken[key] = self._model.look(ids, sites)
        return asked.taken[key]

    # -- reads -------------------------------------------------------------------------

    def check_size(self, reads: Sequence[tuple[Site, int, int]]) -> int:
        """How many numbers are read. Raises `Refused` if they are too many.

        Args:
            reads: site, rows and keys of each.
        """
        size = 0
        by_key = any(site.name in BY_KEY for site, _, _ in reads)
        model = self._model
        topology = model.unfused_topology if by_key else model.topology
        for site, n_rows, n_keys in reads:
            node = topology.sites.get(site)
            size += n_rows * (prod(node.read_shape(n_keys)) if node is not None else 0)
        self.check_total(size)
        return size

    def check_total(self, size: int) -> None:
        """Raises `Refused` for more numbers than one request may read."""
        if size > self._limits.captured:
            raise Refused(
                f"{size} numbers are to be read; {self._limits.captured} are the most",
                param="capture",
            )

    def _lens(self, fields: Fields, reads: Reads, n: int, n_fed: int) -> None:
        from mia.lenses.table import lens_rows

        model = self._model
        layers, k = fields.ranges("layers"), fields.whole("k", 5, 1, self._limits.logprobs)
        tokens, generated = fields.ranges("tokens"), fields.flag("generated", True)
        fields.end()
        chosen = parse_layers("0.." if layers is None else layers, model.n_layer)
        positions = parse_tokens("-1" if tokens is None else tokens, n)
        sites = [Site("resid_post", i) for i in chosen]
        n_rows = len(positions) + (n_fed if generated else 0)
        reads.size += self.check_size([(s, n_rows, n) for s in sites])
        capture = Capture(sites, positions, generated)
        lens = model.lens

        def tell(result: Result, _: Sequence[int]) -> dict[str, Any]:
            arrays = result.of(capture)
            n_more = max(len(result.tokens) - 1, 0) if generated else 0
            at = [*positions, *range(n, n + n_more)]
            read = lens.read(np.concatenate([arrays[s] for s in sites]), k)
            places = [(s.llama, s, i) for s in sites for i in at]
            rows = lens_rows(read, places, model.described)
            return {"lens": [row.document() for row in rows]}

        reads.captures.append(capture)
        reads.tell.append(tell)

    def _capture(self, fields: Fields, reads: Reads, n: int, n_fed: int) -> None:
        names = fields.several("sites", self._limits.changes)
        tokens, generated = fields.ranges("tokens"), fields.flag("generated")
        fields.end()
        if not names or not all(isinstance(s, str) and len(s) <= 200 for s in names):
            raise fields.refuse("sites", 'is like "l_out-14" or ["q.3", "k.3"]')
        sites = parse_many(names, self._model.n_layer)
        positions = parse_tokens("0.." if tokens is None else tokens, n)
        extra = n_fed if generated else 0
        if again := reads.sites.intersection(sites):
            raise fields.refuse("sites", f"has {min(map(str, again))}, which another capture has")
        reads.sites.update(sites)
        reads.size += self.check_size([(s, len(positions) + extra, n + extra) for s in sites])
        capture = Capture(sites, positions, generated)

        def tell(result: Result, _: Sequence[int]) -> dict[str, Any]:
            arrays = result.of(capture)
            return {"activations": {str(s): as_document(a) for s, a in arrays.items()}}

        reads.captures.append(capture)
        reads.tell.append(tell)


def as_document(a: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array in JSON: its shape, and its numbers as base64 of little-endian float32."""
    data = np.ascontiguousarray(a, "<f4")
    return {"shape": list(a.shape), "float32": base64.b64encode(data.tobytes()).decode()}


def _rows(values: Any, fields: Fields) -> np.ndarray[Any, Any]:
    try:
        a = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        a = np.empty(0)
    if a.ndim not in (1, 2) or not a.size or not np.isfinite(a).all():
        raise fields.refuse("values", "are rows of numbers: [...] or [[...], ...]")
    if np.abs(a).max() > 1e30:
        raise fields.refuse("values", "are too large")
    return a.astype(np.float32)
