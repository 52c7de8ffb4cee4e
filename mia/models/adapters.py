"""LoRA adapters as a caller names them: a file, or a file and how much of it, "style.gguf=0.5"."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import ModelError, UsageError
from mia.io import runs
from mia.io.kinds import refuse_other_kind
from mia.llama.gguf_file import absolute, existing, is_file
from mia.notices import notice
from mia.values import shown

if TYPE_CHECKING:
    from mia.engine.run import Engine
    from mia.llama import AdapterFile
    from mia.llama.open_file import OpenFile

#: one file or several, each with a scale ("a.gguf=0.5") or without; or {file: scale}
Lora = str | Path | Sequence["str | Path"] | Mapping[str, float] | Mapping[Path, float]


@dataclass(frozen=True)
class AdapterFacts:
    """What results say of an adapter: its file, the hash of it, and its scale."""

    name: str
    scale: float
    sha256: str

    def document(self) -> dict[str, Any]:
        return {"file": self.name, "sha256": self.sha256, "scale": self.scale}


def named_adapters(lora: Lora | None) -> list[tuple[Path, float]]:
    """The files and their scales.

    Raises:
        UsageError: a scale is not a finite number, a file is there twice, or `lora` is of another type.
        ModelError: there is no such file.
    """
    if lora is None:
        return []
    if isinstance(lora, Mapping):
        named = [(Path(file), _scale(scale, file)) for file, scale in lora.items()]
    elif isinstance(lora, (str, Path)):
        named = [_named(lora)]
    elif isinstance(lora, Sequence) and all(isinstance(x, (str, Path)) for x in lora):
        named = [_named(x) for x in lora]
    else:
        raise UsageError(f"lora is a file, several, or {{file: scale}}, not {shown(lora)}")
    out = [(existing(absolute(os.fspath(path), Path())), scale) for path, scale in named]
    files = [path.resolve() for path, _ in out]
    if twice := next((p for i, p in enumerate(files) if p in files[:i]), None):
        raise UsageError(f"the adapter {twice} is given twice")
    return out


def _named(named: str | Path) -> tuple[Path, float]:
    """FILE or FILE=SCALE; what is a file as a whole is one."""
    path = str(named)
    if isinstance(named, Path) or "=" not in path or is_file(Path(path)):
        return Path(path), 1.0
    file, _, text = path.rpartition("=")
    if text.lower().endswith(".gguf"):
        return Path(path), 1.0
    try:
        scale = float(text)
    except ValueError:
        raise UsageError(f"the scale of the adapter {file} is {text!r}, not a number") from None
    return Path(file), _scale(scale, file)


def _scale(scale: Any, file: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise UsageError(f"the scale of the adapter {file} is {shown(scale)}, not a finite number")
    return float(scale)


def read_adapters(
    named: Sequence[tuple[Path, float]], model: OpenFile, *, as_name: str
) -> list[AdapterFile]:
    """Checks each file against the model's, before llama.cpp sees it. Raises `ModelError`."""
    from mia.llama import read_adapter

    out = []
    for path, scale in named:
        runs.reading(path)
        refuse_other_kind(path, "adapter", ModelError)
        out.append(read_adapter(path, scale, model, as_name=as_name))
    return out


def leave_out_unused(adapters: Sequence[AdapterFile], engine: Engine) -> None:
    """Forgets the matrices that llama.cpp's graph does not read, as some architectures multiply with
    some tensors in a way that adapters have no part in. A notice names them."""
    if not any(a.scale for a in adapters):
        return
    used = engine.topology().graph.adapted()
    for adapter in adapters:
        unused = [name for name in adapter.pairs if name not in used]
        for name in unused:
            del adapter.pairs[name]
        if adapter.scale and unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            notice(
                f"{adapter.path.name} has matrices that llama.cpp does not add in this "
                f"architecture: {', '.join(unused[:3])}{more}"
            )


def facts_of(adapters: Sequence[AdapterFile]) -> tuple[AdapterFacts, ...]:
    return tuple(AdapterFacts(a.path.name, a.scale, a.sha256()) for a in adapters)
