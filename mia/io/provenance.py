"""Provenance: what made a result, in documents and in files, and whether it was made elsewhere.

A document has it under `model`; a file has the same facts as strings in its metadata, with the
hash of the tokenizer and whatever arguments made the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.io.files import file_sha256
from mia.notices import notice
from mia.ranges import compact

if TYPE_CHECKING:
    from mia.llama.open_file import OpenFile
    from mia.model import Model
    from mia.models.adapters import AdapterFacts


@dataclass(frozen=True)
class ModelFacts:
    """Which model a result is of. The file is hashed when the hash is first asked for."""

    name: str
    path: Path
    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    #: the file as it was opened; by default whatever has the path
    file: OpenFile | None = field(default=None, compare=False, repr=False)
    #: the type that its weights were opened as, "" for the file's own
    as_type: str = ""
    #: what of its weights that loses, or why it is not the type that was asked for
    as_type_note: str = ""
    #: the adapters that were added to its weights
    lora: tuple[AdapterFacts, ...] = ()

    @cached_property
    def sha256(self) -> str:
        return file_sha256(self.path) if self.file is None else self.file.sha256()

    def document(self) -> dict[str, Any]:
        """The `model` entry of every document."""
        return {
            "name": self.name,
            "file": self.path.name,
            "sha256": self.sha256,
            "architecture": self.architecture,
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
            **self._as_type(),
            **({"lora": [a.document() for a in self.lora]} if self.lora else {}),
            **versions(),
        }

    def _as_type(self) -> dict[str, str]:
        known = {"as_type": self.as_type, "as_type_note": self.as_type_note}
        return {k: v for k, v in known.items() if v}

    def metadata(self) -> dict[str, str]:
        """The same for a file's metadata, as strings."""
        return {
            **versions(),
            "model": self.name,
            "model_file": self.path.name,
            "model_sha256": self.sha256,
            "architecture": self.architecture,
            "n_layer": str(self.n_layer),
            "n_embd": str(self.n_embd),
            "n_head": str(self.n_head),
            "n_head_kv": str(self.n_head_kv),
            **self._as_type(),
            **as_strings({"lora": [a.document() for a in self.lora]} if self.lora else {}),
        }


@dataclass(frozen=True)
class StoredFacts(ModelFacts):
    """What a saved result says of its model, which need not be here any more."""

    stored: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> StoredFacts:
        """From the `model` entry of a document. Raises `KeyError` for one that is none."""
        names = ("architecture", "n_layer", "n_embd")
        known = {name: document[name] for name in names}
        return cls(
            name=document["name"],
            path=Path(document["file"]),
            n_head=0,
            n_head_kv=0,
            as_type=document.get("as_type", ""),
            as_type_note=document.get("as_type_note", ""),
            stored=document,
            **known,
        )

    @property
    def sha256(self) -> str:
        return str(self.stored["sha256"])

    def document(self) -> dict[str, Any]:
        return dict(self.stored)


def versions() -> dict[str, str]:
    from mia import __version__
    from mia.llama import library_info

    return {"mia": __version__, "llama_cpp_python": library_info()["llama_cpp_python"]}


def as_strings(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts for a file's metadata; values that are not text become JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def data_metadata(paths: Sequence[Path], items: Sequence[int]) -> dict[str, str]:
    """What a vector says of the data that it was learned from: files, hashes, items."""
    return {
        "data": ", ".join(p.name for p in paths),
        "data_sha256": " ".join(map(file_sha256, paths)),
        "items": compact(items),
    }


#: items as `compact` writes them
_ITEMS = re.compile(r"\d{1,18}(\.\.\d{1,18})?(,\d{1,18}(\.\.\d{1,18})?)*")


# -- made elsewhere ----------------------------------------------------------------------


def warn_of_other_model(sources: Iterable[Mapping[str, str]], name: str, facts: ModelFacts) -> None:
    """A notice for each other model that something was made with.

    Args:
        sources: metadata of the file, or of each that arithmetic made it from.
        name: what to call it.
        facts: the model that it is now used with.
    """
    sources = list(sources)
    others = [
        s.get("model", "unknown")
        for s in sources
        if "model_sha256" in s and s["model_sha256"] != facts.sha256
    ]
    for other in dict.fromkeys(others):
        notice(f"{name} was made with another model, {other}")
    here = (
        facts.metadata().get("lora", "") if facts.lora or any("lora" in s for s in sources) else ""
    )
    if not others and any(s.get("lora", "") != here for s in sources if "model_sha256" in s):
        notice(f"{name} was made with other LoRA adapters on the model")


def warn_of_same_items(
    sources: Iterable[Mapping[str, str]], name: str, data: Path, items: Sequence[int]
) -> None:
    """A notice if a vector was trained on items that it is now evaluated on."""
    sha, overlaps = file_sha256(data), []
    for source in sources:
        text = source.get("items", "")
        if sha in source.get("data_sha256", "").split() and _ITEMS.fullmatch(text):
            # ends, not every index: a file can say what it likes
            ends = [[int(n) for n in part.split("..")] for part in text.split(",")]
            overlaps.append(compact([i for i in items if any(e[0] <= i <= e[-1] for e in ends)]))
    for overlap in dict.fromkeys(filter(None, overlaps)):
        notice(f"{name} was trained on items {overlap} of this evaluation; use held-out items")


def warn_of_other_task(metadata: Mapping[str, str], name: str, facts: Mapping[str, Any]) -> None:
    """A notice where a saved vector was made for another task, or with another seed or split.

    Args:
        facts: of the task that it is tried on, as `as_strings` reads them.
    """
    here = as_strings(facts)
    if metadata.get("task", here["task"]) != here["task"]:
        notice(f"{name} was made for the task {metadata['task']}")
        return
    keys = ("seed", "pairs", "known_of")
    other = [k for k in keys if metadata.get(k, here.get(k)) != here.get(k)]
    if other:
        notice(
            f"{name} was made with another {' and '.join(other)}: test queries may "
            "overlap its training data; use the same seed, split and known pairs"
        )


def opened(model: Model) -> dict[str, Any]:
    """What the document of a run says of the model that it opened. The hash is a function: of a
    large file it takes longer than opening it."""
    facts = model.facts
    return {
        "name": model.name,
        "sha256": lambda: facts.sha256,
        "file_type": model.metadata.get("general.file_type"),
        "kv_type": model.kv_type,
        "ctx": model.n_ctx,
        "threads": model.threads,
        **({} if model.copy is None else {"as_type": model.copy.type}),
        **({"lora": [a.document() for a in facts.lora]} if facts.lora else {}),
    }


def setup(model: Model) -> dict[str, Any]:
    """What may change the last digits of a result: versions, the build of llama.cpp, whether its
    extra weight buffers are on, the processor, the RPC servers if there are some."""
    from mia.llama.probe import extra_buffers_safe, processor_name

    return {
        **versions(),
        "build": _build(),
        "extra_buffers": extra_buffers_safe(),
        "processor": processor_name(),
        **({"rpc": model.rpc} if model.rpc else {}),
    }


def _build() -> str:
    """A hash over llama.cpp's library files."""
    from importlib.util import find_spec

    from mia.io.files import file_sha256

    package = find_spec("llama_cpp")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "lib"
    files = {p.resolve() for p in folder.glob("*") if p.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]
