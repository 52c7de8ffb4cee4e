"""Random groups of requests, as JSON, so that each can be kept and run again.

A group is `{"limits": …, "edits": [...], "requests": [...]}`; requests name edits by their place in
the list, because requests that share an edit share work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.edits import OPERATORS, WITHOUT_COEFF, Edit
from mia.engine.graph import Topology
from mia.request import Capture, LogitDifference, Request, Sampling, TokenLogits
from mia.sites import ROUTERS

Json = dict[str, Any]


def _without_first(h: Array) -> Array:
    out = h.copy()
    out[:, 0] = -np.inf
    return out


#: edit functions by name; each row for itself, for whatever the width
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "half": lambda h: h * np.float32(0.5),
    "reverse": lambda h: h[:, ::-1],
    "without_first": _without_first,
}
METRICS: dict[str, Callable[[Array], Any]] = {
    "sum": lambda x: x.sum(0),
    "best": lambda x: float(x[-1].max()),
    "logits": TokenLogits([3, 5, 4]),
    "difference": LogitDifference(4, 3),
}


#: operations that llama.cpp looks up
_TABLES = ("GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK")


@dataclass(frozen=True)
class Place:
    """What a group must know of a site."""

    name: str
    shape: tuple[int, ...]
    by_key: bool
    read_only: bool
    headed: bool
    router: bool


@dataclass(frozen=True)
class Facts:
    """What a group must know of a model."""

    places: tuple[Place, ...]
    n_vocab: int
    n_layer: int
    n_ctx: int
    gelu: bool  # by llama.cpp's table of half floats: a step of it is 5e-4 of a number

    @classmethod
    def of(cls, topology: Topology, *, n_vocab: int, n_ctx: int) -> Facts:
        places = [
            Place(
                str(site),
                node.shape,
                site.kind.by_key,
                site.kind.read_only,
                site.kind.headed and (site.kind.by_key or len(node.shape) == 2),
                site.name in ROUTERS,
            )
            for site, node in topology.sites.items()
        ]
        gelu = any(node.op in _TABLES for node in topology.nodes)
        return cls(tuple(places), n_vocab, topology.n_layer, n_ctx, gelu)


# -- at random -----------------------------------------------------------------------------


def random_group(facts: Facts, seed: Sequence[int]) -> Json:
    """A forest of prompts with shared beginnings, and edits that are shared or not."""
    return _Group(facts, np.random.default_rng(list(seed))).group()


class _Group:
    def __init__(self, facts: Facts, rng: np.random.Generator):
        self.facts, self.rng = facts, rng
        self.edits: list[Json] = []

    def group(self) -> Json:
        rng = self.rng
        stems = [self._tokens(int(rng.integers(1, 24))) for _ in range(3)]
        requests = []
        steered = self._whole_steering() if rng.random() < 0.06 else None
        pool = [self._add(self._edit(None)) for _ in range(4)]
        for _ in range(int(rng.integers(2, 16))):
            requests.append(self._request(stems, pool, steered))
        return {"limits": self._limits(), "edits": self.edits, "requests": requests}

    def _limits(self) -> Json:
        """A third of the groups run with the limits that everybody has."""
        rng = self.rng
        if rng.random() < 0.33:
            return {}
        ubatch = int(rng.choice([4, 6, 16, 64, 512]))
        return {
            "UBATCH": ubatch,
            "MAX_SEQUENCES": min(ubatch, int(rng.choice([4, 6, 12, 256]))),
            "KV_BYTES": int(rng.choice([0, 60_000, 512 << 20])),
            "LOGITS_BYTES": int(rng.choice([0, 64 << 20])),
            "MIN_OUTPUTS": int(rng.choice([1, 2, 8])),
            "STATES_APART": int(rng.choice([1, 4, 16])),
            "MIN_RESUMED": int(rng.choice([1, 2, 3])),
            "RESUMED_ROWS": int(rng.choice([1, 4, 32])),
            "CELL_STEP": int(rng.choice([4, 16, 256])),
        }

    # -- one request

    def _tokens(self, n: int) -> list[int]:
        return self.rng.integers(0, self.facts.n_vocab, n).tolist()

    def _request(self, stems: list[list[int]], pool: list[int], steered: int | None) -> Json:
        rng = self.rng
        stem = stems[rng.integers(len(stems))]
        tokens = stem[: rng.integers(1, len(stem) + 1)]
        tail = rng.integers(5)
        # few different tokens, so that ends are shared too; now and then one that is not there
        tokens = tokens + [int(t) for t in rng.integers(3, 6, tail)]
        if rng.random() < 0.003:
            tokens = [*tokens, self.facts.n_vocab]
        edits = [pool[i] for i in rng.permutation(len(pool))[: rng.choice([0, 0, 1, 1, 2])]]
        if rng.random() < 0.25:
            edits.append(self._add(self._edit(len(tokens))))
        if steered is not None and rng.random() < 0.9:
            edits = [steered]
        n_predict = int(rng.choice([0, 0, 0, 0, 1, 2, 5, 9]))
        metric = str(rng.choice(list(METRICS))) if rng.random() < 0.15 else None
        logits: Any = ["last", "all", None, [0, -1], self._positions(len(tokens))][rng.integers(5)]
        if metric is not None and (logits is None or logits == []):
            logits = "last"
        return {
            "tokens": tokens,
            "edits": edits,
            "captures": [self._capture(len(tokens)) for _ in range(rng.choice([0, 1, 1, 2]))],
            "logits": logits,
            "metric": metric,
            "n_predict": n_predict,
            "sampling": self._sampling() if rng.random() < 0.4 else {},
            "stop_at_eog": bool(rng.random() < 0.3),
            "logprobs": bool(rng.random() < 0.5),
        }

    def _positions(self, n: int) -> list[int]:
        return [int(p) for p in self.rng.permutation(n)[: self.rng.integers(1, 4)]]

    def _some_tokens(self, n: int | None) -> Any:
        """None, an index, a slice, or a list of positions (of a prompt of n tokens)."""
        rng = self.rng
        if n is not None and rng.random() < 0.3:
            return self._positions(n)
        kinds: list[Any] = [None, None, 0, -1, {"slice": [-2, None]}, {"slice": [1, None]}]
        return kinds[rng.integers(len(kinds))]

    def _capture(self, n: int) -> Json:
        rng = self.rng
        names = [p.name for p in self.facts.places]
        sites = [names[i] for i in rng.permutation(len(names))[: rng.integers(1, 4)]]
        if rng.random() < 0.2:
            sites = sorted({s.rpartition(".")[0] or s for s in sites})  # a site of every layer
            if len({s.partition(".")[0] for s in names} & set(sites)) < len(sites):
                sites = names[:1]
        return {
            "sites": sites,
            "tokens": self._some_tokens(n),
            "generated": bool(rng.random() < 0.5),
        }

    def _sampling(self) -> Json:
        rng = self.rng
        sampling: Json = {
            "temperature": float(rng.choice([0.0, 0.5, 1.0, 1.0])),
            "seed": int(rng.integers(1000)),
        }
        for name, value in (
            ("top_k", 20),
            ("top_p", 0.8),
            ("min_p", 0.05),
            ("repeat_penalty", 1.3),
            ("frequency_penalty", 0.4),
            ("presence_penalty", 0.3),
        ):
            if rng.random() < 0.2:
                sampling[name] = value
        return sampling

    # -- one edit

    def _add(self, edit: Json) -> int:
        self.edits.append(edit)
        return len(self.edits) - 1

    def _whole_steering(self) -> int | None:
        """What llama.cpp's control vector may do: the same addition everywhere."""
        ends = [p for p in self.facts.places if p.name.startswith("resid_post.")]
        if not ends:
            return None
        place = ends[self.rng.integers(len(ends))]
        return self._add(
            {"site": place.name, "op": "add", "value": self._value([prod(place.shape)])}
        )

    def _value(self, shape: list[int]) -> Json:
        scale = float(self.rng.choice([0.1, 1.0, 1.0, 3.0]))
        return {"seed": int(self.rng.integers(1 << 30)), "shape": shape, "scale": scale}

    def _edit(self, n_tokens: int | None) -> Json:
        """An edit; with `n_tokens`, one for a prompt of that length, which may have a row of value
        for each token."""
        rng = self.rng
        editable = [p for p in self.facts.places if not p.read_only or rng.random() < 0.002]
        place = editable[rng.integers(len(editable))]
        edit: Json = {"site": place.name, "tokens": self._some_tokens(n_tokens)}
        edit["generated"] = [None, None, True, False][rng.integers(4)]
        n = self._selection(place, edit)
        if place.by_key:
            edit["op"] = str(rng.choice(["zero", "scale", "half"]))
            if place.name.startswith("attn_pattern") and edit["op"] == "zero":
                edit["op"] = "scale"  # a row of zeros: heads that read nothing, which is fine too
        elif place.router and rng.random() < 0.3:
            edit["op"] = "without_first"
        elif rng.random() < 0.1:
            edit["op"] = str(rng.choice(["tanh", "half", "reverse"]))
        else:
            edit["op"] = str(rng.choice(list(OPERATORS)))
        operator = OPERATORS.get(edit["op"])
        if operator is None:
            return edit
        if edit["op"] not in WITHOUT_COEFF:
            edit["coeff"] = float(rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]))
            if operator.coeff == "each" and not place.by_key and rng.random() < 0.2:
                parts = place.shape[0] if place.headed and "heads" not in edit else 2
                if "dims" not in edit and n % parts == 0:
                    edit["coeff"] = [round(float(c), 3) for c in rng.standard_normal(parts)]
        if operator.value:
            edit["value"] = self._value(self._shape(edit, n, n_tokens))
        edit["keep_norm"] = bool(rng.random() < 0.15)
        return edit

    def _selection(self, place: Place, edit: Json) -> int:
        """Chooses heads and dimensions. Returns the width of what is selected."""
        rng = self.rng
        n = prod(place.shape)
        if place.headed and rng.random() < 0.5:
            heads = rng.permutation(place.shape[0])[: rng.integers(1, place.shape[0] + 1)]
            edit["heads"] = [int(h) for h in heads]
            n = len(heads) * (1 if place.by_key else place.shape[1])
        if not place.by_key and rng.random() < 0.2:
            width = place.shape[1] if "heads" in edit else n
            dims = rng.permutation(width)[: rng.integers(1, min(width, 9) + 1)]
            edit["dims"] = [int(d) for d in dims]
            n = len(dims) * (len(edit["heads"]) if "heads" in edit else 1)
        return n

    def _shape(self, edit: Json, n: int, n_tokens: int | None) -> list[int]:
        """The value's: one row, now and then several (one for each token) or a wrong one."""
        rng = self.rng
        if rng.random() < 0.003:
            return [n + 1]
        if edit["op"] == "mean" and rng.random() < 0.5:
            return [3, n]
        if n_tokens is not None and rng.random() < 0.3:
            edit["generated"] = False
            tokens = edit["tokens"]
            if isinstance(tokens, list):
                return [len(tokens), n]
            if tokens is None:
                return [n_tokens, n]
        return [n]


