"""llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes as C
from pathlib import Path

from mia.errors import EngineError
from mia.llama.library import library

#: names of whole-file types -> llama_ftype
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q4_0": 2,
    "q4_1": 3,
    "q4_k_m": 15,
    "q6_k": 18,
}


def convert_file(source: Path, target: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantizer: writes `source` with its weights as `kind` (see `FILE_TYPES`).

    f32 is lossless. Raises `EngineError` if llama.cpp refuses.
    """
    lib = library()
    p = lib.L.llama_model_quantize_default_params()
    p.ftype, p.nthread, p.allow_requantize = FILE_TYPES[kind], threads, True
    if lib.L.llama_model_quantize(str(source).encode(), str(target).encode(), C.byref(p)) != 0:
        raise EngineError(f"llama.cpp cannot convert {source} to {kind}: {lib.last_error()}")
