"""Random LoRA adapters for tiny models, and the oracle of the model with them merged into its weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from oracle import Oracle

from mia.llama.gguf_write import write_gguf

EMBEDDING = "token_embd.weight"


def metadata(architecture: str, **more: Any) -> dict[str, Any]:
    facts = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
    }
    return {**facts, "adapter.lora.alpha": 2.0, **more}


def write_lora(
    path: Path,
    oracle: Oracle,
    *,
    seed: int = 0,
    rank: int = 3,
    alpha: float = 2.0,
    only: Callable[[str], bool] = lambda name: True,
) -> Path:
    """An adapter of all matrices of a tiny model, but an embedding that is its unembedding too."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in names(oracle):
        if only(name):
            *lead, n_out, n_in = oracle.weights[name].shape
            shapes = [(*lead, rank, n_in), (*lead, n_out, rank)]
            if name == EMBEDDING:
                shapes = [(n_out, rank), (n_in, rank)]
            for part, shape in zip("ab", shapes, strict=True):
                x = 0.15 * rng.standard_normal(shape)
                tensors[f"{name}.lora_{part}"] = x.astype(np.float32)
    write_gguf(path, metadata(oracle.arch, **{"adapter.lora.alpha": alpha}), tensors)
    return path


def names(oracle: Oracle) -> list[str]:
    """The matrices that llama.cpp adds something to."""
    tied = "output.weight" not in oracle.weights
    left_out = {"position_embd.weight", *([EMBEDDING] if tied else [])}
    return [
        n
        for n, w in oracle.weights.items()
        if w.ndim > 1 and n not in left_out and "inp_sh" not in n
    ]


def merged(path: Path, adapters: Sequence[tuple[Path, float]]) -> Oracle:
    """The model with W + scale · alpha / rank · B A in place of each W."""
    import gguf

    oracle = Oracle(path)
    for file, scale in adapters:
        reader = gguf.GGUFReader(file)
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        parts = {t.name: np.array(t.data, np.float64) for t in reader.tensors}
        for name in {n[: -len(".lora_a")] for n in parts}:
            a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
            factor = scale * (alpha / b.shape[-1] if alpha else 1.0)
            added = a @ b.T if name == EMBEDDING else b @ a
            oracle.weights[name] = oracle.weights[name] + factor * added
    return oracle
