"""llama.cpp, reached through ctypes: the one package that knows what its memory looks like.

The other packages import from here, and light things by their module's name
(`mia.llama.gguf_file`, `.gguf_write`, `.weights`, `.probe`). The names below are loaded at
first use, so that a look at a file's header takes neither ctypes nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mia.llama.adapter import AdapterFile, read_adapter
    from mia.llama.context import CACHE_TYPES, Context, ContextParams
    from mia.llama.convert import FILE_TYPES, convert_file
    from mia.llama.gguf_copy import NewRows, copy_gguf
    from mia.llama.gguf_file import FileTensor
    from mia.llama.gguf_tensors import (
        dequantize,
        file_strings,
        file_tensors,
        type_bytes,
        type_name,
    )
    from mia.llama.interrupts import Held
    from mia.llama.library import give_back_memory, library_info
    from mia.llama.model import LlamaModel
    from mia.llama.sampler import Sampler
    from mia.llama.tensors import Node, describe, host_array, is_output, read_array, rows_of
    from mia.llama.tracer import Tracer
    from mia.llama.watch import Change

#: name -> its module
_MODULES = {
    "AdapterFile": "adapter",
    "CACHE_TYPES": "context",
    "FILE_TYPES": "convert",
    "Change": "watch",
    "Context": "context",
    "ContextParams": "context",
    "FileTensor": "gguf_file",
    "Held": "interrupts",
    "LlamaModel": "model",
    "NewRows": "gguf_copy",
    "Node": "tensors",
    "Sampler": "sampler",
    "Tracer": "tracer",
    "convert_file": "convert",
    "copy_gguf": "gguf_copy",
    "dequantize": "gguf_tensors",
    "describe": "tensors",
    "file_strings": "gguf_tensors",
    "file_tensors": "gguf_tensors",
    "give_back_memory": "library",
    "host_array": "tensors",
    "is_output": "tensors",
    "library_info": "library",
    "read_adapter": "adapter",
    "read_array": "tensors",
    "rows_of": "tensors",
    "type_bytes": "gguf_tensors",
    "type_name": "gguf_tensors",
}
__all__ = [
    "CACHE_TYPES",
    "FILE_TYPES",
    "AdapterFile",
    "Change",
    "Context",
    "ContextParams",
    "FileTensor",
    "Held",
    "LlamaModel",
    "NewRows",
    "Node",
    "Sampler",
    "Tracer",
    "convert_file",
    "copy_gguf",
    "dequantize",
    "describe",
    "file_strings",
    "file_tensors",
    "give_back_memory",
    "host_array",
    "is_output",
    "library_info",
    "read_adapter",
    "read_array",
    "rows_of",
    "type_bytes",
    "type_name",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
