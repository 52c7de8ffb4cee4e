"""The `large` group: models of the shapes of 1B to 8B Llamas with random weights (`shapes.py`).

Start-up, memory, the logit lens and a sweep of heads, each in a process of its own with one thread,
beside plain llama.cpp, in seconds of the processor: on a busy machine they mean more than those of
the clock. A sweep and a lens are also told as the tokens of plain prefill that take as long.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import MEGABYTE, ONE_THREAD, Bench
from benchmarks.shapes import model_file

N_PROMPT = 38
#: heads that a sweep takes at most; it is scaled up from these
N_HEADS = 256
#: what mia may take beside the file and the key-value cache
ALLOWANCE = 300 * MEGABYTE


def large(bench: Bench, folder: Path, sizes: Sequence[str], mixes: Sequence[str]) -> None:
    for size in sizes:
        for mix in mixes:
            measure(bench, model_file(folder, size, mix), f"{size} {mix}")


def measure(bench: Bench, path: Path, name: str) -> None:
    with path.open("rb") as file:  # into the page cache
        while file.read(64 << 20):
            pass
    turns = [(process("plain", path), process("start", path)) for _ in range(bench.rounds)]
    plain, ours = zip(*turns, strict=True)
    for stage, what in (
        ("ready", "open to ready"),
        ("first", f"open, {N_PROMPT} tokens, next token"),
    ):
        ratios = [a[stage]["cpu"] / b[stage]["cpu"] for a, b in zip(ours, plain, strict=True)]
        bench.add(f"{name}: {what} / plain llama.cpp", ratios, target=1.5, at_least=False)
    whole = process("whole", path)
    copies = whole["repacked"] / MEGABYTE
    if copies:
        bench.add(f"{name}: repacked copy of weights that llama.cpp keeps", [copies], unit="MB")
    memory(bench, f"{name}: peak memory up to the next token", path, ours[-1], "first")
    memory(bench, f"{name}: peak memory with checks of sites, lens and sweep", path, whole, "sweep")
    forward = median(p["first"]["cpu"] - p["ready"]["cpu"] for p in plain) / N_PROMPT  # of a token
    shape = whole["shape"]
    bench.add(f"{name}: checks of sites, once for a file", [cost(whole, "sites")], unit="s")
    what = f"{name}: lens, {shape['n_layer']} layers × {N_PROMPT} tokens"
    bench.add(f"{what}, beside the run", [cost(whole, "lens")], unit="s")
    floats = 2 * shape["n_layer"] * N_PROMPT * shape["n_vocab"] * shape["n_embd"]
    bench.add(f"{what}, GFLOP/s", [floats / cost(whole, "lens") / 1e9], unit="")
    n_heads = shape["n_layer"] * shape["n_head"]
    seconds = cost(whole, "sweep") * n_heads / shape["n_swept"]
    bench.add(f"{name}: sweep of {n_heads} heads at the last token", [seconds], unit="s")
    bench.add(
        f"{name}: in tokens of plain prefill, for a head", [seconds / forward / n_heads], unit=""
    )


def memory(bench: Bench, what: str, path: Path, found: dict[str, Any], stage: str) -> None:
    allowed = path.stat().st_size + found["cache"] + found["repacked"] + ALLOWANCE
    bench.add(
        what,
        [found[stage]["peak"] / MEGABYTE],
        unit="MB",
        target=round(allowed / MEGABYTE),
        at_least=False,
    )


def cost(found: dict[str, Any], stage: str) -> float:
    """Seconds of the processor that a stage took."""
    stages = list(_STAGES)
    return float(found[stage]["cpu"] - found[stages[stages.index(stage) - 1]]["cpu"])


def process(kind: str, path: Path) -> dict[str, Any]:
    """What a process of its own says of itself."""
    argv = [sys.executable, "-m", "benchmarks.large", kind, str(path)]
    env = {**os.environ, **ONE_THREAD}
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, env=env
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- in the process ----------------------------------------------------------------------------


def now() -> dict[str, float]:
    """Seconds of the processor and of the clock since the process began, and its most memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu": time.process_time(),
        "wall": time.perf_counter() - _START,
        "peak": usage.ru_maxrss * unit,
    }


_START = time.perf_counter()
TOKENS = [(7 + 13 * i) % 40_000 for i in range(N_PROMPT)]


def plain(path: str) -> dict[str, Any]:
    """llama-cpp-python's low-level functions and nothing else."""
    import ctypes

    import llama_cpp as L

    quiet = L.llama_log_callback(lambda *_: None)
    L.llama_log_set(quiet, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
    params = L.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    context = L.llama_init_from_model(model, params)
    found: dict[str, Any] = {"ready": now()}
    ids = (ctypes.c_int32 * N_PROMPT)(*TOKENS)
    L.llama_decode(context, L.llama_batch_get_one(ids, N_PROMPT))
    assert L.llama_get_logits_ith(context, -1)[0] != 0
    return {**found, "first": now()}


def ours(path: str, stages: Sequence[str]) -> dict[str, Any]:
    """mia, from its import to the last of the stages."""
    from mia.model import Model

    model = Model(path, threads=1)
    state: dict[str, Any] = {}
    found: dict[str, Any] = {"ready": now()}
    for stage in stages:
        _STAGES[stage](model, state)
        found[stage] = now()
    engine, cell = model._engine, 4 * model.n_layer * model.n_head_kv  # keys and values, two bytes
    head_dim = int(model.metadata["llama.attention.key_length"])
    cells = sum(s.context.n_ctx for s in engine.sessions.open.values())
    shape = {k: getattr(model, k) for k in ("n_layer", "n_embd", "n_head", "n_vocab")}
    return {
        **found,
        "cache": cells * cell * head_dim,
        "repacked": model._llama.repacked,
        "shape": {**shape, "n_swept": state.get("n_swept", 0)},
    }


def _first(model: Any, state: dict[str, Any]) -> None:
    from mia.request import Request

    logits = model.run([Request(TOKENS)])[0].logits
    state["next"] = int(logits[-1].argmax())


def _sites(model: Any, state: dict[str, Any]) -> None:
    from mia.models import algebra, claims

    algebra.algebra = claims.check  # what is remembered of the file is not asked
    if refused := model.site_checks.refused:
        raise SystemExit(f"bench: {model.name}: {refused}")


def _run(model: Any, state: dict[str, Any]) -> None:
    import numpy as np

    from mia.request import Capture, Request

    result = model.run([Request(TOKENS, captures=[Capture("resid_post")], logits=None)])[0]
    state["rows"] = np.concatenate(list(result.captures.values()))
    _ = model.lens  # holds itself against the model's logits


def _lens(model: Any, state: dict[str, Any]) -> None:
    model.lens.read(state.pop("rows"), 5)


def _sweep(model: Any, state: dict[str, Any]) -> None:
    from mia.methods.ablation import head_sweep
    from mia.ranges import Head

    n, n_head = model.n_layer, model.n_head
    step = max(n * n_head // N_HEADS, 1)
    layers = range(step // 2, n, step)
    heads = [Head(i, j) for i in layers for j in range(n_head)]
    state["n_swept"] = len(heads)
    head_sweep(model, TOKENS, [state["next"]], heads=heads)


_STAGES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "first": _first,
    "sites": _sites,
    "run": _run,
    "lens": _lens,
    "sweep": _sweep,
}


def main(kind: str, path: str) -> None:
    if kind == "plain":
        found = plain(path)
    else:
        found = ours(path, ["first"] if kind == "start" else list(_STAGES))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
