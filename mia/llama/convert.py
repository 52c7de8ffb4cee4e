"""llama.cpp's own quantizer. Run as a program, this module is the process that it runs in."""

from __future__ import annotations

import ctypes as C
import sys
from pathlib import Path

from mia.errors import EngineError
from mia.llama import child
from mia.llama.c_numbers import c_path
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

    f32 is lossless. It runs in a child process, as llama.cpp has no way to stop it: on Ctrl-C the
    process is stopped. `target` is half-written then, and after an error.

    Raises:
        EngineError: llama.cpp refuses, or the disk is full.
    """
    arguments = str(source.absolute()), str(target.absolute()), kind, str(threads)
    outcome = child.run(child.python("mia.llama.convert", *arguments))
    if outcome.code == 0:
        return
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    why = lines[-1] if lines else ""
    if outcome.code != 1:
        why = f"it dies ({outcome.death})" + (f": {why}" if why else "")
    raise EngineError(f"llama.cpp cannot convert {source} to {kind}: {why}")


def _convert(source: Path, target: Path, kind: str, threads: int) -> str:
    """Returns what went wrong, or ""."""
    lib = library()
    p = lib.L.llama_model_quantize_default_params()
    p.ftype, p.nthread, p.allow_requantize = FILE_TYPES[kind], threads, True
    names = c_path(source), c_path(target)
    failed = lib.call(lib.L.llama_model_quantize, *names, C.byref(p), threads=threads)
    return (lib.last_error() or "no reason given") if failed else ""


if __name__ == "__main__":
    child.prepare()
    source, target, kind, threads = sys.argv[1:]
    problem = _convert(Path(source), Path(target), kind, int(threads))
    print(problem, file=sys.stderr)
    sys.exit(1 if problem else 0)
