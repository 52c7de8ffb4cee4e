"""mia: mechanistic interpretability on quantized GGUF models, through llama.cpp.

from mia import Capture, Edit, Model, Request

model = Model("smollm2")
run = Request(model.tokenize("The capital of France is"), captures=[Capture("l_out")])
result = model.run([run])[0]
result["l_out-14"]                      # (n_tokens, n_embd) float32
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> module; imported at first use, so that `import mia` takes no time
_WHERE = {
    "Capture": "mia.request",
    "Activations": "mia.io.activations",
    "Edit": "mia.edits",
    "EngineError": "mia.errors",
    "IclExperiment": "mia.methods.icl",
    "FileError": "mia.errors",
    "Hook": "mia.hooks",
    "LogitLens": "mia.lenses",
    "MiaError": "mia.errors",
    "Model": "mia.model",
    "ModelError": "mia.errors",
    "RangeError": "mia.errors",
    "Readout": "mia.lenses",
    "Request": "mia.request",
    "Result": "mia.request",
    "Sampling": "mia.request",
    "Site": "mia.sites",
    "SiteError": "mia.errors",
    "Steering": "mia.methods.steering",
    "UsageError": "mia.errors",
    "Vector": "mia.vectors",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from mia.edits import Edit as Edit
    from mia.errors import (
        EngineError as EngineError,
    )
    from mia.errors import (
        FileError as FileError,
    )
    from mia.errors import (
        MiaError as MiaError,
    )
    from mia.errors import (
        ModelError as ModelError,
    )
    from mia.errors import (
        RangeError as RangeError,
    )
    from mia.errors import (
        SiteError as SiteError,
    )
    from mia.errors import (
        UsageError as UsageError,
    )
    from mia.hooks import Hook as Hook
    from mia.io.activations import Activations as Activations
    from mia.lenses import LogitLens as LogitLens
    from mia.lenses import Readout as Readout
    from mia.methods.icl import IclExperiment as IclExperiment
    from mia.methods.steering import Steering as Steering
    from mia.model import Model as Model
    from mia.request import (
        Capture as Capture,
    )
    from mia.request import (
        Request as Request,
    )
    from mia.request import (
        Result as Result,
    )
    from mia.request import (
        Sampling as Sampling,
    )
    from mia.sites import Site as Site
    from mia.vectors import Vector as Vector


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mia' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
