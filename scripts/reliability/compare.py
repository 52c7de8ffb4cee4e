"""Whether two results are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.request import Result

#: up to this error, numbers in another batch are the same
TOLERANCE = 1e-4
#: where GELU is looked up in llama.cpp's table of half floats, and the last bit moves a step of it
GELU_TOLERANCE = 2e-3


def error(a: Any, b: Any) -> float:
    """The largest |difference|, divided by a row's largest number where that is above 1. Infinite
    if the shapes differ, or if one has a number where the other has none."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        return float("inf")
    if not x.size:
        return 0.0
    finite = np.isfinite(x)
    if (finite != np.isfinite(y)).any() or not np.array_equal(
        x[~finite], y[~finite], equal_nan=True
    ):
        return float("inf")
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    rows = np.abs(x).max(-1, keepdims=True) if x.ndim else np.abs(x)
    return float((np.abs(x - y) / np.maximum(rows, 1)).max())


def differences(a: Result, b: Result) -> dict[str, float]:
    """What is not bit for bit the same, with its error."""
    found: dict[str, float] = {}

    def compare(name: str, x: Array | Any, y: Array | Any) -> None:
        if (x is None) != (y is None):
            found[name] = float("inf")
        elif x is not None and (e := error(x, y)):
            found[name] = max(e, found.get(name, 0.0))

    compare("logits", a.logits, b.logits)
    compare("value", a.value, b.value)
    if a.tokens != b.tokens:
        found["tokens"] = float("inf")
    compare("logprobs", a.logprobs, b.logprobs)
    pairs = [(a.captures, b.captures)]
    pairs += [(x, y) for (_, x), (_, y) in zip(a.by_capture, b.by_capture, strict=True)]
    for x, y in pairs:
        for site in {*x, *y}:
            compare(str(site), x.get(site), y.get(site))
    return found


def first_other_token(a: Result, b: Result) -> int | None:
    """Index of the first generated token that differs."""
    if a.tokens == b.tokens:
        return None
    same = zip(a.tokens, b.tokens, strict=False)  # one may have ended before the other
    return next((i for i, (x, y) in enumerate(same) if x != y), min(len(a.tokens), len(b.tokens)))


def until(result: Result, n_prompt: int, n: int) -> Result:
    """A result as far as it can be the same in two runs that chose the same n tokens, and then
    others: what was read of the prompt, and of these tokens."""
    n_fed = max(len(result.tokens) - 1, 0)
    read = []
    for capture, arrays in result.by_capture:
        cut = {}
        for site, rows in arrays.items():
            n_rows = len(rows) - (n_fed if capture.generated else 0) + n * capture.generated
            cut[site] = rows[:n_rows, :, : n_prompt + n] if rows.ndim == 3 else rows[:n_rows]
        read.append((capture, cut))
    return replace(
        result, tokens=result.tokens[:n], logprobs=result.logprobs[:n], captures={}, by_capture=read
    )


def worst(found: dict[str, float]) -> tuple[float, str]:
    """The largest error and where it is."""
    return max(((e, name) for name, e in found.items()), default=(0.0, ""))
