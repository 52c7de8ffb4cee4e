"""mia beside transformers on the same weights: every site, every kind of intervention.

An error is the largest difference over tokens, dimensions and layers, divided by the largest
number of the reference where that is above 1. `TOLERANCE` holds, and `TOLERANCE_GELU` where
llama.cpp looks the activation up in a table of half floats.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mia.edits import Edit
from mia.errors import EngineError, MiaError
from mia.methods.attribution import attribute_logit
from mia.model import Model
from mia.notices import MiaWarning
from mia.request import Capture, Request
from mia.sites import KINDS, NAMES, OF_EXPERTS, Site

from .recipes import Recipe
from .reference import Reference
from .results import CHECKS, OPERATORS, Cell, Row

Array = np.ndarray
TOLERANCE, TOLERANCE_GELU = 1e-4, 2e-3
N_TOKENS, EDITED = 14, [5, 6, 9]  # prompt length; the tokens that interventions change
N_PREDICT = 8
#: sites whose rows are not vectors: they are scaled, and nothing is put in their place
_ONLY_SCALED = ("attn_pattern",)
#: what a site may be instead, if mia says so: of another shape, or what a gate has left of the heads
_BEFORE_W_O = "what W_O reads"
_DEFINITIONS = ("rows of ", _BEFORE_W_O)
_NOT_GIVEN = "transformers does not give it"
_NO_EDIT = ("logits", "attn_scores", *OF_EXPERTS)


def compare(recipe: Recipe, reference: Reference, path: Path) -> Row:
    """Runs every comparison of one architecture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MiaWarning)  # of sites that are not offered
        with Model(path, threads=1, ctx=64) as model:
            return _Comparison(recipe, reference, model).row()


