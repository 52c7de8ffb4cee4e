"""Files of baked edits: a LoRA adapter, a model with changed matrices, a control vector."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array
from mia.bake.changes import Baked, Change, changed
from mia.errors import UsageError
from mia.llama.gguf_file import kv_spans
from mia.llama.gguf_write import Value, write_gguf

if TYPE_CHECKING:
    from mia.model import Model

_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
#: bytes of the metadata that the check's numbers are written into, once they are known
_ROOM = 1000
#: numbers of a matrix that are changed and quantized at a time
_BLOCK = 1 << 24
#: key of the metadata
CHECK = "mia.bake.check"


def write_lora(path: Path, model: Model, baked: Baked, metadata: Mapping[str, Value]) -> None:
    """Writes a LoRA adapter. Raises `UsageError` for what an adapter cannot hold."""
    tensors: dict[str, Array] = {}
    ranks = {c.rank for c in baked.changes.values() if c.left}
    for name, change in baked.changes.items():
        if not change.left:
            continue
        _check_lora(model, change)
        left, right = (x.astype(np.float32) for x in change.factors())
        if change.kind == "table":  # looked up by rows: A and B change places
            left, right = np.ascontiguousarray(right.T), left
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = right, left
    alpha = (
        float(ranks.pop()) if len(ranks) == 1 else 0.0
    )  # alpha / rank is 1; 0 stands for that too
    facts: dict[str, Value] = {
        "general.type": "adapter",
        "general.architecture": model.architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        **metadata,
    }
    write_gguf(path, facts, tensors, own=True)


def _check_lora(model: Model, change: Change) -> None:
    name = change.tensor
    if change.kind == "bias":
        raise UsageError(
            f"{name} writes along the direction too, and a LoRA changes no bias; kind model does"
        )
    if change.kind == "table" and name != _EMBEDDING:
        raise UsageError(f"{name} is a table, to which a LoRA adds nothing; kind model changes it")
    if change.kind == "table" and _OUTPUT not in model.weights:
        raise UsageError(
            f"{model.name} uses its embedding as its unembedding as well: a LoRA of it ends "
            "llama.cpp's process; kind model keeps both"
        )


def write_model(
    path: Path,
    model: Model,
    baked: Baked,
    metadata: Mapping[str, Value],
    weight_type: str | None = None,
) -> None:
    """Writes the model's own file with the changed tensors, each requantized to its type.

    If the embedding is changed and is the unembedding too, the old one is kept as that.

    Args:
        weight_type: "f32", "f16", "bf16" or "q8_0" for the changed matrices.
    """
    from mia.llama import NewRows, copy_gguf

    new, duplicated = {}, {}
    for name, change in baked.changes.items():
        if change.left:
            kind = TYPES[weight_type] if weight_type and change.kind != "bias" else None
            new[name] = NewRows(partial(_rows, model, change), kind)
    if _EMBEDDING in new and _OUTPUT not in model.weights:
        duplicated[_OUTPUT] = _EMBEDDING
    copy_gguf(model.weights.file, path, metadata, new, duplicated)


#: ggml's numbers of the types that changed matrices can have
TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}


def _rows(model: Model, change: Change) -> Iterable[Array]:
    *lead, n_in = model.weights.shape(change.tensor)
    n = int(np.prod(lead, dtype=int))
    per = lead[-1] if change.kind == "experts" else n
    size = max(_BLOCK // n_in, 1)
    for first in range(0, n, per):
        for start in range(first, first + per, size):
            yield changed(model.weights, change, start, min(start + size, first + per))


# -- what a file says of itself --------------------------------------------------------------


def room_for_check() -> dict[str, Value]:
    """Metadata whose text is written when the file has been checked."""
    return {CHECK: " " * _ROOM}


def write_check(path: Path, numbers: Mapping[str, object]) -> None:
    """Puts the check's numbers into the room that was left for them."""
    text = json.dumps(numbers).encode()
    assert len(text) <= _ROOM
    with path.open("rb+") as f:
        end = next(end for key, _, end in kv_spans(f.fileno()) if key == CHECK)
        f.seek(end - _ROOM)
        f.write(text.ljust(_ROOM))
