"""What can be tested of a model without another one to compare it with.

A prompt is run in ways that must give the same: unchanged and with its own activations put back,
alone and among others, through the model's unembedding and through mia's lens. What differs is
rounding. The noise floor is what rounding makes of a change that is too small to matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, norms
from mia.edits import Edit
from mia.engine.routes import NONE
from mia.errors import MiaError
from mia.measure.losses import log_softmax
from mia.measure.noise import nudge
from mia.measure.prompts import SINK, first_over_others
from mia.models.findings import Finding
from mia.request import Capture, Request
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

_TEXT = "The capital of France is Paris. The capital of Italy is"
#: how many changes that are too small to matter are run to see what they move
_N_NUDGES = 24
#: nats; rounding of float types stays far below, and what is larger is no rounding on any type
_FLOAT_NOISE, _ANY_NOISE = 1e-2, 1.5
#: bytes of one number of the KV cache
_CACHE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def examine(model: Model) -> list[Finding]:
    """Every test, in the order in which a fault in one explains the next."""
    examination = _Examination(model)
    findings: list[Finding] = []
    for what, test in _TESTS.items():
        if what in _RESIDUAL and not model.topology.has_residuals:
            continue  # the sites' line names them
        try:
            findings.append(test(examination))
        except MiaError as err:
            findings.append(Finding("fail", what, str(err)))
            if what == "runs":
                break  # nothing else can be said
    return findings


class _Examination:
    def __init__(self, model: Model):
        self._model = model

    # -- what the tests share -------------------------------------------------------

    @cached_property
    def _ids(self) -> list[int]:
        """A short text, or the first ids of a vocabulary that cannot read one."""
        ids = self._model.tokenize(_TEXT)
        return ids if len(ids) > 3 else [i % self._model.n_vocab for i in range(5, 17)]

    @cached_property
    def _layer(self) -> int:
        return self._model.n_layer // 2

    @cached_property
    def _residuals(self) -> Array:
        """(n_layer, n_tokens, n_embd), every block's end."""
        sites = [Site("resid_post", i) for i in range(self._model.n_layer)]
        result = self._model.run([Request(self._ids, captures=[Capture(sites)], logits=None)])[0]
        return np.stack([result.captures[s] for s in sites])

    @property
    def _is_float(self) -> bool:
        return set(weight_types(self._model)) <= {"f32", "f16", "bf16"}

    def _nudges(self) -> list[Edit]:
        """Single rows changed by a hundred-thousandth."""
        rng = np.random.default_rng(0)
        n_layer, n_tokens = self._residuals.shape[:2]
        places = [
            (int(rng.integers(n_layer)), int(rng.integers(n_tokens))) for _ in range(_N_NUDGES)
        ]
        return [
            Edit(f"resid_post.{i}", nudge(seed), tokens=t) for seed, (i, t) in enumerate(places)
        ]

    # -- tests ------------------------------------------------------------------------

    def runs(self) -> Finding:
        """The model answers with numbers."""
        result = self._model.run([Request(self._ids)])[0]
        assert result.logits is not None
        if not np.isfinite(result.logits).all():
            return Finding("fail", "runs", "the logits are not all numbers", "get the file again")
        best = self._model.piece(int(result.logits[-1].argmax()))
        return Finding("ok", "runs", f"{len(self._ids)} tokens; the next one is {best!r}")

    def text(self) -> Finding:
        """A text comes back from its tokens."""
        model = self._model
        back = model.detokenize(model.tokenize(_TEXT, bos=False))
        if back.strip() == _TEXT:
            return Finding(
                "ok", "tokenizer", f"{model.n_vocab} tokens; a text comes back as it was"
            )
        return Finding(
            "warn",
            "tokenizer",
            f"a text comes back as {back[:40]!r}",
            "give token ids, or convert the model again with its tokenizer",
        )

    def sites(self) -> Finding:
        """Sites are what they say: see `mia.models.claims`."""
        checks = self._model.site_checks
        topology = self._model.unfused_topology
        kinds = {s.name for s in topology.sites}
        whole = sorted(checks.verified(topology.sites))
        text = f"{len(whole)} of {len(kinds)} kinds verified on numbers"
        part = sorted(kinds - set(whole))
        if part:
            text += f"; {', '.join(part)} in part"
        if checks.refused:
            return Finding("fail", "sites", checks.summary(), "`mia sites` lists what can be used")
        absent = {s.name for s, why in self._model.unfused_topology.missing.items() if why != NONE}
        missing = sorted(absent - kinds)
        if missing:
            text += f"; this architecture has no {', '.join(missing)} (`mia sites` says why)"
        if "resid_post" in missing:
            advice = "no logit lens, steering or patching of residuals on this architecture"
            return Finding("warn", "sites", text, advice)
        return Finding("ok", "sites", text)

    def lens(self) -> Finding:
        """mia's unembedding gives the model's own logits; `Model.lens` raises otherwise."""
        _ = self._model.lens
        return Finding("ok", "lens", "at the last block it gives the model's own logits")

    def identity(self) -> Finding:
        """Activations put back where they were change nothing."""
        site = Site("resid_post", self._layer)
        tokens = list(range(len(self._ids)))  # of the prompt alone
        edit = Edit(str(site), "replace", self._residuals[self._layer], tokens=tokens)
        with_it = Request(self._ids, [edit], [Capture(site)])
        plain = Request(self._ids, captures=[Capture(site)])
        one, other = (self._model.run([r])[0] for r in (plain, with_it))
        moved = _moved(one.logits, other.logits)
        bound = _FLOAT_NOISE if self._is_float else _ANY_NOISE
        numbers = {"nats": moved}
        if not moved <= bound:
            return Finding(
                "fail", "identity", f"a patch that changes nothing moves {moved:.2g} nats",
                "report this: no result of mia on this machine can be trusted", numbers,
            )  # fmt: skip
        what = "nothing" if moved == 0 else f"{moved:.2g} nats"
        return Finding("ok", "identity", f"a patch that changes nothing moves {what}", "", numbers)

    def layout(self) -> Finding:
        """A prompt's activations are the same among other prompts."""
        site = Site("resid_post", self._layer)
        others = [[*self._ids[: 2 + i], self._ids[0]] for i in range(len(self._ids) - 2)]
        requests = [Request(r, captures=[Capture(site)], logits=None) for r in (self._ids, *others)]
        rows = self._model.run(requests)[0].captures[site]
        alone = self._residuals[self._layer]
        with np.errstate(invalid="ignore", divide="ignore"):  # a model may give nothing but zeros
            error = float((norms(rows - alone) / norms(alone)).max())
        numbers = {"relative_error": error}
        text = f"a prompt's activations among others differ by {100 * error:.2g} % at most"
        if not np.isfinite(error):
            text = "a prompt's activations are zero, or no numbers"
        if not error <= (0.02 if self._is_float else 0.5):
            advice = "report this: prompts in one run disturb each other"
            return Finding("fail", "batches", text, advice, numbers)
        return Finding("ok", "batches", text, "", numbers)

    def noise(self) -> Finding:
        """What changes move that are too small to matter (`mia.measure.noise`), as sweeps do them."""
        requests = [Request(self._ids), *(Request(self._ids, [e]) for e in self._nudges())]
        results = self._model.run(requests)
        moved = [_moved(results[0].logits, r.logits) for r in results[1:]]
        floor = max(moved)
        numbers = {"nats": floor, "mean_nats": float(np.mean(moved)), "changes": float(_N_NUDGES)}
        text = f"{_N_NUDGES} changes by 1e-5 of a row move at most {floor:.2g} nats"
        advice = ""
        if not np.isfinite(floor):
            return Finding("fail", "noise floor", text, "get the file again", numbers)
        if not self._is_float:
            name = self._model.name
            advice = f"for effects below that open it as f16: mia models convert {name} f16 FILE"
        return Finding("ok", "noise floor", text, advice, numbers)

    def bos(self) -> Finding:
        """Whether the first token of a prompt is still itself."""
        model = self._model
        bos = model.bos_token
        name = model.piece(bos) if bos >= 0 else "none"
        if model.adds_bos:
            return Finding("ok", "BOS", f"the file asks for one: {name}")
        size = first_over_others(model)
        numbers = {"first_over_others": size}
        if size <= SINK:
            return Finding("ok", "BOS", "the file asks for none", "", numbers)
        if bos < 0:
            advice = "put a word in front that does not matter"
        else:
            advice = f"ask for a BOS, which puts {name} in front"
        return Finding(
            "warn",
            "BOS",
            f"the file asks for none, and a prompt's first token becomes the attention sink "
            f"(its residual is {size:.0f} times the others'): its own meaning is lost",
            advice,
            numbers,
        )

    def memory(self) -> Finding:
        """Whether the whole context would fit."""
        model = self._model
        sites = model.topology.sites
        per_token = sum(
            prod(node.shape) * _CACHE_BYTES[model.kv_type]
            for site, node in sites.items()
            if site.name in ("k", "v")
        )
        need, free = per_token * model.n_ctx, available_memory()
        copies = model._llama.repacked
        numbers = {
            "cache_bytes": float(need),
            "available_bytes": float(free),
            "repacked_bytes": float(copies),
        }
        text = f"{model.n_ctx} tokens need {need / 1e6:.0f} MB of cache"
        if copies:
            text += (
                f"; llama.cpp keeps a repacked copy of {copies / 1e6:.0f} MB of the weights "
                "(MIA_EXTRA_BUFTS=0 does without)"
            )
        if free and need > free:
            most = free // max(per_token, 1) // 2
            advice = f"open it with a smaller context: ctx of {most}"
            return Finding("warn", "memory", f"{text}; {free / 1e6:.0f} are free", advice, numbers)
        return Finding("ok", "memory", text, "", numbers)


