"""mia's own fields of a request: what is changed while it runs, and what is read."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.edits import OPERATORS, Edit
from mia.ranges import parse_heads, parse_layers, parse_tokens
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
#: the same of those that are for one prompt, and their bytes
_REMEMBERED_PROMPTS, _REMEMBERED_BYTES = 32, 4 << 20
_NOTHING: list[Any] = [[], None, [], []]


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
    n_taken: int = 0
    #: the edits made so far for all prompts of the body; `n_…`: how many numbers both have
    made: set[Edit] = field(default_factory=set)
    n_made: int = 0

    @property
    def runs_model(self) -> bool:
        """Whether its edits take from other runs."""
        resamples = isinstance(self.ablate, dict) and self.ablate.get("with") == "resample"
        return resamples or bool(self.patch)

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
    """Makes edits and captures of what clients ask for, in the thread that has the model or in that of
    a look."""

    def __init__(self, model: Model, vectors: Vectors, limits: Limits):
        self._model, self._vectors, self._limits = model, vectors, limits
        self._lock = threading.Lock()
        self._remembered: dict[str, list[Edit]] = {}
        self._of_prompts: dict[bytes, list[Edit]] = {}

    def edits(self, asked: Asked, tokens: Sequence[int]) -> list[Edit]:
        """The edits for a prompt of these token ids. The same objects for the same question, so that who
        reads a text finds in the cache what was decoded when it was generated."""
        question = [asked.steer, asked.ablate, asked.block, asked.patch]
        if question == _NOTHING:
            return []
        text = json.dumps([question, list(tokens), self._vectors.version], sort_keys=True)
        key = hashlib.sha256(text.encode()).digest()
        with self._lock:
            known = self._of_prompts.pop(key, None)
        if known is None:
            edits = self._made(asked, tokens)
        else:
            edits = known
            self._count(asked, edits, None)
        if sum(e._value.nbytes for e in edits if e._value is not None) <= _REMEMBERED_BYTES:
            with self._lock:
                while len(self._of_prompts) >= _REMEMBERED_PROMPTS:
                    del self._of_prompts[next(iter(self._of_prompts))]
                self._of_prompts[key] = edits
        return edits

    def _made(self, asked: Asked, tokens: Sequence[int]) -> list[Edit]:
        edits: list[Edit] = []

        def add(more: list[Edit], param: str) -> None:
            edits.extend(more)
            self._count(asked, more, param)

        for i, given in enumerate(asked.patch):
            add(self._patch(Fields(given, f"patch[{i}]"), len(tokens), asked), "patch")
        if asked.ablate is not None:
            add(self._ablate(asked.ablate, tokens), "ablate")
        for text in asked.block:
            add(self._block(text, len(tokens)), "block")
        for i, given in enumerate(asked.steer):
            add(self._steer(given, f"steer[{i}]", len(tokens)), "steer")
        return edits

    def _count(self, asked: Asked, edits: list[Edit], param: str | None) -> None:
        """Raises `Refused` if all edits of a body have too many numbers; one that is shared counts once."""
        new = [e for e in edits if e not in asked.made]
        asked.made.update(new)
        asked.n_made += sum(e._value.size for e in new if e._value is not None)
        if asked.n_made > self._limits.edited:
            raise Refused(
                f"the changes of all prompts have {asked.n_made} numbers; "
                f"{self._limits.edited} are the most",
                param=param,
            )

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
        with self._lock:
            edits = self._remembered.pop(key, None)
        if edits is None:
            edits = make()
        with self._lock:
            while len(self._remembered) >= _REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            return self._remembered.setdefault(key, edits)

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
            sizes = (self._model.n_layer, self._model.n_head)
            layers = {h.layer for h in parse_heads(heads or "", *sizes, "heads to ablate")}
            size = self._size([(Site("head_out", i), len(tokens), 1) for i in layers])
            if size > self._limits.edited:
                raise fields.refuse(
                    "heads",
                    f"take {size} numbers of this prompt; {self._limits.edited} are the most",
                )
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
        if len(prompt) > 64 * self._limits.patch_tokens:
            raise fields.refuse("prompt", "is too long")
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
            asked.n_taken += self.check_size([(s, len(ids), len(ids)) for s in sites])
            if asked.n_taken > self._limits.edited:
                raise Refused(
                    f"patches take {asked.n_taken} numbers from other prompts; "
                    f"{self._limits.edited} are the most",
                    param="patch",
                )
            asked.taken[key] = self._model.look(ids, sites)
        return asked.taken[key]

    # -- reads -------------------------------------------------------------------------

    def check_size(self, reads: Sequence[tuple[Site, int, int]]) -> int:
        """How many numbers are read. Raises `Refused` if they are too many.

        Args:
            reads: site, rows and keys of each.
        """
        size = self._size(reads)
        self.check_total(size)
        return size

    def _size(self, reads: Sequence[tuple[Site, int, int]]) -> int:
        size = 0
        by_key = any(site.name in BY_KEY for site, _, _ in reads)
        model = self._model
        topology = model.unfused_topology if by_key else model.topology
        for site, n_rows, n_keys in reads:
            node = topology.sites.get(site)
            size += n_rows * (prod(node.read_shape(n_keys)) if node is not None else 0)
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
