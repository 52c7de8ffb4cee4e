"""The six jobs: what goes in, what each result is, and when it is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.worker import Array
from mia.datasets.pairs import load_pairs
from mia.model import Model

#: how far numbers in float32 may be from the expert's
EXACT = 1e-3
#: correlation with the expert's below which a result in a smaller type is called wrong
RELATED = 0.5


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Attributes:
        result: the array that is compared, and what kind it has: "logits" (compared as they
            are), "rows" (residuals, compared in units of each row's size) or "tokens".
        bound: what limits it, in words.
    """

    name: str
    title: str
    result: str
    bound: str


JOBS = {
    job.name: job
    for job in (
        Job(
            "lens",
            "lens: top 5 of 30 layers × 35 tokens",
            "logits",
            "one matrix product with the unembedding, and a pass over the scores",
        ),
        Job(
            "capture",
            "capture of 30 layers × 512 tokens",
            "rows",
            "matrix products of 512 rows",
        ),
        Job(
            "patches",
            "720 patches (30 layers × 24 tokens)",
            "logits",
            "matrix products: each patch runs its own tokens from the edit on",
        ),
        Job(
            "heads",
            "5 prompts × 270 head replacements",
            "logits",
            "matrix products of one row per replacement, and one stop per edited layer",
        ),
        Job(
            "steer",
            "64 tokens, steered at one layer",
            "tokens",
            "memory: every weight is read once per token",
        ),
        Job(
            "pairs",
            "64 contrast pairs, last token, all layers",
            "rows",
            "matrix products of the rows that the texts do not share",
        ),
    )
}

#: a job that is too long for five rounds is done in part, and the seconds scaled up
PARTS = {"patches": 3}

CLEAN = (
    "When Mary and John went to the store on Sunday morning, John gave a large bottle of milk "
    "and some bread to the woman called"
)
CORRUPTED = (
    "After Paul but Anna came from a garden in Friday evening, Anna took the small basket with eggs "
    "or the cheese from her man named"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog, and then the man said to the woman that he "
    "would not come back to the old house on the hill, because it was far too dark in there. "
)
STARTS = ("Once", "In the morning", "They say", "However,", "My friend")
N_PATCH, N_HEAD, N_LENS, N_CAPTURE, N_STEER = 24, 38, 35, 512, 64