def noise_floor(model: Model) -> float:
    """What changes by 1e-5 of a row move at most, in nats: noise of everything that is measured by
    small changes of this model."""
    numbers = _Examination(model).noise().numbers
    assert numbers is not None
    return numbers["nats"]


_TESTS: dict[str, Callable[[_Examination], Finding]] = {
    "runs": _Examination.runs,
    "tokenizer": _Examination.text,
    "sites": _Examination.sites,
    "lens": _Examination.lens,
    "identity": _Examination.identity,
    "batches": _Examination.layout,
    "noise floor": _Examination.noise,
    "BOS": _Examination.bos,
    "memory": _Examination.memory,
}


#: tests that read the residual stream
_RESIDUAL = ("lens", "identity", "batches", "noise floor")


def weight_types(model: Model) -> list[str]:
    """The types of the matrices that the graph multiplies with, sorted."""
    topology = model.topology
    weights = (n.src[0] for n in topology.nodes if n.op in ("MUL_MAT", "MUL_MAT_ID"))
    return sorted({topology.node(w).type for w in weights if topology.is_leaf(w)})


def available_memory() -> int:
    """Bytes that programs could still take, 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:  # noqa: PTH123
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return 0


def _moved(one: Array | None, other: Array | None) -> float:
    """The largest change of the log-probability of the likeliest tokens, in nats."""
    assert one is not None and other is not None
    a, b = log_softmax(one[-1]), log_softmax(other[-1])
    best = np.argsort(a)[-5:]
    return float(np.abs(a[best] - b[best]).max())