class _Comparison:
    def __init__(self, recipe: Recipe, reference: Reference, model: Model):
        self.recipe, self.ref, self.model = recipe, reference, model
        self.tolerance = TOLERANCE_GELU if recipe.gelu else TOLERANCE
        rng = np.random.default_rng(3)
        first = rng.integers(3, model.n_vocab, N_TOKENS)
        second = rng.integers(3, model.n_vocab, N_TOKENS)
        self.ids, self.other = first.tolist(), second.tolist()
        self.rng = rng
        self.sites = list(model.unfused_topology.sites)
        #: what a site of mia's is in the reference, where it goes by another name there
        self.alias: dict[str, str] = {}
        #: how a row of mia's is ordered: `ours == theirs[order]`, where known and not as it is
        self.order: dict[str, Array] = {}

    def row(self) -> Row:
        row = Row(self.recipe.name, self.model.architecture, self.recipe.gelu)
        self.want, self.want_other = (_hidden(self.ref.run(ids)) for ids in (self.ids, self.other))
        self.got, self.got_other = self._captures(self.ids), self._captures(self.other)
        for name in NAMES:
            row.sites[name] = self._site(name)
        for op in OPERATORS:
            row.operators[op] = {}
            for name in NAMES:
                if (cell := self._operator(op, name, row.sites[name])) is not None:
                    row.operators[op][name] = cell
        checks = (
            self._lens,
            self._generation,
            self._steered,
            self._attribution,
            self._together,
        )
        for name, check in zip(CHECKS, checks, strict=True):
            row.checks[name] = self._guarded(check)
        return row

    # -- what is read ------------------------------------------------------------------

    def _captures(self, ids: Sequence[int]) -> dict[str, Array]:
        result = self.model.run([Request(ids, captures=[Capture(self.sites)], logits="all")])[0]
        assert result.logits is not None
        return {str(s): x for s, x in result.captures.items()} | {"logits": result.logits}

    def _site(self, name: str) -> Cell:
        ours = [s for s in self.sites if s.name == name]
        theirs = [k for k in self.want if k.split(".")[0] == name]
        if not ours:
            note = self._said("missing", name)
            # streams of residuals have no module of transformers', but are what people look for
            return Cell("missing" if theirs or "not a sum" in note else "none", note=note)
        layers = [s.layer for s in ours if s.layer is not None]
        where = layers if layers and len(layers) < self.model.n_layer else None
        both = [s for s in ours if str(s) in self.want]
        if not both:
            return Cell("unseen", note=_NOT_GIVEN, layers=where)
        found = {s: self._difference(name, self.got[str(s)], self.want[str(s)]) for s in both}
        worst = max(error for error, _ in found.values())
        said = self._said("notes", name)
        if worst <= self.tolerance:
            note = "rotary pairs lie side by side" if name in self.order else ""
            return Cell("ok", worst, "; ".join(filter(None, [said, note])), where)
        bad = {s: what for s, (error, what) in found.items() if error > self.tolerance}
        if said and all(what.startswith(_DEFINITIONS) for what in bad.values()):
            if all(what.startswith(_BEFORE_W_O) for what in bad.values()):
                self.alias[name] = _BEFORE_W_O
            return Cell("differs", note=said, layers=where)
        texts = list(dict.fromkeys(re.sub(r"\.\d+$", "", what) for what in bad.values()))
        blocks = "" if len(bad) == len(ours) else f" (blocks {[s.layer for s in bad]})"
        return Cell("WRONG", worst, ", ".join(filter(None, texts)) + blocks, where)

    def _said(self, what: str, name: str) -> str:
        """What mia says of the sites of a name, each saying once."""
        says: dict[Site, str] = getattr(self.model.unfused_topology, what)
        return "; ".join(dict.fromkeys(text for s, text in says.items() if s.name == name))

    def _difference(self, name: str, ours: Array, theirs: Array) -> tuple[float, str]:
        """The error, and where it is large what else the numbers are."""
        if KINDS[name].by_key:
            ours, theirs = _causal(ours), _causal(theirs)
        if ours.shape != theirs.shape:
            return float("inf"), f"rows of {ours.shape[1:]}, not {theirs.shape[1:]}"
        error = _error(ours, theirs)
        if error <= self.tolerance:
            return error, ""
        if name in ("q", "k"):
            for order in _rotary_orders(self.recipe, theirs.shape[-1], self._n_heads(name)):
                turned = _error(ours, theirs[:, order])
                if turned <= self.tolerance:
                    self.order[name] = order
                    return turned, ""
        return error, self._diagnosis(name, ours, theirs)

    def _n_heads(self, name: str) -> int:
        node = next(n for s, n in self.model.unfused_topology.sites.items() if s.name == name)
        return node.shape[0]

    def _diagnosis(self, name: str, ours: Array, theirs: Array) -> str:
        for key, x in self.want.items():
            if x.shape == ours.shape and _error(ours, x) <= self.tolerance:
                return key if key.startswith(_BEFORE_W_O) else f"is {key}"
        orders = [np.arange(theirs.shape[-1])]
        if name in ("q", "k"):
            orders += list(_rotary_orders(self.recipe, theirs.shape[-1], self._n_heads(name)))
        for order in orders:
            turned = theirs[..., order]
            factor = float((ours * turned).sum() / (turned * turned).sum())
            if _error(ours, factor * turned) <= self.tolerance:
                return f"{factor:.4g} times what it should be"
            if name in ("q", "k") and _error(ours[0], turned[0]) <= self.tolerance:
                return "right at token 0 only: before rotation"
        return ""

    # -- interventions -----------------------------------------------------------------

    def _operator(self, op: str, name: str, cell: Cell) -> Cell | None:
        """The largest error of the logits after an edit, over two layers."""
        sites = [s for s in self.sites if s.name == name]
        compared = cell.status in ("ok", "WRONG") or name in self.alias
        if not sites or name in _NO_EDIT or not compared:
            return None
        if name in _ONLY_SCALED and (op != "scale" or "attention" in self.recipe.layout):
            return None
        chosen = list({str(s): s for s in (sites[min(1, len(sites) - 1)], sites[-1])}.values())
        errors: list[float] = []
        for s in chosen:
            if self._theirs(s) not in self.want:
                continue
            try:
                ours, theirs = self._edits(op, s)
                error = self._edited(s, ours, theirs)
            except EngineError as e:  # llama.cpp gives no numbers: mia says so
                return Cell("missing", note=f"mia says: {e}")
            except MiaError as e:
                return Cell("WRONG", note=f"{type(e).__name__}: {e}")
            errors.append(error)
        if not errors:
            return None
        worst = max(errors)
        return Cell("ok" if worst <= self.tolerance else "WRONG", worst)

    def _edits(self, op: str, s: Site) -> tuple[Edit, Callable[[Any], Any]]:
        """The same change for mia and for the reference."""
        theirs_at = self._theirs(s)
        if op == "zero":
            return Edit(s, "zero", tokens=EDITED), lambda h: h * 0
        if op == "scale":
            return Edit(s, "scale", tokens=EDITED, coeff=0.5), lambda h: h * 0.5
        order = self.order.get(s.name, np.arange(self.want[theirs_at].shape[-1]))
        if op == "add":
            v = self.rng.standard_normal(len(order)).astype(np.float32)
            return Edit(s, "add", v[order], tokens=EDITED), lambda h: h + torch.tensor(v)
        ours = self.got_other[str(s)][EDITED]
        theirs = torch.tensor(self.want_other[theirs_at][EDITED])
        return Edit(s, "replace", ours, tokens=EDITED), lambda h: theirs

    def _theirs(self, s: Site) -> str:
        return str(Site(self.alias.get(s.name, s.name), s.layer))

    def _edited(self, s: Site, ours: Edit, theirs: Callable[[Any], Any]) -> float:
        def edit(x: Any) -> Any:
            x[EDITED] = theirs(x[EDITED])
            return x

        place = (self.alias.get(s.name, s.name), s.layer)
        want = self.ref.run(self.ids, {place: edit})["logits"]
        result = self.model.run([Request(self.ids, [ours], logits="all")])[0]
        assert result.logits is not None
        return _error(result.logits, want)

    # -- the rest --------------------------------------------------------------------

    def _guarded(self, check: Callable[[], Cell]) -> Cell:
        try:
            return check()
        except MiaError as e:
            return Cell("missing", note=str(e).split("; it has")[0])
        except Exception as e:  # a fault of mia's: seen in the table, not fatal to it
            return Cell("WRONG", note=f"{type(e).__name__}: {e}")

    def _judged(self, error: float, note: str = "") -> Cell:
        return Cell("ok" if error <= self.tolerance else "WRONG", error, note)

    def _lens(self) -> Cell:
        """What the model would say after each block: its last residual is put in place of the
        last block's."""
        lens, n = self.model.lens, self.model.n_layer
        errors = []
        for i in range(n):
            block = torch.tensor(self.want[f"resid_post.{i}"])
            edits: Any = {("resid_post", n - 1): partial(_instead, block)}
            want = self.ref.run(self.ids, edits)["logits"]
            errors.append(_error(lens.logits(self.got[f"resid_post.{i}"]), want))
        return self._judged(max(errors))

    def _generation(self) -> Cell:
        return self._generated([], {})

    def _steered(self) -> Cell:
        s = Site("resid_post", 1)
        v = 2 * self.rng.standard_normal(self.model.n_embd).astype(np.float32)
        return self._generated(
            [Edit(s, "add", v)], {("resid_post", 1): lambda h: h + torch.tensor(v)}
        )

    def _generated(self, ours: list[Edit], theirs: Any) -> Cell:
        request = Request(self.ids, ours, n_predict=N_PREDICT, stop_at_eog=False)
        got = self.model.run([request])[0].tokens
        want = self.ref.generate(self.ids, N_PREDICT, theirs)
        if got == want:
            return Cell("ok", 0.0)
        i = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        logits = self.ref.run([*self.ids, *want[:i]], theirs)["logits"][-1]
        gap = float(logits[want[i]] - logits[got[i]])
        if gap <= 10 * self.tolerance:
            return Cell("ok", 0.0, f"tokens {want[i]} and {got[i]} are level")
        return Cell("WRONG", gap, f"token {i} is {got[i]}, not {want[i]}")

    def _together(self) -> Cell:
        """Requests that share a prefix, edited late or early, against each by itself."""
        tail = self.other[-4:]
        late = [Edit(Site("resid_post", 2), "scale", coeff=0.5, tokens=[N_TOKENS - 2])]
        requests = [
            Request(self.ids, logits="all"),
            Request([*self.ids[:-4], *tail], logits="all"),
            Request(self.ids, late, logits="all"),
            Request(self.ids[:-3], logits="all", n_predict=3, stop_at_eog=False),
        ]
        joint = self.model.run(requests)
        alone = [self.model.run([r])[0] for r in requests]
        error = max(_error(a.logits, b.logits) for a, b in zip(joint, alone, strict=True))
        if joint[3].tokens != alone[3].tokens:
            return Cell("WRONG", error, "other tokens together than alone")
        falls_back = self.model._llama.recurrent
        return self._judged(error, "one by one: the state is recurrent" if falls_back else "shared")

    def _attribution(self) -> Cell:
        answer = int(self.got["logits"][-1].argmax())
        shares = attribute_logit(self.model, self.ids, answer)
        error = _error(np.array([shares.recomputed]), np.array([self.want["logits"][-1, answer]]))
        return self._judged(error)


