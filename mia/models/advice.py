"""Advice to open a model as f16, where small effects would drown in the rounding of its type."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import TYPE_CHECKING

from mia.errors import MiaError
from mia.io import files
from mia.models import copies
from mia.models.algebra import file_key
from mia.models.examination import available_memory, noise_floor, weight_types

if TYPE_CHECKING:
    from mia.model import Model

#: of how many files the noise is kept
_REMEMBERED = 256


def advice(model: Model) -> str:
    """One line about the noise of a model whose type rounds activations to 8 bits, if an f16 copy of it
    fits twice into the memory that is free, and on the disk; else "".

    The noise is what changes by 1e-5 of a row move (`mia.measure.noise`). It is measured once, which
    takes about as long as two dozen short requests, and remembered for the file.
    """
    rounding = [t for t in weight_types(model) if t not in copies.TYPES]
    if not rounding or model.copy is not None:
        return ""
    size = copies.bytes_as(model.path, "f16")
    if 2 * size > available_memory() or not copies.has_room(size):
        return ""
    noise = _noise(model)
    if noise is None:
        return ""
    return (
        f"weights of {' and '.join(rounding)} round activations to 8 bits: on {model.name}, changes "
        f"by 1e-5 move log-probabilities by up to {noise:.2g} nats; an f16 copy of the weights "
        f"({size / 1e6:.0f} MB, made once) takes most of this noise away"
    )


def _noise(model: Model) -> float | None:
    """Nats; None if it cannot be measured on this model."""
    file = files.cache_folder() / "noise" / f"{file_key(model)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        known = float(json.loads(file.read_text(encoding="utf-8"))["nats"])
        if math.isfinite(known):
            return known
    if not model.topology.has_residuals:
        return None
    try:
        noise = noise_floor(model)
    except MiaError:
        return None
    if not math.isfinite(noise):
        return None
    files.remember(file, {"nats": noise}, keep=_REMEMBERED)
    return noise
