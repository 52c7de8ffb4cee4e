"""The process of a contestant: reads a job per line on stdin, does it once, answers on stdout.

A question is {"job": "lens", "inputs": "….npz", "out": "….npz" or null}; the answer
{"cpu": seconds, "wall": seconds, "scale": 1.0}, or {"error": "…"}. The first line says
{"ready": {name: version}}. With `--once JOB INPUTS` the process does one job and ends.

`scale` is what the seconds are to be multiplied by if a slow library did only a part of the job;
`index` in the file of results says which part.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a job gave.

    Attributes:
        arrays: called after the clock has stopped; its arrays are compared.
        scale: the whole job is this many times what was done.
    """

    arrays: Callable[[], dict[str, Array]] = field(default=dict)
    scale: float = 1.0


Work = Callable[[Inputs], Outcome]


def read_inputs(path: str) -> Inputs:
    """Arrays by name; `texts` is a list of pairs of texts."""
    with np.load(path) as file:
        inputs: dict[str, Any] = {name: file[name] for name in file.files}
    if "texts" in inputs:
        inputs["texts"] = json.loads(bytes(inputs["texts"]).decode())
    return inputs


def do(work: Work, inputs: Inputs, out: str | None) -> dict[str, float]:
    """Does a job once and says what it took."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = work(inputs)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if out is not None:
        np.savez(out, **{k: np.asarray(v) for k, v in outcome.arrays().items()})  # type: ignore[arg-type]
    return {"cpu": cpu, "wall": wall, "scale": outcome.scale}


def serve(jobs: Mapping[str, Work], versions: Mapping[str, str], arguments: list[str]) -> None:
    """Answers until stdin ends; `arguments` may be ["--once", job, inputs]."""
    if arguments[:1] == ["--once"]:
        jobs[arguments[1]](read_inputs(arguments[2]))
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def answer(document: Mapping[str, object]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    answer({"ready": dict(versions), "jobs": list(jobs)})
    inputs: dict[str, Inputs] = {}
    for line in sys.stdin:
        question = json.loads(line)
        path = question["inputs"]
        if path not in inputs:
            inputs = {path: read_inputs(path)}  # the last one alone is kept
        try:
            answer(do(jobs[question["job"]], inputs[path], question["out"]))
        except Exception as err:
            traceback.print_exc()
            answer({"error": f"{type(err).__name__}: {str(err).strip() or '-'}".splitlines()[0]})


def words(tokens: Array) -> str:
    """The text that the tokenizer of `weights` reads as these tokens; -1 is no token."""
    return " ".join(f"t{t}" for t in tokens if t >= 0)


# -- parts of a job, for libraries that take minutes for the whole ------------------------------

#: interventions that a slow library does, in one batch or one by one
BATCH = 24
#: tokens that it writes
SHORT = 16
#: of so many pairs it does one
FEWER = 4


def part_of(n: int, size: int) -> Array:
    """About `size` of n places, spread evenly; no step that all places of a row would share."""
    step = max(1, n // size)
    while step > 1 and (step % 2 == 0 or step % 3 == 0):  # rows are multiples of 3 or of 2
        step += 1
    return np.arange(0, n, step)


def partly(values: Array, index: Array, n: int) -> Outcome:
    """`values` of the places `index` of n."""
    return Outcome(lambda: {"values": values, "index": index}, n / len(index))


def shortened(inputs: Inputs) -> tuple[int, float]:
    """How many tokens a slow library writes, and the scale."""
    n = int(inputs["n_predict"])
    return min(SHORT, n), n / min(SHORT, n)


def texts_of(inputs: Inputs) -> tuple[Array, list[Array], float]:
    """Which pairs a slow library reads, their texts' tokens, and the scale."""
    tokens = inputs["tokens"]
    index = np.arange(0, len(tokens) // 2, FEWER)
    texts = [tokens[row][tokens[row] >= 0] for k in index for row in (2 * k, 2 * k + 1)]
    return index, texts, len(tokens) / len(texts)