# -- from JSON -----------------------------------------------------------------------------


def requests_of(group: Json) -> list[Request]:
    """The requests of a group. Raises `MiaError` as `Edit` and `Request` do."""
    edits = [edit_of(e) for e in group["edits"]]
    return [request_of(r, edits) for r in group["requests"]]


def request_of(r: Json, edits: Sequence[Edit]) -> Request:
    return Request(
        r["tokens"],
        [edits[i] for i in r["edits"]],
        [
            Capture(c["sites"], _tokens(c["tokens"]), generated=c["generated"])
            for c in r["captures"]
        ],
        logits=r["logits"],
        metric=METRICS[r["metric"]] if r["metric"] else None,
        n_predict=r["n_predict"],
        sampling=Sampling(**r["sampling"]),
        stop_at_eog=r["stop_at_eog"],
        logprobs=r["logprobs"],
    )


def edit_of(e: Json) -> Edit:
    value = None
    if (v := e.get("value")) is not None:
        normal = np.random.default_rng(v["seed"]).standard_normal(v["shape"])
        value = (v["scale"] * normal).astype(np.float32)
    return Edit(
        e["site"],
        FUNCTIONS[e["op"]] if e["op"] in FUNCTIONS else e["op"],
        value,
        _tokens(e.get("tokens")),
        generated=e.get("generated"),
        heads=e.get("heads"),
        dims=e.get("dims"),
        coeff=e.get("coeff", 1.0),
        keep_norm=e.get("keep_norm", False),
    )


def _tokens(given: Any) -> Any:
    return slice(*given["slice"]) if isinstance(given, dict) else given


def nudges(facts: Facts, size: float, phase: int) -> list[Edit]:
    """Changes as small as rounding, at every residual: an edit may take an earlier one back.

    Args:
        phase: another one changes other numbers.
    """
    residuals = ("embed", "resid_mid", "resid_post")
    names = [p.name for p in facts.places if p.name.partition(".")[0] in residuals]
    return [Edit(name, _Nudge(size, i + 7 * phase), generated=True) for i, name in enumerate(names)]


@dataclass(frozen=True)
class _Nudge:
    """Not all numbers are changed alike: a norm would take that back."""

    size: float
    phase: int

    def __call__(self, h: Array) -> Array:
        factors = 1 + self.size * np.cos(np.arange(h.shape[1]) + self.phase)
        return (h * factors).astype(np.float32)
