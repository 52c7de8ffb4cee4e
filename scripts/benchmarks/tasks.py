"""The `tasks` group: what function vectors cost, planned and one by one, and how long soft
vectors train."""

import time

from benchmarks.harness import Bench, seconds
from mia.measure.metrics import FirstToken
from mia.methods import function_vectors, soft_vectors
from mia.methods.icl import IclExperiment, experiment, head_edit
from mia.ranges import Head
from mia.request import Capture, Request

PROMPTS, EFFECT_PROMPTS = 100, 25


def tasks(bench: Bench) -> None:
    ex = experiment(bench.model, "antonym", shots=10)
    share = 5 if bench.quick else 1  # of the planned work; the loop is always a part, scaled up
    prompts, effect_prompts = PROMPTS // share, EFFECT_PROMPTS // share
    function_vectors.head_statistics(ex, prompts=2, effect_prompts=1)  # a context is made once
    planned = share * seconds(
        lambda: function_vectors.head_statistics(ex, prompts=prompts, effect_prompts=effect_prompts)
    )
    alone = one_by_one(ex)
    what = f"function vector: {PROMPTS} prompts, {EFFECT_PROMPTS} × {bench.model.n_layer * bench.model.n_head} head effects"
    bench.add(f"{what}, one run / one by one (part, scaled up)", [alone / planned], target=10)
    bench.add(f"{what}, seconds", [planned], unit="s", target=180, at_least=False)
    training = soft_vectors.SoftVectorTraining(
        evaluations=200 if bench.quick else 2000, patience=1000
    )
    start = time.perf_counter()
    result = soft_vectors.train(experiment(bench.model, "uppercase"), training)
    wall = time.perf_counter() - start
    bench.add(
        f"soft vector: {result.evaluations} evaluations of 16 queries, seconds", [wall], unit="s"
    )


def one_by_one(ex: IclExperiment) -> float:
    """Seconds for the same with each run by itself, from a part of the runs."""
    m = ex.model
    means = ex.means("head_out", ex.dummies(2)).reshape(m.n_layer, m.n_head, -1)
    capture = Capture("head_out", -1)
    part = ex.dummies(4)
    start = time.perf_counter()
    for p in part:
        m.run([Request(p.tokens, captures=[capture], logits=None)])
    per_mean = (time.perf_counter() - start) / len(part)
    p = ex.dummies(1, wrong=True)[0]
    heads = [Head(layer, 0) for layer in range(0, m.n_layer, 3)]
    start = time.perf_counter()
    for head in heads:
        edit = head_edit(head, means[head])
        m.run([Request(p.tokens, [edit], metric=FirstToken(p.answers))])
    per_effect = (time.perf_counter() - start) / len(heads)
    return PROMPTS * per_mean + EFFECT_PROMPTS * (1 + m.n_layer * m.n_head) * per_effect
