"""What a file of rows is of: its manifest, `rows.jsonl.manifest.json` beside it.

The rows stand in a file of their own, so that every line of it is a row for whatever reads JSON lines, and the file is
the same, byte for byte, whether it was written at once, after interruptions, by several workers or in shards.
What differs between these stands here.

    "format"    which rules it follows
    "settings"  what the numbers depend on; two files of other settings do not go together
    "shard"     [3, 16] for the third of sixteen, or null
    "rows"      how many the finished file has
    "setup"     the build and the processor: on another one the last digits may differ
    "command", "run"   what was typed, and what it read
    the rest    what `mia.methods.sweep_reports.Sweep` tells of a sweep besides its numbers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.errors import FileError
from mia.io import runs
from mia.io.files import existing_file, read_utf8
from mia.show.text import visible

if TYPE_CHECKING:
    from mia.sweeps.work import Work

FORMAT = "mia sweep rows 1"
#: longer lists are told by their hash
_LISTED = 64


def manifest_path(path: str | Path) -> Path:
    return Path(f"{path}.manifest.json")


def settings(work: Work) -> dict[str, Any]:
    """All that the numbers of a sweep depend on."""
    from mia.io.provenance import versions

    model, task, rest = work.model, work.task, work.grids[0].rest
    tokens = [
        [case.base.tokens, case.source and case.source.tokens, case.answer, case.against]
        for case in work.cases
    ]
    return {
        **versions(),
        "model": model.facts.sha256,
        "type": model.copy.type if model.copy is not None else "",
        "adapters": [adapter.document() for adapter in model.facts.lora],
        "kv type": model.kv_type,
        "fused attention": model.fuses,
        "standing edits": described(model.standing_edits),
        "experiment": described(task.experiment),
        "metric": work.metric,
        "prompts and answers": described(tokens, listed=0),
        "axes": [a.name for a in work.grids[0].axes],
        **{a.name: described(a.values) for a in work.grids[0].axes},
        "of every cell": described(rest),
        "window": task.window,
        "null": task.null,
        "chunks": [len(work.chunks), *map(len, work.chunks[:1])],
        "cells of a chunk": work.chunks[0][0].stop,
    }


def described(value: Any, listed: int = _LISTED) -> Any:
    """A value as JSON has it; arrays and long lists by their hash."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {_hash(np.ascontiguousarray(value).tobytes())}"
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: described(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **named}
    if isinstance(value, Mapping):
        value = {str(k): described(v) for k, v in value.items()}
    elif isinstance(value, (Sequence, Set)):
        value = [described(v) for v in value]
    else:
        return type(value).__name__
    if len(value) <= listed:
        return value
    return f"{len(value)} {_hash(json.dumps(value).encode())}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def provenance(work: Work) -> dict[str, Any]:
    """What else a manifest says of how a file was made."""
    from mia.io.provenance import setup

    return {"setup": setup(work.model), **command()}


def command() -> dict[str, Any]:
    """What was typed, and what it read; nothing in Python."""
    if (run := runs.current()) is None:
        return {}
    from mia.methods.rerun import command_line, shown

    document = run.document()
    try:
        return {"command": shown(command_line(run)), "run": document}
    except FileError:  # a command that cannot be repeated
        return {"run": document}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a file of rows. Raises `FileError`."""
    file = manifest_path(existing_file(path))
    if not file.exists():
        raise FileError(f"{path} has no {file.name} beside it, which says what it is of")
    try:
        manifest = json.loads(read_utf8(file))
    except (ValueError, RecursionError) as err:
        raise FileError(f"{file} is no JSON: {err}") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FileError(f"{file} is no manifest of a sweep's rows")
    missing = {"settings", "shard", "rows", "model", "axes", "runs"} - manifest.keys()
    if missing:
        raise FileError(f"{file} has no {sorted(missing)[0]}")
    return manifest


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting that two manifests do not share, in words; None if they share all."""
    one, other = _flat(old["settings"]), _flat(new["settings"])
    for key in [*other, *(k for k in one if k not in other)]:
        if one.get(key) != other.get(key):
            return f"{visible(key)}: {_said(one.get(key))}, not {_said(other.get(key))}"
    return None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    out: dict[str, Any] = {}
    for k, v in value.items():
        out |= _flat(v, f"{name}.{k}" if name else str(k))
    return out


def _said(value: Any) -> str:
    text = visible("nothing" if value is None else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:59]}…"
