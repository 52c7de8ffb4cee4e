"""What baked removals are worth: on every architecture, and beside the edits in the callback.

    python scripts/experiments/bake.py architectures FOLDER     # a line for each .gguf of a folder
    python scripts/experiments/bake.py speed MODEL [-t THREADS] [--rounds N]
    python scripts/experiments/bake.py functions MODEL          # which edits are the same function

`architectures` removes a random direction from attn_out and mlp_out of all layers, as a LoRA and as a
model, and prints KL(edit || baked) / KL(plain || edit), whether a norm stands behind the matrices, and whether
the model with the adapter still has all its sites. `speed` is CPU time of a decode of 64 tokens, in
which plain, adapter and edits take turns. `functions` is the mean KL per token of neutral text between
the same direction projected out at the ends of blocks, of what is written, and of the whole stream.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from mia import Edit, MiaError, MiaWarning, Model, Request
from mia.bake.changes import Baked
from mia.bake.checks import neutral_texts
from mia.bake.files import write_lora
from mia.measure.losses import log_softmax
from mia.methods import bake
from mia.methods.bake_reports import Kind


def removals(m: Model, sites: list[str]) -> list[Edit]:
    r = np.random.default_rng(0).standard_normal(m.n_embd).astype(np.float32)
    return [Edit(site, "project_out", r) for site in sites]


def written(m: Model) -> list[str]:
    return [str(s) for s in m.topology.sites if s.name in ("attn_out", "mlp_out")]


def architectures(folder: Path, threads: int) -> None:
    def texts(m: Model) -> list[list[int]]:
        return [[(7 + 3 * i) % m.n_vocab for i in range(10)]]

    vars(bake)["neutral_texts"] = texts  # these models have no words
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "baked.gguf"
        for path in sorted(folder.glob("*.gguf")):
            try:
                with Model(path, threads=threads) as m:
                    print(path.stem, *(_one(m, out, kind) for kind in ("lora", "model")), sep="  ")
            except MiaError as err:
                print(path.stem, f"{err}"[:100], sep="  ")


def _one(m: Model, out: Path, kind: Kind) -> str:
    try:
        report = bake.bake(m, removals(m, written(m)), out, kind=kind)
    except MiaError as err:
        return f"{kind}: {err}"[:100]
    check = report.checks[0]
    text = f"{kind}: {check.edit_baked:.2g}/{check.plain_edit:.2g}"
    if report.notes:
        text += " (norms behind)"
    if kind == "lora":
        with m.reopened(lora=out) as adapted:
            lost = {str(s) for s in m.topology.sites} - {str(s) for s in adapted.topology.sites}
        text += f" lost sites: {sorted(lost)}" if lost else ""
    return text


def speed(model: str, threads: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Model(model, threads=threads) as m:
        edits, file = removals(m, written(m)), Path(folder) / "lora.gguf"
        write_lora(file, m, Baked(m, edits), {})
        ends = removals(m, [f"resid_post.{i}" for i in range(m.n_layer)])
        with m.reopened(lora=file) as adapted:
            variants = {
                "plain": (m, []),
                "adapter": (adapted, []),
                f"{len(edits)} edits of what is written": (m, edits),
                f"{len(ends)} edits at the ends of blocks": (m, ends),
            }
            times: dict[str, list[float]] = {name: [] for name in variants}
            for i in range(rounds + 1):
                for name, (opened, e) in variants.items():
                    start = time.process_time()
                    request = Request(range(16), e, n_predict=64, logits=None, stop_at_eog=False)
                    opened.run([request])
                    if i:
                        times[name].append(time.process_time() - start)
    plain = np.array(times["plain"])
    for name, seconds in times.items():
        print(f"{name:36s} {np.median(plain / np.array(seconds)):.3f} of plain's speed")


def functions(model: str, threads: int) -> None:
    with Model(model, threads=threads) as m:
        layers = range(m.n_layer)
        ends = removals(m, [f"resid_post.{i}" for i in layers])
        writes = removals(m, written(m))
        whole = removals(m, ["resid_pre.0", *written(m)])
        stream = ["resid_pre.0", *(f"{s}.{i}" for i in layers for s in ("resid_mid", "resid_post"))]
        variants = [[], ends, writes, whole, removals(m, stream)]
        total, count = np.zeros((5, 5)), 0
        for text in neutral_texts(m)[:4]:
            results = m.run([Request(text, e, logits="all") for e in variants])
            logp = [log_softmax(r.logits) for r in results if r.logits is not None]
            for i, p in enumerate(logp):
                total[i] += [float((np.exp(p) * (p - q)).sum()) for q in logp]
            count += len(logp[0])
    names = ["plain", "ends of blocks", "written", "written and embedding", "whole stream"]
    for i, j in ((0, 1), (1, 2), (1, 3), (4, 3)):
        print(f"KL({names[i]} || {names[j]}) = {total[i, j] / count:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["architectures", "speed", "functions"])
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    warnings.simplefilter("ignore", MiaWarning)
    if o.what == "architectures":
        architectures(Path(o.model), o.threads)
    elif o.what == "speed":
        speed(o.model, o.threads, o.rounds)
    else:
        functions(o.model, o.threads)


if __name__ == "__main__":
    main()