def ids(model: Model, text: str, n: int) -> Array:
    """A BOS and the first tokens of a text, repeated as often as n takes: (n,)."""
    tokens = model.tokenize(text, bos=False)
    tokens = (tokens * (1 + n // len(tokens)))[: n - 1]
    return np.asarray([*model.tokenize("", bos=True)[:1], *tokens], np.int64)


def inputs(
    model: Model, name: str, *, size: int | None = None, whole: bool = False
) -> dict[str, Array]:
    """The arrays of a job.

    Args:
        size: another number of tokens (lens, capture) or of replacements (heads, at one prompt),
            for the growth.
        whole: the whole of a job; else the part that `PARTS` names.
    """
    rng = np.random.default_rng(0)
    n_layer = model.n_layer
    if name == "lens":
        step = 1 if size is None else max(1, n_layer // 6)
        layers = np.arange(n_layer)[step - 1 :: step]
        return {"tokens": ids(model, TEXT, size or N_LENS), "layers": layers}
    if name == "capture":
        return {"tokens": ids(model, TEXT, size or N_CAPTURE)}
    if name == "patches":
        clean, corrupted = ids(model, CLEAN, N_PATCH), ids(model, CORRUPTED, N_PATCH)
        answers = model.tokenize(" Mary Anna", bos=False)
        # the middle one of three layers costs what the three cost on average
        chosen = range(n_layer) if whole else range(1, n_layer, PARTS["patches"])
        cells = [(i, p) for i in chosen for p in range(N_PATCH)]
        return {
            "clean": clean,
            "corrupted": corrupted,
            "answers": np.asarray([answers[0], answers[-1]], np.int64),
            "cells": np.asarray(cells, np.int64),  # layer, token
        }
    if name == "heads":
        n_prompts = 5 if size is None else 1
        heads = [(i, h) for i in range(n_layer) for h in range(model.n_head)]
        if size is None:
            places = [(p, *head) for p in range(n_prompts) for head in heads]
        else:  # spread over the layers, and once more from the first when all are taken
            places = [(0, *heads[k * 7 % len(heads)]) for k in range(size)]
        vectors = rng.normal(size=(len(places), model.head_dim)).astype(np.float32)
        return {
            "prompts": np.stack(
                [ids(model, f"{STARTS[p]} {TEXT}", N_HEAD) for p in range(n_prompts)]
            ),
            "cells": np.asarray(places, np.int64),  # prompt, layer, head
            "vectors": vectors,
            "answer": np.asarray(model.tokenize(" the", bos=False)[0]),
        }
    if name == "steer":
        vector = rng.normal(size=model.n_embd).astype(np.float32)
        return {
            "tokens": ids(model, TEXT, 16),
            "layer": np.asarray(n_layer // 2 - 1),
            "vector": vector * np.float32(2),
            "n_predict": np.asarray(N_STEER),
        }
    if name == "pairs":
        texts = [(p.positive, p.negative) for p in load_pairs("sentiment")[:64]]
        tokens = [model.tokenize(t) for pair in texts for t in pair]
        longest = max(map(len, tokens))
        return {
            "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
            "tokens": np.asarray([t + [-1] * (longest - len(t)) for t in tokens], np.int64),
        }
    raise ValueError(f"no job is called {name}")


def write_inputs(
    model: Model, name: str, folder: Path, *, size: int | None = None, whole: bool = False
) -> Path:
    path = folder / (f"{name}.npz" if size is None else f"{name}-{size}.npz")
    np.savez(path, **inputs(model, name, size=size, whole=whole))  # type: ignore[arg-type]
    return path


# -- is it right? ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How a result compares with the reference.

    Attributes:
        difference: the largest difference: of logits, or of a row in units of its size (root
            mean square), or how many of the tokens differ.
        agreement: correlation with the reference; the share of equal tokens.
    """

    difference: float
    agreement: float
    right: bool

    def __str__(self) -> str:
        return f"{self.difference:.2g}, {self.agreement:.4f}"


def check(
    job: Job, result: Mapping[str, Array], reference: Mapping[str, Array], *, exact: bool
) -> Check:
    """Compares a result with the reference.

    Args:
        result: `values`; `index`, if only a part was done: which of the reference's values;
            `principal` instead of `values` if directions are principal components of the pairs.
        exact: it was computed in float32, and has to agree to `EXACT`; else be related.
    """
    if "principal" in result:
        return _check_directions(result, reference)
    want = reference["values"]
    if "index" in result:
        which = result["index"]
        if "rows" in reference:  # of pairs: the mean is that of these pairs alone
            rows = reference["rows"]
            want = (rows[::2][which] - rows[1::2][which]).mean(0)
        else:
            want = want[which]
    got = result["values"]
    if job.result == "tokens":
        want = want[: len(got)]  # a slow library writes the first ones
    if got.shape != want.shape or not got.size:
        return Check(np.inf, 0.0, False)
    if job.result == "tokens":
        same = got == want
        return Check(
            float((~same).sum()), float(same.mean()), bool(same[0] and (same.all() or not exact))
        )
    got, want = got.astype(np.float64), want.astype(np.float64)
    if not np.isfinite(got).all():
        return Check(np.inf, 0.0, False)
    scale: Array | float = 1.0
    if job.result == "rows":
        scale = np.sqrt((want**2).mean(-1, keepdims=True)) + 1e-12
    difference = float((np.abs(got - want) / scale).max())
    agreement = float(np.corrcoef((got / scale).ravel(), (want / scale).ravel())[0, 1])
    return Check(difference, agreement, difference <= EXACT if exact else agreement >= RELATED)


def _check_directions(result: Mapping[str, Array], reference: Mapping[str, Array]) -> Check:
    """First principal components (n_layers, n_embd) of the pairs' differences, centred, against
    those of the reference's rows; their signs are free."""
    rows = reference["rows"].astype(np.float64)  # (2 n_pairs, n_layer, n_embd)
    cosines = []
    for layer, direction in zip(result["layers"], result["principal"], strict=True):
        d = rows[::2, layer] - rows[1::2, layer]
        best = np.linalg.svd(d - d.mean(0), full_matrices=False)[2][0]
        cosines.append(abs(best @ direction) / np.linalg.norm(direction))
    worst = float(min(cosines))
    return Check(1 - worst, worst, worst > 1 - EXACT)
