"""The `tasks` part of the bench: what function vectors cost, planned and one by one, and how
long soft vectors train. `tasks(bench)` adds the rows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mia.datasets.tasks import load
from mia.measure.metrics import FirstToken
from mia.methods import function_vectors, soft_vectors
from mia.methods.icl import IclExperiment, head_edit
from mia.request import Capture, Request

if TYPE_CHECKING:
    from bench import Bench

PROMPTS, EFFECT_PROMPTS = 100, 25


def tasks(bench: Bench) -> None:
    ex = IclExperiment(bench.model, load("antonym"), shots=10)
    share = 5 if bench.quick else 1  # of the planned work; the loop is always a part, scaled up
    prompts, effect_prompts = PROMPTS // share, EFFECT_PROMPTS // share
    function_vectors.head_statistics(ex, prompts=2, effect_prompts=1)  # a context is made once
    start = time.perf_counter()
    function_vectors.head_statistics(ex, prompts=prompts, effect_prompts=effect_prompts)
    planned = (time.perf_counter() - start) * share
    alone = _one_by_one(ex)
    what = f"function vector: {PROMPTS} prompts, {EFFECT_PROMPTS} × {bench.model.n_layer * bench.model.n_head} head effects"
    bench.add(f"{what}, one run / one by one (part, scaled up)", [alone / planned], target=10)
    bench.add(f"{what}, seconds", [planned], unit="s", target=180, at_least=False)
    how = soft_vectors.Training(evaluations=200 if bench.quick else 2000, patience=1000)
    start = time.perf_counter()
    done = soft_vectors.train(IclExperiment(bench.model, load("uppercase")), how)
    seconds = time.perf_counter() - start
    bench.add(
        f"soft vector: {done.evaluations} evaluations of 16 queries, seconds", [seconds], unit="s"
    )


def _one_by_one(ex: IclExperiment) -> float:
    """Seconds for the same with each run by itself, from a few of them."""
    m = ex.model
    means = ex.means("head_out", ex.dummies(2)).reshape(m.n_layer, m.n_head, -1)
    capture = Capture("head_out", -1)
    few = ex.dummies(4)
    start = time.perf_counter()
    for p in few:
        m.run([Request(p.tokens, captures=[capture], logits=None)])
    each_mean = (time.perf_counter() - start) / len(few)
    p = ex.dummies(1, wrong=True)[0]
    heads = [(layer, 0) for layer in range(0, m.n_layer, 3)]
    start = time.perf_counter()
    for layer, head in heads:
        edit = head_edit(layer, head, means[layer, head])
        m.run([Request(p.tokens, [edit], metric=FirstToken(p.answers))])
    each_effect = (time.perf_counter() - start) / len(heads)
    return PROMPTS * each_mean + EFFECT_PROMPTS * (1 + m.n_layer * m.n_head) * each_effect
