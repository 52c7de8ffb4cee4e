"""The algebra of a block, checked on numbers: is each site what its name says?

Names of nodes prove nothing, and a search through a graph can be fooled. What a site says it is can
be tested with what is read there: `resid_mid` is `resid_pre` plus `attn_out`, a row of the pattern
is the softmax of a row of scores, a norm has the numbers of a norm. So the first time that a file's
sites are used, a few tokens are run, once as they are and once for each site set to zero, and every
site is compared with what it must be. A site that is not what it says is not offered. No reference
model is needed.

Each check is a claim about some sites with the largest error found: |difference| / |value| of a
token's row. Norms, biases, gates and soft-caps are read off the graph (`mia.lenses.walk`), as the
logit lens does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.arrays import Array
from mia.edits import Edit
from mia.engine.blocks import GATED
from mia.engine.control_vector import blocks_with_vector
from mia.errors import ModelError
from mia.lenses.linear import Norm
from mia.request import Capture, Request, Result
from mia.sites import BY_KEY, Site

if TYPE_CHECKING:
    from mia.engine.run import Engine
    from mia.lenses.walk import Step
    from mia.model import Model

#: to be raised whenever a check is added or changed: what is remembered is asked anew
VERSION = 3
#: sums and softmaxes of numbers that were read; only their own rounding separates them
_EXACT = 1e-4
#: products with float weights, in another order than ggml's
_FLOAT = 2e-3
#: products with quantized weights (ggml rounds what they read to 8 bits), and f16 keys and values
_ROUNDED = 0.06
#: another kernel of attention, on weights for which activations are rounded to 8 bits
_LAYOUT = 0.5
#: the most numbers of all output matrices together before only some layers' products are checked
_ALL_LAYERS = 10**8
#: the most numbers that are read again at once under fused attention
_TOGETHER = 8 << 20
_N_TOKENS = 6
#: of how many tokens of the vocabulary the logits are computed
_N_LOGITS = 64


@dataclass(frozen=True)
class Check:
    """One claim.

    Attributes:
        site: the site that is not what it says if the claim is wrong.
        claim: the equation, in names of sites.
        layers: where it was tested.
        error: the largest |difference| / |value| of a token's row.
        tolerance: up to which error the claim holds.
    """

    site: str
    claim: str
    layers: list[int]
    error: float
    tolerance: float


@dataclass(frozen=True)
class Algebra:
    """What is known of a file's sites.

    Attributes:
        checks: every claim that was tested.
        refused: sites that are not what they say, by spelling, and why.
        untested: kinds of sites of which a claim could not be tested, and why.
        unproved: sites that only have the name, and of which nothing could be tested; not offered.
        vectors: the blocks in which llama.cpp adds its control vector.
    """

    checks: list[Check] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    untested: dict[str, str] = field(default_factory=dict)
    unproved: dict[str, str] = field(default_factory=dict)
    vectors: list[int] = field(default_factory=list)

    def is_verified(self, site: Site) -> bool:
        """Whether some claim about a site was tested, and none failed."""
        layer = -1 if site.layer is None else site.layer
        if str(site) in self.refused:
            return False
        return any(c.site == site.name and layer in c.layers for c in self.checks)

    def verified(self, sites: Iterable[Site]) -> set[str]:
        """The kinds of these sites of which every one is verified."""
        every = list(sites)
        bad = {s.name for s in every if not self.is_verified(s)}
        return {s.name for s in every} - bad - self.untested.keys()

    def summary(self) -> str:
        """What is refused, in a line."""
        names = list(self.refused)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"{shown}: not what the name says, and not offered ({self.refused[names[0]]})"


def check(model: Model, engine: Engine) -> Algebra:
    """Tests every site of a model. `engine`: the model's own, which takes unchecked sites."""
    return _Checker(model, engine).run()


