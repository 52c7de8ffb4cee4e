"""Whether a model's sites are what they say: tested once (`mia.models.claims`), and remembered for the
file."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from mia.io import files
from mia.llama import give_back_memory, library_info
from mia.models.claims import VERSION, Algebra, Check, check
from mia.sites import parse

if TYPE_CHECKING:
    from mia.engine.run import Engine
    from mia.model import Model

#: of how many files the outcome is kept
_REMEMBERED = 256


def algebra(model: Model, engine: Engine) -> Algebra:
    """What is remembered of this file's sites, or a new check of them."""
    file = files.cache_folder() / "sites" / f"{file_key(model)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError):
        known = json.loads(file.read_text(encoding="utf-8"))
        checks = [Check(**c) for c in known["checks"]]
        refused, untested, unproved = (dict(known[k]) for k in ("refused", "untested", "unproved"))
        for spelling in (*refused, *unproved):
            parse(spelling, model.n_layer)
        return Algebra(checks, refused, untested, unproved, [int(i) for i in known["vectors"]])
    found = check(model, engine)
    give_back_memory()  # a hundred megabytes of an 8B model's activations
    files.remember(file, asdict(found), keep=_REMEMBERED)
    return found


def file_key(model: Model) -> str:
    """A name for what is remembered of a model: of the file, the types, the library and these checks.
    Another of any of them is asked anew."""
    from mia import __version__

    file = model.facts.file
    assert file is not None
    stat = file.stat
    parts = [
        str(model.path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        model.kv_type,
        "" if model.copy is None else model.copy.type,
        library_info()["llama_cpp_python"],
        __version__,
        VERSION,
        *([f"{len(model.rpc)} RPC servers"] if model.rpc else []),
        *(f"{a.sha256()} {a.scale}" for a in model.adapters),
    ]
    return hashlib.sha256(files.as_utf8("\n".join(map(str, parts))).encode()).hexdigest()[:32]
