"""mia: mechanistic interpretability on quantized GGUF models, through llama.cpp.

from mia import Edit, Model

m = Model("smollm2")
task = m.look(EXAMPLES, "l_out-21")[-1]             # activations of the last token
print(m.generate("Q: France\\nA:", 1, edits=[Edit("l_out-21", "replace", task, tokens=-1)]))
print(m.lens(m.look("Q: France\\nA:", "l_out"), k=3))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> module; imported at first use, so that `import mia` takes no time
_WHERE = {
    "Activations": "mia.io.activations",
    "Capture": "mia.request",
    "Changes": "mia.methods.changes",
    "Edit": "mia.edits",
    "EngineError": "mia.errors",
    "FileError": "mia.errors",
    "Generation": "mia.generation",
    "Head": "mia.ranges",
    "Hook": "mia.hooks",
    "IclExperiment": "mia.methods.icl",
    "LogitLens": "mia.lenses",
    "LogitDifference": "mia.request",
    "LogitSum": "mia.request",
    "MiaError": "mia.errors",
    "MiaWarning": "mia.notices",
    "Model": "mia.model",
    "ModelError": "mia.errors",
    "RangeError": "mia.errors",
    "Readout": "mia.lenses",
    "Report": "mia.show.report",
    "Request": "mia.request",
    "Result": "mia.request",
    "Sampling": "mia.request",
    "Site": "mia.sites",
    "SiteError": "mia.errors",
    "Steering": "mia.steering",
    "TaskSetup": "mia.methods.icl",
    "UsageError": "mia.errors",
    "TokenLogits": "mia.request",
    "Vector": "mia.vectors",
    "show_progress": "mia.progress",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from mia.edits import Edit as Edit
    from mia.errors import (
        EngineError as EngineError,
        FileError as FileError,
        MiaError as MiaError,
        ModelError as ModelError,
        RangeError as RangeError,
        SiteError as SiteError,
        UsageError as UsageError,
    )
    from mia.generation import Generation as Generation
    from mia.hooks import Hook as Hook
    from mia.io.activations import Activations as Activations
    from mia.lenses import LogitLens as LogitLens, Readout as Readout
    from mia.methods.changes import Changes as Changes
    from mia.methods.icl import IclExperiment as IclExperiment, TaskSetup as TaskSetup
    from mia.model import Model as Model
    from mia.notices import MiaWarning as MiaWarning
    from mia.progress import show_progress as show_progress
    from mia.ranges import Head as Head
    from mia.request import (
        Capture as Capture,
        LogitDifference as LogitDifference,
        LogitSum as LogitSum,
        Request as Request,
        Result as Result,
        Sampling as Sampling,
        TokenLogits as TokenLogits,
    )
    from mia.show.report import Report as Report
    from mia.sites import Site as Site
    from mia.steering import Steering as Steering
    from mia.vectors import Vector as Vector


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mia' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
