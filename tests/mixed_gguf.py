"""Model files made of two: some tensors of one, the others of another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def mixed(base: Path, other: Path, target: Path, chosen: Callable[[str], bool]) -> Path:
    """Writes `base` with the chosen tensors as `other` has them, types and all."""
    return _written(base, target, lambda t, read: read(t.name) if chosen(t.name) else t, other)


def perturbed(
    base: Path, target: Path, chosen: Callable[[str], bool], *, size: float, seed: int = 0
) -> Path:
    """Writes `base`, whose chosen tensors are F16 or F32, with noise of `size` times their standard
    deviation: a finetune of a few tensors, as far as files go."""
    rng = np.random.default_rng(seed)

    def changed(t: Any, read: Callable[[str], Any]) -> Any:
        if not chosen(t.name):
            return t
        noise = rng.standard_normal(t.data.shape) * float(t.data.astype(np.float32).std()) * size
        t = t._replace(data=(t.data + noise).astype(t.data.dtype))
        return t

    return _written(base, target, changed, base)


def of_layer(layer: int) -> Callable[[str], bool]:
    """Chooses the matrices of one layer."""
    return lambda name: name.startswith(f"blk.{layer}.") and "norm" not in name


def _written(
    base: Path, target: Path, choose: Callable[[Any, Callable[[str], Any]], Any], other: Path
) -> Path:
    reader, others = gguf.GGUFReader(base), {t.name: t for t in gguf.GGUFReader(other).tensors}
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        t = choose(tensor, others.__getitem__)
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
