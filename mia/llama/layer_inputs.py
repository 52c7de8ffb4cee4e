"""Whether llama.cpp can keep the inputs of a model's blocks until a decode is over.

llama.cpp has a function for its speculative decoding, `llama_set_embeddings_layer_inp`, that
declares what goes into a block an output of the graph. ggml gives the memory of an output to no
other tensor, so it can be read behind the decode, with no stop of the graph.

The function is exported under its C++ name only, and it ends the process in architectures whose
graph does not say which tensors these are. So three things must be so:

1. The library has the function. (It has not where C++ names are made otherwise.)
2. The architecture is one of `ARCHITECTURES`.
3. A child process has opened a file of this architecture, on the CPU, asked for the inputs of all its
   blocks, built both graphs, and lived. Its verdict is remembered by library and architecture, in
   `layer_inputs.json` of `mia.io.files.cache_folder`; not what ended it from outside.

`MIA_LAYER_INPUTS=0` turns them off. Run as a program, this module is the child.
"""

from __future__ import annotations

import ctypes as C
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.llama import child
from mia.llama.verdicts import read_verdicts, write_verdicts

if TYPE_CHECKING:
    from mia.llama.model import LlamaModel

#: Architectures whose graph names the input of every block, one float32 row for each token, as far
#: as llama.cpp of llama-cpp-python 0.3.36. Not "deepseek4", which computes a mean in its place, nor
#: "qwen4exp", whose rows are several times as wide: llama.cpp ends the process there.
ARCHITECTURES = frozenset(
    {
        "bailingmoe3",
        "gemma4",
        "gpt-oss",
        "hunyuan-dense",
        "hunyuan_vl",
        "lfm2",
        "lfm2moe",
        "llama",
        "mimo2",
        "minimax-01",
        "minimax-m2",
        "muse-glimmer",
        "nanbeige",
        "nemotron_h",
        "nemotron_h_moe",
        "qwen3",
        "qwen35",
        "qwen35moe",
        "qwen3moe",
        "qwen3next",
    }
)

_FUNCTION = "_Z30llama_set_embeddings_layer_inpP13llama_contextjb"
_FILE = "layer_inputs.json"
_SECONDS = 60.0
#: signals that a process brings upon itself
_NAMES = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
_CRASHES = frozenset(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))


@cache
def keep_function() -> Any:
    """`llama_set_embeddings_layer_inp(context, block, whether)`, or None if the library has none."""
    from mia.llama.library import library

    function = getattr(library().base, _FUNCTION, None)
    if function is not None:
        function.restype, function.argtypes = None, [C.c_void_p, C.c_uint32, C.c_bool]
    return function


def can_keep_inputs(model: LlamaModel) -> bool:
    """Whether it is safe to call `keep_function` for blocks of this model. The first time that it is
    asked for an architecture, a child process finds out."""
    if os.environ.get("MIA_LAYER_INPUTS") == "0" or keep_function() is None:
        return False
    architecture = model.architecture
    return architecture in ARCHITECTURES and _verdict(architecture, str(model.file.path))


@cache
def _verdict(architecture: str, path: str) -> bool:
    """The remembered verdict, or the child's, which it remembers."""
    try:
        key, known = _key(architecture), read_verdicts(_FILE)
        if key in known:
            return known[key]
        code = child.run(_command(path), seconds=_SECONDS).code
    except OSError:
        return False
    if code == 0 or _is_crash(code):
        write_verdicts(_FILE, {**known, key: code == 0})
    return code == 0


def _is_crash(code: int | None) -> bool:
    """Whether a child's end was its own doing. Not Python's trouble (1, 2), a slow machine (None), a
    signal from outside (a lack of memory, Ctrl-C): then the next process asks again."""
    if sys.platform == "win32":
        return code not in (None, 0, 1, 2)
    return code is not None and -code in _CRASHES


def _key(architecture: str) -> str:
    """Version and file of the library, and the architecture: another of any of them is asked anew."""
    from mia.llama.library import library

    lib = library()
    file = Path(lib.L._lib._name)
    stat = file.stat()
    return f"{lib.version} {file.name}:{stat.st_size}:{stat.st_mtime_ns} {architecture}"


def _command(path: str) -> list[str]:
    return child.python("mia.llama.layer_inputs", str(Path(path).absolute()))


def main(path: str) -> int:
    """What the child does: builds the graphs with and without outputs; computes nothing."""
    from mia.llama.context import Context, ContextParams
    from mia.llama.model import LlamaModel

    child.prepare()
    model = LlamaModel(Path(path), extra_bufts=False)
    for flash in (True, False):
        params = ContextParams(
            n_ctx=256, n_ubatch=64, n_seq=2, flash=flash, kv_type="f16", threads=1, callback=True
        )
        context = Context(model, params)
        context.keep_inputs(range(model.n_layer), trusted=True)
        for last in (False, True):  # the tracer does not know these graphs, and lets nothing run
            context.decode([0, 0], [0, 1], [0, 0], [False, last])
            context.clear()
        context.close()
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