def _instead(rows: Any, _: Any) -> Any:
    return rows


def _error(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest number where that is above 1."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))


def _hidden(rows: dict[str, Array]) -> dict[str, Array]:
    """With scores of 0 for keys that the pattern leaves out: those behind a window."""
    for name, scores in rows.items():
        pattern = rows.get(name.replace("attn_scores", "attn_pattern"))
        if name.startswith("attn_scores") and pattern is not None:
            rows[name] = np.where(pattern > 0, scores, 0).astype(scores.dtype)
    return rows


def _causal(x: Array) -> Array:
    """(n, heads, n) with 0 for keys behind the query."""
    keep = np.tril(np.ones((x.shape[0], x.shape[2]), bool))[:, None]
    return np.where(keep, x, 0.0)


def _rotary_orders(recipe: Recipe, width: int, n_heads: int) -> list[Array]:
    """Orders of a row in which the two halves of a rotated part lie side by side."""
    dim, out = width // max(n_heads, 1), []
    for rotated in {dim, dim // 2, 8}:
        if rotated % 2 or rotated > dim or dim * n_heads != width:
            continue
        pairs = np.arange(rotated).reshape(2, -1).T.reshape(-1)
        head = np.concatenate([pairs, np.arange(rotated, dim)])
        out.append((np.arange(n_heads)[:, None] * dim + head).reshape(-1))
    return out
