"""What a model's type does to a map of 720 patches: its correlation with the exact map, and CPU seconds.

    python scripts/experiments/types.py [MODEL] [-t THREADS] [--rounds N]

The residual stream at the end of each block, at each token of a clean prompt, is put into a corrupted one;
the effect is on a difference of two logits. This is done with a clean prompt whose patches change much, and
with one whose patches change little. The same weights are run as the file has them, converted to
q8_0, and as copies in f16 and f32. The exact map is that of f32. Times are of one map, medians of rounds in
which the types take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mia import Capture, Edit, MiaWarning, Model, Request
from mia.models.reports import convert
from mia.sites import Site

CORRUPTED = "When Mary and John went to the store to buy some fresh milk for the old neighbours, Mary gave it all to"
#: what the clean prompt differs in: the milk has little to do with who is given it, the giver decides
CLEAN = {
    "small effects": CORRUPTED.replace("milk", "bread"),
    "large effects": CORRUPTED.replace("Mary gave", "John gave"),
}
ANSWERS = (" Mary", " John")


def patches(m: Model, clean: list[int], corrupted: list[int]) -> list[Request]:
    """The corrupted prompt, then a patch of each layer and token."""
    good, bad = (m.token_id(text) for text in ANSWERS)

    def difference(logits: np.ndarray) -> float:
        return float(logits[-1, good] - logits[-1, bad])

    sites = [Site("resid_post", i) for i in range(m.n_layer)]
    rows = m.run([Request(clean, captures=[Capture(sites)], logits=None)])[0].captures
    changes = [Edit(s, "replace", rows[s][t], tokens=t) for s in sites for t in range(len(clean))]
    return [
        Request(corrupted, [*edits], metric=difference) for edits in ([], *([e] for e in changes))
    ]


def effects(m: Model, requests: list[Request]) -> np.ndarray:
    """(n_patches,) what each patch adds to the difference."""
    values = np.array([r.value for r in m.run(requests)])
    return values[1:] - values[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    o = parser.parse_args()
    warnings.simplefilter("ignore", MiaWarning)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        convert(o.model, "q8_0", str(folder / "q8.gguf"))
        models = {
            "as it is": Model(o.model, bos=True, threads=o.threads),
            "q8_0": Model(folder / "q8.gguf", bos=True, threads=o.threads),
            "f16 copy": Model(o.model, bos=True, threads=o.threads, as_type="f16"),
            "f32 copy": Model(o.model, bos=True, threads=o.threads, as_type="f32"),
        }
        for m in models.values():
            stack.enter_context(m)
        for what, clean in CLEAN.items():
            print(f"{what}: {clean!r}", *table(models, clean, o.rounds), sep="\n", flush=True)


def table(models: dict[str, Model], clean_text: str, rounds: int) -> list[str]:
    maps: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, m in models.items():
            clean, corrupted = m.ids(clean_text), m.ids(CORRUPTED)
            assert len(clean) == len(corrupted)
            requests = patches(m, clean, corrupted)
            start = time.process_time()
            maps[name] = effects(m, requests)
            seconds[name].append(time.process_time() - start)
    exact = maps["f32 copy"]
    lines = [
        f"{len(clean)} tokens, {len(exact)} patches; standard deviation of effects {exact.std():.2f}",
        "| type | correlation with f32 | mean error | CPU seconds |\n|---|---|---|---|",
    ]
    for name, effect in maps.items():
        r, error = np.corrcoef(effect, exact)[0, 1], np.abs(effect - exact).mean()
        lines.append(f"| {name} | {r:.4f} | {error:.3f} | {np.median(seconds[name]):.1f} |")
    return lines


if __name__ == "__main__":
    main()
