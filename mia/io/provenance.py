"""Provenance: what made a result, in documents and in files, and whether it was made elsewhere.

A document has it under `model`; a file has the same facts as strings in its metadata, with the
hash of the tokenizer and whatever arguments made the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mia.io.files import file_sha256
from mia.notices import notice
from mia.ranges import compact, indices


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

    @cached_property
    def sha256(self) -> str:
        return file_sha256(self.path)

    def document(self) -> dict[str, Any]:
        """The `model` entry of every document."""
        return {
            "name": self.name,
            "file": self.path.name,
            "sha256": self.sha256,
            "architecture": self.architecture,
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
            **versions(),
        }

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
        }


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
_ITEMS = re.compile(r"\d+(\.\.\d+)?(,\d+(\.\.\d+)?)*")


# -- made elsewhere ----------------------------------------------------------------------


def warn_of_other_model(sources: Iterable[Mapping[str, str]], name: str, facts: ModelFacts) -> None:
    """A notice for each other model that something was made with.

    Args:
        sources: metadata of the file, or of each that arithmetic made it from.
        name: what to call it.
        facts: the model that it is now used with.
    """
    others = [
        s.get("model", "unknown")
        for s in sources
        if s.get("model_sha256", facts.sha256) != facts.sha256
    ]
    for other in dict.fromkeys(others):
        notice(f"{name} was made with another model, {other}")


def warn_of_same_items(
    sources: Iterable[Mapping[str, str]], name: str, data: Path, items: Sequence[int]
) -> None:
    """A notice if a vector was trained on items that it is now evaluated on."""
    sha, overlaps = file_sha256(data), []
    for source in sources:
        text = source.get("items", "")
        if sha in source.get("data_sha256", "").split() and _ITEMS.fullmatch(text):
            learned = set(indices(text, 1 << 62))
            overlaps.append(compact([i for i in items if i in learned]))
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
