"""Doctor: what llama.cpp can do on this machine, and what would make a model faster or safer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mia.show.report import Report

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model

#: types of weights that llama.cpp multiplies row by row on a CPU
_ROW_BY_ROW = ("q4_1", "q5_0", "q5_1")


@dataclass(frozen=True, eq=False)
class Doctor(Report):
    """The build of llama.cpp, how a model runs on it, and advice.

    Attributes:
        library: `library_info()`: version, features, GPU offload, who answers the callback.
        extra_buffers: whether llama.cpp's extra weight buffers (AMX, repacking) are on.
        weight_types: of the model's matrices.
        kv_type: of its cache.
        advice: what to do, a sentence each.
    """

    facts: ModelFacts
    library: dict[str, str]
    extra_buffers: bool
    threads: int
    weight_types: list[str]
    kv_type: str
    advice: list[str]

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "features": self.library["features"],
            "gpu": self.library["gpu"],
            "callback": self.library["callback"],
            "extra_buffers": self.extra_buffers,
            "threads": self.threads,
            "weight_types": self.weight_types,
            "kv_type": self.kv_type,
            "advice": self.advice,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One record."""
        document = self.document()
        types, advice = ", ".join(self.weight_types), "; ".join(self.advice)
        return [{**document, "model": self.facts.name, "weight_types": types, "advice": advice}]

    def plain(self) -> str:
        library, facts = self.library, self.facts
        buffers = "on" if self.extra_buffers else "off"
        advice = self.advice or ["nothing to improve was found"]
        return "\n".join(
            [
                f"llama-cpp-python {library['llama_cpp_python']}; {library['features']}",
                f"GPU offload: {library['gpu']}; extra buffers (AMX, repacking): {buffers}; "
                f"callback: {library['callback']}",
                f"{facts.name}: {facts.architecture}, weights {', '.join(self.weight_types)}, "
                f"KV cache {self.kv_type}, {self.threads} threads",
                *(f"- {line}" for line in advice),
            ]
        )


def doctor(model: Model) -> Doctor:
    """Looks at the build of llama.cpp and at how a model runs on it."""
    from mia.llama import library_info
    from mia.llama.probe import extra_buffers_safe

    library, extra_buffers = library_info(), extra_buffers_safe()
    types = _weight_types(model)
    advice = []
    if "AMX_INT8 = 1" in library["features"] and not extra_buffers:
        advice.append(
            "AMX crashes in this build of llama.cpp: rebuild it with -fno-tree-dse -fno-dse "
            "(scripts/demo does)"
        )
    if library["callback"] == "Python" and os.environ.get("MIA_NATIVE") != "0":
        advice.append(
            "the callback is answered by Python, several hundredths slower per token: install mia "
            "again where there is a C compiler"
        )
    slow = [t for t in types if t in _ROW_BY_ROW]
    if slow:
        advice.append(
            f"{', '.join(slow)} weights have no matrix-matrix kernel on a CPU: many rows at once "
            f"run faster as q4_0, q8_0 or f32: mia models convert {model.name} f32 FILE"
        )
    return Doctor(
        facts=model.facts,
        library=library,
        extra_buffers=extra_buffers,
        threads=model.threads,
        weight_types=types,
        kv_type=model.kv_type,
        advice=advice,
    )


def _weight_types(model: Model) -> list[str]:
    """The types of the matrices that the graph multiplies with, sorted."""
    topology = model.topology
    weights = (n.src[0] for n in topology.nodes if n.op == "MUL_MAT")
    return sorted({topology.node(w).type for w in weights if topology.is_leaf(w)})