class _Checker:
    """The runs that the claims need, and the claims."""

    def __init__(self, model: Model, engine: Engine):
        self._model, self._engine = model, engine
        self._topology = engine.topology(fused=False)
        self._sites = self._topology.sites
        #: (site, claim, tolerance, other sites that the claim reads) -> errors by layer
        self._all: dict[tuple[str, str, float, tuple[str, ...]], list[tuple[int, float]]] = {}
        self._untested: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self._tokens = [(7 + 4 * i) % model.n_vocab for i in range(_N_TOKENS)]
        self._product = _FLOAT if self._weight_types() <= {"f32"} else _ROUNDED

    def _weight_types(self) -> set[str]:
        topology = self._topology
        sources = (n.src[0] for n in topology.nodes if n.op in ("MUL_MAT", "MUL_MAT_ID"))
        return {topology.node(s).type for s in sources if topology.is_leaf(s)}

    def run(self) -> Algebra:
        plain = self._plain()
        if plain is not None:
            self._mixers(plain)
            with np.errstate(all="ignore"):  # what a wrong site has may be anything
                self._claim(plain, self._zeroed())
                try:
                    self._fused(plain)
                except Exception as err:  # as in `_claim`
                    self.cannot("q", f"its numbers have an unexpected shape: {err}")
        return self._judged()

    def _claim(self, plain: Result, zeroed: dict[str, Result]) -> None:
        """Every claim of unfused attention, one layer at a time: what cannot be computed in one is
        tested in others."""
        every = range(self._model.n_layer)
        for name, (claim, layered) in _CLAIMS.items():
            for layers in [[i] for i in every] if layered else [every]:
                try:
                    claim(self, plain, zeroed, layers)
                except Exception as err:  # the model can be used all the same
                    self.cannot(name, f"its numbers have an unexpected shape: {err}")

    def _judged(self) -> Algebra:
        """The outcome. A claim that fails is held against its site, unless a site that it reads as
        well has been refused already."""
        checks, refused = [], dict(self._unreadable)
        for (site, text, tolerance, others), errors in self._all.items():
            failed = []
            for layer, error in errors:
                place = layer if layer >= 0 else None
                if error <= tolerance:
                    continue
                if any(str(Site(other, place)) in refused for other in others):
                    failed.append(layer)
                    continue
                why = f"{text} does not hold: it is off by {100 * error:.3g} %"
                refused.setdefault(str(Site(site, place)), why)
            layers = [i for i, _ in errors if i not in failed]
            worst = max((e for i, e in errors if i not in failed), default=0.0)
            if layers:
                checks.append(Check(site, text, layers, worst, tolerance))
        tested = {(c.site, i) for c in checks for i in c.layers}
        why = "a node has the name, and nothing tells whether it is what the name says"
        names = self._topology.by_name
        unproved = {str(s): why for s in names if (s.name, s.layer) not in tested}
        blocks = blocks_with_vector(self._topology)
        vectors = [i for i in blocks if str(Site("resid_post", i)) not in refused]
        return Algebra(checks, refused, self._untested, unproved, vectors)

    # -- runs ---------------------------------------------------------------------

    def _plain(self) -> Result | None:
        """Every site of every layer, nothing changed. A kind of site that cannot be read at all
        is refused, and left out of what follows."""
        plain = self._try(["every site"], [self._request()])[0]
        if plain is None and self._try(["the model"], [Request(self._tokens)])[0] is None:
            return None  # it is not the sites
        if plain is None:
            for kind in dict.fromkeys(s.name for s in self._sites):
                mine = [s for s in self._sites if s.name == kind]
                request = Request(self._tokens, captures=[Capture(mine)], logits="all")
                if self._try([kind], [request])[0] is None:
                    self._unreadable |= dict.fromkeys(map(str, mine), self._untested[kind])
                    self._sites = {s: n for s, n in self._sites.items() if s.name != kind}
            plain = self._try(["the other sites"], [self._request()])[0]
        return plain

    def _zeroed(self) -> dict[str, Result]:
        """What the claims read with one kind of site set to zero in all layers, for each kind; norms
        to a constant, as some models divide by what they make of it."""
        there = {s.name for s in self._sites}
        kinds = [k for k, read in _ZEROED.items() if k in there and not there.isdisjoint(read)]
        requests = [
            Request(
                self._tokens,
                [_silence(s, node.shape[0]) for s, node in self._sites.items() if s.name == kind],
                [Capture([s for s in self._sites if s.name in _ZEROED[kind]])],
                logits=None,
            )
            for kind in kinds
        ]
        results = self._try(kinds, requests)
        return {k: r for k, r in zip(kinds, results, strict=True) if r is not None}

    def _request(self, edits: Iterable[Edit] = ()) -> Request:
        return Request(self._tokens, list(edits), [Capture(list(self._sites))], logits="all")

    def _try(self, kinds: Sequence[str], requests: Sequence[Request]) -> Sequence[Result | None]:
        """The results; where one fails, each request by itself. `kinds`: what each one changes."""
        try:
            return self._engine.run(requests)
        except (
            Exception
        ) as err:  # a wrong node has another shape; the model can be used all the same
            if len(requests) > 1:
                pairs = zip(kinds, requests, strict=True)
                return [self._try([kind], [request])[0] for kind, request in pairs]
            self.cannot(kinds[0], str(err))
            return [None]

    # -- claims -------------------------------------------------------------------

    def holds(
        self,
        site: str,
        claim: str,
        layer: int,
        got: Array,
        expected: Array,
        tolerance: float,
        *others: str,
    ) -> None:
        """Notes how far a claim is off; both are (n_tokens, width). `others`: sites that are at
        fault rather than `site`, if they have been refused by themselves."""
        error = _relative(got, expected) if got.shape == expected.shape else float("inf")
        self._all.setdefault((site, claim, tolerance, others), []).append((layer, error))

    def has(self, *sites: str, layer: int) -> bool:
        return all(Site(s, layer) in self._sites for s in sites)

    def noted(self, site: str, layer: int) -> str:
        return self._topology.notes.get(Site(site, layer), "")

    def cannot(self, site: str, why: str) -> None:
        self._untested.setdefault(site, why)

    def _walk(self, begin: Site, end: Site) -> list[Step]:
        """What the graph does between two sites; nothing if mia cannot tell."""
        from mia.lenses.walk import walk

        model = self._model
        try:
            return walk(self._topology, model.weights, begin, end, architecture=model.architecture)
        except ModelError as err:
            self.cannot(end.name, str(err))
            return []

    def steps(self, begin: Site, end: Site) -> Callable[[Array], Array] | None:
        """The same as one function of rows."""
        steps = self._walk(begin, end)
        if not steps and self._sites[begin].index != self._sites[end].index:
            return None

        def apply(x: Array) -> Array:
            for step in steps:
                x = step(x)
            return x

        return apply

    def residual(self, plain: Result, zeroed: dict[str, Result], layers: Sequence[int]) -> None:
        """What attention and the MLP add makes the residual."""
        for i in layers:
            for kind, result in (("", plain), *zeroed.items()):
                get = _getter(result, i)
                if kind and "resid_post" not in _ZEROED[kind]:
                    continue
                zero = (
                    f" with {kind} {'held' if kind.endswith('norm') else 'zeroed'}" if kind else ""
                )
                pre, post = get("resid_pre"), get("resid_post")
                if pre is None or post is None:
                    continue
                attn, mid, mlp = get("attn_out"), get("resid_mid"), get("mlp_out")
                if mid is not None and attn is not None and i not in self._topology.mixed:
                    claim = f"resid_mid = resid_pre + attn_out{zero}"
                    self.holds("attn_out", claim, i, mid, pre + attn, _EXACT)
                    self.holds("resid_mid", claim, i, mid, pre + attn, _EXACT, "attn_out")
                    self.holds("resid_pre", claim, i, mid, pre + attn, _EXACT, "attn_out")
                parts = {"resid_pre": pre, "attn_out": attn, "mlp_out": mlp}
                if mid is not None:
                    parts = {"resid_mid": mid, "mlp_out": mlp}
                there = {name: part for name, part in parts.items() if part is not None}
                if len(there) > 1 and i not in self._topology.followed:
                    claim = f"resid_post = {' + '.join(there)}{self._scaled(i)}{zero}"
                    made = self._times_factors(i, np.sum([*there.values()], axis=0))
                    added = sorted(there.keys() - {"resid_pre", "resid_mid"})
                    for site in added:
                        self.holds(site, claim, i, post, made, _EXACT)
                    for site in ("resid_post", next(iter(there))):
                        self.holds(site, claim, i, post, made, _EXACT, *added)

    def _scaled(self, layer: int) -> str:
        return ", scaled" if layer in self._topology.factors else ""

    def _times_factors(self, layer: int, x: Array) -> Array:
        """The sum at the end of a block times what the graph multiplies it with."""
        for factor in self._topology.factors.get(layer, []):
            named = isinstance(factor, str)
            x = x * (self._model.weights.vector(str(factor)) if named else np.float32(factor))
        return x

    def _mixers(self, plain: Result) -> None:
        """Where attention is added beside another mixer: resid_mid loses what attention added."""
        for i in sorted(self._topology.mixed):
            get = _getter(plain, i)
            attn, mid = get("attn_out"), get("resid_mid")
            edit = Edit(str(Site("attn_out", i)), "zero")
            without = self._try(["attn_out"], [self._request([edit])])[0]
            if attn is None or mid is None or without is None:
                continue
            left = _getter(without, i)("resid_mid")
            assert left is not None
            claim = "resid_mid loses attn_out where attn_out is zeroed in its layer alone"
            self.holds("attn_out", claim, i, left, mid - attn, _EXACT)

    def norms(self, plain: Result, zeroed: dict[str, Result], layers: Sequence[int]) -> None:
        """A norm is a norm of the residual, and what follows reads it."""
        for i in layers:
            get = _getter(plain, i)
            before_mlp = "resid_mid" if self.has("resid_mid", layer=i) else "resid_pre"
            for norm, source in (("attn_norm", "resid_pre"), ("mlp_norm", before_mlp)):
                x, y = get(source), get(norm)
                if x is None or y is None:
                    continue
                apply = self.steps(Site(source, i), Site(norm, i))
                if apply is not None:
                    claim = f"{norm} = norm({source})"
                    self.holds(norm, claim, i, y, apply(x), _FLOAT)
                    self.holds(source, claim, i, y, apply(x), _FLOAT, norm)
                    if norm == "attn_norm" and i:
                        claim = "attn_norm of the next block = norm(resid_post)"
                        self.holds("resid_post", claim, i - 1, y, apply(x), _FLOAT)
            for norm, reader in (("attn_norm", "v"), ("mlp_norm", "mlp_out")):
                latent = reader == "v" and bool(self.noted("v", i))  # it is rotated in part
                if norm in zeroed and self.has(norm, reader, layer=i) and not latent:
                    rows, usual = _getter(zeroed[norm], i)(reader), get(reader)
                    assert rows is not None and usual is not None
                    same = np.broadcast_to(rows[:1], rows.shape)
                    claim = f"{reader} is equal at all tokens where {norm} is held equal"
                    self.holds(norm, claim, i, rows - same + usual, usual, _EXACT, reader)

    def attention(self, plain: Result, zeroed: dict[str, Result], layers: Sequence[int]) -> None:
        """Scores are products of queries and keys, the pattern their softmax, heads what the
        pattern makes of the values, and attn_out what W_O makes of the heads."""
        rounded = _FLOAT if self._model.kv_type == "f32" else _ROUNDED
        for i in layers:
            if not self.has("attn_pattern", "attn_scores", layer=i):
                continue
            at = {k: v for k in _ATTENTION if (v := _getter(plain, i)(k)) is not None}
            pattern, scores = at["attn_pattern"], at["attn_scores"]  # (n_tokens, n_head, n_keys)
            seen = pattern > 0
            if not self.noted("attn_pattern", i):
                sums = pattern.sum(-1)
                claim = "every row of attn_pattern sums to 1"
                self.holds("attn_pattern", claim, i, sums, np.ones_like(sums), _EXACT)
            expected = _softmax(scores + self._alibi(i, pattern.shape), seen)
            shown = pattern / pattern.sum(-1, keepdims=True)
            claim = "attn_pattern = softmax(attn_scores) over the keys that are seen"
            self.holds("attn_scores", claim, i, shown, expected, _FLOAT, "attn_pattern")
            if "q" in at and "k" in at:
                self._products(i, at["q"], at["k"], scores, seen, rounded)
            if "v" in at and "head_out" in at:
                self._heads(i, pattern, at["v"], at["head_out"], rounded)
            for kind, (what, reader) in _SILENCED.items():
                if kind in zeroed and self.has(kind, reader, layer=i):
                    rows, usual = _getter(zeroed[kind], i)(reader), at[reader]
                    assert rows is not None
                    rows = np.where(seen, rows, 0) if reader == "attn_scores" else rows
                    usual = np.where(seen, usual, 0) if reader == "attn_scores" else usual
                    self.holds(kind, what, i, rows + usual, usual, _EXACT, reader)

    def _products(
        self, i: int, q: Array, k: Array, scores: Array, seen: npt.NDArray[np.bool_], rounded: float
    ) -> None:
        """scores[t, h, s] = cap(scale · q[t, h] · k[s, h'])"""
        apply = self._score_steps(i)
        n_head, n_head_kv = self._heads_of("q", i), self._heads_of("k", i)
        if apply is None or n_head % n_head_kv:
            return
        qs = q.reshape(len(q), n_head, -1)
        ks = np.repeat(k.reshape(len(k), n_head_kv, -1), n_head // n_head_kv, axis=1)
        if qs.shape[-1] != ks.shape[-1]:
            self.cannot("k", "queries and keys are not of one width")
            return
        expected = np.where(seen, apply(np.einsum("thd,shd->ths", qs, ks)), 0)
        got = np.where(seen, scores, 0)
        for site in ("q", "k"):
            claim = "attn_scores = scale · q · k, capped where the model caps"
            self.holds(site, claim, i, got, expected, rounded, "attn_scores", "attn_pattern")

    def _heads(self, i: int, pattern: Array, v: Array, heads: Array, rounded: float) -> None:
        """head_out[t, h] = sum_s pattern[t, h, s] · v[s, h']"""
        n_head, n_head_kv = pattern.shape[1], self._heads_of("v", i)
        gated = self.noted("head_out", i) == GATED
        if gated or self.noted("v", i) or n_head % n_head_kv:
            self.cannot("v", self.noted("head_out", i) or self.noted("v", i) or "heads differ")
            return
        vs = np.repeat(v.reshape(len(v), n_head_kv, -1), n_head // n_head_kv, axis=1)
        expected = np.einsum("ths,shd->thd", pattern[..., : len(v)], vs).reshape(heads.shape)
        claim = "head_out = attn_pattern · v"
        self.holds("v", claim, i, heads, expected, rounded, "head_out", "attn_pattern")
        self.holds("head_out", claim, i, heads, expected, rounded, "v", "attn_pattern")

    def output(self, plain: Result, zeroed: dict[str, Result], layers: Sequence[int]) -> None:
        """attn_out is what W_O, its bias and the norm behind it make of the heads."""
        n, width = self._model.n_layer, self._model.n_embd
        if n * width**2 > _ALL_LAYERS:
            layers = sorted({0, 1, n // 2, n - 1} & {*layers})
        for i in layers:
            if not self.has("head_out", "attn_out", layer=i):
                continue
            get = _getter(plain, i)
            heads, out = get("head_out"), get("attn_out")
            begin, end = Site("head_out", i), Site("attn_out", i)
            apply = self.steps(begin, end)
            if apply is not None and heads is not None and out is not None:
                claim = "attn_out = head_out · W_O, with bias and norm where the model has them"
                same = self._sites[begin].index == self._sites[end].index
                made = np.zeros_like(out) if same else apply(heads)
                self.holds("head_out", claim, i, out, made, self._product, "attn_out")

    def experts(self, plain: Result, zeroed: dict[str, Result], layers: Sequence[int]) -> None:
        """A router's logits are products with the MLP's norm, the chosen experts are the highest
        of them, and the weights of the chosen go as their scores."""
        for i in layers:
            if not self.has("router", "experts", "expert_weights", layer=i):
                continue
            get = _getter(plain, i)
            norm, logits = get("mlp_norm"), get("router")
            ids, weights = get("experts"), get("expert_weights")
            assert logits is not None and ids is not None and weights is not None
            if norm is not None:
                apply = self.steps(Site("mlp_norm", i), Site("router", i))
                if apply is not None:
                    claim = "router = W_router · mlp_norm"
                    self.holds("router", claim, i, logits, apply(norm), self._product)
            chosen = ids.astype(np.intp)
            choice = get("router_choice")
            if choice is not None:
                biased = np.take_along_axis(choice, chosen, 1)
                claim = "what is chosen is in order of router_choice"
                self.holds("router_choice", claim, i, biased, np.sort(biased, 1)[:, ::-1], _EXACT)
            scores = _gated(np.take_along_axis(logits, chosen, 1), self._topology.gate(i))
            shown = np.take_along_axis(weights, chosen, 1)
            claim = f"expert_weights go as {self._topology.gate(i)}(router) of the chosen experts"
            for site, others in (("expert_weights", ("router",)), ("experts", ("expert_weights",))):
                got = shown / shown.sum(1)[:, None]
                expected = (scores / scores.sum(1)[:, None]).astype(np.float32)
                self.holds(site, claim, i, got, expected, _FLOAT, *others)

    def ends(self, plain: Result, zeroed: dict[str, Result], layers: Sequence[int]) -> None:
        """A block begins where the one before ended; the end of the last is what is normed; what
        is looked up are rows of the file's table."""
        embed = self._sites.get(Site("embed"))
        if embed is not None:
            node = self._topology.nodes[embed.index]
            while self._topology.graph.is_added(node):
                node = self._topology.node(node.src[0])
            table = self._topology.node(node.src[0]).name
            weights = self._model.weights
            got = plain.captures[Site("embed")]
            rows = np.zeros_like(got)
            if table in weights:
                rows = np.concatenate([weights.rows(table, t, t + 1) for t in self._tokens])
            self.holds("embed", "embed = rows of the token embeddings", -1, got, rows, _EXACT)
        for i in layers[1:]:
            get, before = _getter(plain, i), _getter(plain, i - 1)
            pre, post = get("resid_pre"), before("resid_post")
            if pre is not None and post is not None:
                claim = "resid_pre = resid_post of the block before"
                self.holds("resid_pre", claim, i, pre, post, _EXACT)
        last, final = Site("resid_post", len(layers) - 1), Site("final_norm")
        if last in self._sites and final in self._sites:
            apply = self.steps(last, final)
            if apply is not None:
                rows, x = plain.captures[final], plain.captures[last]
                claim = "final_norm = norm(resid_post of the last block)"
                self.holds("final_norm", claim, -1, rows, apply(x), _FLOAT)
                self.holds("resid_post", claim, len(layers) - 1, rows, apply(x), _FLOAT)

    def logits(self, plain: Result, zeroed: dict[str, Result], layers: Sequence[int]) -> None:
        """Some tokens' logits are products of the final norm with their rows of the unembedding."""
        from mia.lenses.walk import Product

        final, logits = Site("final_norm"), Site("logits")
        if final not in self._sites or logits not in self._sites:
            return
        steps = self._walk(final, logits)
        if not steps or not isinstance(steps[0], Product):
            return
        start = self._model.n_vocab // 2
        stop = min(start + _N_LOGITS, self._model.n_vocab)
        x = plain.captures[final] @ self._model.weights.rows(steps[0].name, start, stop).T
        for step in steps[1:]:
            if isinstance(step, (Product, Norm)):
                return self.cannot("logits", "more than one product lies behind the final norm")
            x = step.columns(start, stop)(x)
        got = plain.captures[logits][:, start:stop]
        claim = "logits = W_U · final_norm"
        self.holds("logits", claim, -1, got, x, self._product)
        self.holds("final_norm", claim, -1, got, x, self._product, "logits")

    def _fused(self, plain: Result) -> None:
        """The graph with fused attention, which runs use that read no patterns, has the same. Of a
        large model some sites at a time: all of them are as many numbers as `plain` has."""
        sites = [
            s for s in self._engine.topology().sites if s in self._sites and s.name not in BY_KEY
        ]
        tolerance = _ROUNDED if self._product == _FLOAT else _LAYOUT
        for part in _parts(sites, [plain.captures[s].size for s in sites]):
            request = Request(self._tokens, captures=[Capture(part)], logits="all")
            result = self._try(["q"], [request])[0]
            for s in part if result is not None and self._engine.fuses else []:
                assert result is not None
                claim = f"{s.name} is the same with fused attention"
                got, expected = result.captures[s], plain.captures[s]
                if s.name != "experts":  # near ties turn
                    layer = -1 if s.layer is None else s.layer
                    self.holds(s.name, claim, layer, got, expected, tolerance)

    # -- what the graph does to scores --------------------------------------------

    def _heads_of(self, site: str, layer: int) -> int:
        node, q = self._sites[Site(site, layer)], self._sites.get(Site("q", layer))
        if node.layout == "heads" or q is None:
            return node.shape[0]
        return prod(node.shape) // q.shape[1]  # side by side: of the width of the queries

    def _alibi(self, layer: int, shape: tuple[int, ...]) -> Array:
        """What ALiBi takes off the scores (Press et al. 2021), as ggml's softmax does:
        (n_tokens, n_head, n_keys)."""
        softmax = self._topology.nodes[self._sites[Site("attn_pattern", layer)].index]
        most = softmax.param_f32(1)
        n_tokens, n_head, n_keys = shape
        if not most:
            return np.zeros(shape, np.float32)
        n = 1 << (n_head.bit_length() - 1)  # the largest power of two
        h = np.arange(n_head)
        slopes = np.where(
            h < n, 2.0 ** (-most / n * (h + 1)), 2.0 ** (-most / 2 / n * (2 * (h - n) + 1))
        )
        away = np.abs(np.arange(n_tokens)[:, None] - np.arange(n_keys)[None])
        return np.asarray(-slopes[None, :, None] * away[:, None, :], np.float32)

    def _score_steps(self, layer: int) -> Callable[[Array], Array] | None:
        """What becomes of q · k on its way to attn_scores."""
        topology = self._topology
        at = self._sites[Site("attn_scores", layer)]
        q = topology.nodes[self._sites[Site("q", layer)].index].addr
        node, factors = topology.nodes[at.index], [at.scale]
        bend: list[Callable[[Array], Array]] = []
        while node.op != "MUL_MAT":
            if node.op == "SCALE":
                bend.append(_times(node.param_f32(0)))
            elif node.op in ("TANH", "UNARY"):
                bend.append(np.tanh)
            else:
                self.cannot("q", f"{node.op} between q · k and the softmax is not known to mia")
                return None
            node = topology.node(node.src[0])
        above = topology.graph.root(node.src[1])
        if above != q and topology.node(above).op == "SCALE":
            bend.append(_times(topology.node(above).param_f32(0)))
        bend = [*bend[::-1], *map(_times, factors)]

        def apply(x: Array) -> Array:
            for step in bend:
                x = step(x)
            return x

        return apply


#: claims, by the site that is not checked if one cannot be computed; whether they are about a layer
_CLAIMS = {
    "resid_post": (_Checker.residual, True),
    "head_out": (_Checker.output, True),
    "attn_scores": (_Checker.attention, True),
    "attn_norm": (_Checker.norms, True),
    "router": (_Checker.experts, True),
    "resid_pre": (_Checker.ends, False),
    "logits": (_Checker.logits, False),
}
_ATTENTION = ("q", "k", "v", "attn_scores", "attn_pattern", "head_out")
_RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
#: site -> what is read where it is set to zero: all sites together would be hundreds of megabytes
_ZEROED: dict[str, tuple[str, ...]] = {
    "attn_norm": ("v",),
    "mlp_norm": _RESIDUAL,
    "q": ("attn_scores",),
    "k": ("attn_scores",),
    "v": ("head_out",),
    "head_out": _RESIDUAL,
    "attn_out": _RESIDUAL,
    "mlp_out": _RESIDUAL,
}
#: site -> what setting it to zero does, and where that is read
_SILENCED = {
    "q": ("attn_scores are 0 with q zeroed", "attn_scores"),
    "k": ("attn_scores are 0 with k zeroed", "attn_scores"),
    "v": ("head_out is 0 with v zeroed", "head_out"),
}


def _parts(sites: Sequence[Site], sizes: Sequence[int]) -> list[list[Site]]:
    """The sites in runs of at most `_TOGETHER` numbers, or of one."""
    parts: list[list[Site]] = []
    size = _TOGETHER
    for s, n in zip(sites, sizes, strict=True):
        if size + n > _TOGETHER:
            parts.append([])
            size = 0
        parts[-1].append(s)
        size += n
    return parts


def _silence(site: Site, width: int) -> Edit:
    """Every token has the same there."""
    if site.name.endswith("_norm"):
        return Edit(str(site), "replace", np.full(width, 0.25, np.float32))
    return Edit(str(site), "zero")


def _getter(result: Result, layer: int) -> Callable[[str], Array | None]:
    return lambda name: result.captures.get(Site(name, layer))


def _times(factor: float) -> Callable[[Array], Array]:
    return lambda x: x * np.float32(factor)


def _relative(got: Array, expected: Array) -> float:
    """The largest |got - expected| / |expected| of a token's row; a row that is nearly nothing
    beside the others counts as one of their thousandth."""
    a = got.reshape(len(got), -1).astype(np.float64)
    b = expected.reshape(len(expected), -1).astype(np.float64)
    size = np.sqrt((b * b).sum(-1))
    least = max(float(size.max()) * 1e-3, np.finfo(np.float32).tiny)
    error = np.sqrt(((a - b) ** 2).sum(-1)) / np.maximum(size, least)
    return float(error.max()) if np.isfinite(error).all() else float("inf")


def _gated(logits: Array, gate: str) -> npt.NDArray[np.float64]:
    """Scores of the chosen experts, up to a factor that is the same for all of a token."""
    x = logits.astype(np.float64)
    if gate == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-x)))
    if gate == "sqrt_softplus":
        return np.asarray(np.sqrt(np.log1p(np.exp(x))))
    return np.asarray(np.exp(x - x.max(1, keepdims=True)))


def _softmax(scores: Array, seen: npt.NDArray[np.bool_]) -> Array:
    x = np.where(seen, scores, -np.inf)
    e = np.exp(x - x.max(-1, keepdims=True))
    out: Array = e / e.sum(-1, keepdims=True)
    return out
