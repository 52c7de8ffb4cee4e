"""Does the blame name the layer that was changed? One file for each layer and kind of change.

    python scripts/experiments/diff_layers.py [MODEL] [-t THREADS] [--tokens N] [--layers 0,15,29]
        [--kinds coarse,mixed,finetune]

The base is MODEL as f16. In the other file the matrices of one layer are another layer's type or have other
weights:

    coarse      as q4_0, all else as the base
    mixed       as q4_0, all else as q8_0
    finetune    plus noise of a hundredth of their standard deviation, all else as the base

Printed for each: the place named first, its KL alone, the next one's, the layer with the largest error of
its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from mia import MiaWarning, Model
from mia.methods.blame import blame
from mia.models.reports import convert

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from mixed_gguf import mixed, of_layer, perturbed

TEXT = """\
The river runs down to the sea. In the old town by its mouth, the market opens at seven: bread, fish, \
apples from the hills, and, on Fridays, a man who sells clocks that he has repaired himself. "They keep \
better time than new ones," he says, and smiles. The capital of France is Paris, and that of Japan is Tokyo."""


def other_file(folder: Path, base: Path, kind: str, layer: int) -> Path:
    target = folder / "other.gguf"
    if kind == "finetune":
        return perturbed(base, target, of_layer(layer), size=0.01)
    rest = base if kind == "coarse" else folder / "q8_0.gguf"
    return mixed(rest, folder / "q4_0.gguf", target, of_layer(layer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", default="")
    parser.add_argument("--kinds", default="coarse,mixed,finetune")
    o = parser.parse_args()
    warnings.simplefilter("ignore", MiaWarning)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base.gguf"
        convert(o.model, "f16", str(base))
        for kind in ("q4_0", "q8_0"):
            convert(str(base), kind, str(folder / f"{kind}.gguf"))
        with Model(base, threads=o.threads) as a:
            ids = a.tokenize(TEXT, bos=True)[: o.tokens]
            layers = [int(i) for i in o.layers.split(",")] if o.layers else range(a.n_layer)
            for kind in o.kinds.split(","):
                firsts = errors = 0
                for layer in layers:
                    with Model(other_file(folder, base, kind, layer), threads=o.threads) as b:
                        r = blame(a, b, ids, range(len(ids) // 2, len(ids)), parts=False)
                    first, second = r.ranked()[:2]
                    coarsest = r.coarsest()
                    firsts += first.layer == layer
                    errors += coarsest is not None and coarsest.layer == layer
                    print(
                        f"{kind:8s} layer {layer:2d}: first {first.place:11s} {first.alone:.2e}, then "
                        f"{second.place:11s} {second.alone:.2e}; floor {r.floor_a:.1e}; largest own error: "
                        f"{'none' if coarsest is None else coarsest.place}",
                        flush=True,
                    )
                print(f"{kind}: named first {firsts} of {len(layers)}, largest own error {errors}")


if __name__ == "__main__":
    main()
