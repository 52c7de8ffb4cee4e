"""What a file is, read off its first bytes, for a message when another kind is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mia.errors import FileError, MiaError

Kind = Literal[
    "capture", "vector", "soft vector", "model", "weights", "maps", "adapter", "array", "document"
]

#: kind -> what it is called, and what reads it
_WORDS: dict[Kind, tuple[str, str]] = {
    "capture": ("a capture of activations", "mia patch reads it"),
    "vector": ("a vector", "mia steer and mia vector read it"),
    "soft vector": ("a soft vector", "mia soft-vector eval reads it"),
    "model": ("a model", "it can be the model of every command"),
    "weights": ("a model's weights in safetensors", "mia reads models as GGUF"),
    "maps": ("attention maps of mia attention", "numpy reads them through safetensors"),
    "adapter": ("a LoRA adapter", "a model takes it as a LoRA"),
    "array": ("a numpy array", "mia patch and mia vector read it"),
    "document": ("a JSON document", ""),
}
#: what else is read where a kind is needed
_ALSO: dict[Kind, set[Kind]] = {"capture": {"array"}, "vector": {"array"}}
_HEAD = 1 << 16
_MOST = 1 << 26  # of a safetensors header


def kinds_of(path: str | Path) -> set[Kind]:
    """What a file is; a capture of one token is a vector too. Empty where it is not known, or
    is no file that can be read."""
    try:
        if not Path(path).is_file():  # a pipe could be waited for without end
            return set()
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
            n = int.from_bytes(head[:8], "little")
            if head[8:9] == b"{" and n < _MOST:
                return _of_tensors(json.loads((head[8:] + file.read(max(0, n - _HEAD + 8)))[:n]))
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return set()
    if head.startswith(b"GGUF"):
        return _of_gguf(head)
    if head.startswith(b"\x93NUMPY"):
        return {"array"}
    return {"document"} if re.match(rb"\s*[{\[]\s*[\"{\[]", head) else set()


def refuse_other_kind(path: str | Path, needed: Kind, error: type[MiaError] = FileError) -> None:
    """Raises an error if a file is known to be of another kind than the needed one."""
    kinds = kinds_of(path)
    if kinds and not kinds & {needed, *_ALSO.get(needed, set())}:
        raise error(f"{path} is {described(kinds)}; {_WORDS[needed][0]} is needed here")


def described(kinds: set[Kind]) -> str:
    """What a file is and what reads it: "a vector (mia steer and mia vector read it)"."""
    what, reads = _WORDS[min(kinds)]
    return f"{what} ({reads})" if reads else what


def _of_tensors(header: Mapping[str, Any]) -> set[Kind]:
    entries = {name: info for name, info in header.items() if name != "__metadata__"}
    if not all(isinstance(e, dict) and isinstance(e.get("shape"), list) for e in entries.values()):
        return set()
    shapes = {name: info["shape"] for name, info in entries.items()}
    if shapes.keys() >= {"means", "weights"}:
        return {"soft vector"}
    if shapes and shapes.keys() <= {"attention", "value_weighted"}:
        return {"maps"}
    if any(name.endswith(".weight") for name in shapes):
        return {"weights"}
    if not shapes or not all(re.fullmatch(r"[a-z_]+(\.\d+)?", name) for name in shapes):
        return set()
    if all(len(shape) == 1 for shape in shapes.values()):
        return {"vector"}
    one_row = all(shape[:1] == [1] for shape in shapes.values())
    return {"capture", "vector"} if one_row else {"capture"}


def _of_gguf(head: bytes) -> set[Kind]:
    def text(key: bytes) -> bytes:
        m = re.search(re.escape(key) + rb"\x08\0\0\0(.{8})", head, re.S)
        return head[m.end() :][: int.from_bytes(m[1], "little")] if m else b""

    if text(b"general.type") == b"adapter":
        return {"adapter"}
    architecture = text(b"general.architecture")
    return {"vector" if architecture == b"controlvector" else "model"} if architecture else set()
