"""The changes of a body as `Changes` of the commands: what a page that is exported says of them."""

from __future__ import annotations

import re
from typing import Any

from mia.methods.changes import Changes
from mia.serve.changes import Asked
from mia.serve.store import Vectors

_NAME = re.compile(r"(?<![\w.])[A-Za-z][A-Za-z0-9_]*")


def changes_of(asked: Asked, vectors: Vectors) -> Changes | None:
    """The same changes as options of the commands take them; None if they cannot.

    Vectors are files of the server's folder; what was uploaded, and what a patch takes from another
    prompt, are files that their reader has to make.
    """
    ablate = _given(asked.ablate if isinstance(asked.ablate, dict) else {"heads": asked.ablate})
    how = ablate.get("with") or "zero"
    patches = []
    for i, patch in enumerate(map(_given, asked.patch), 1):
        if "values" in patch or patch.get("mode", "replace") != "replace":
            return None
        source, target = _numbers(patch.get("from", -1)), _numbers(patch.get("to", -1))
        patches.append((patch["site"], f"residual-{i}.safetensors", source, target))
    steer = _steering(asked.steer, vectors)
    if steer is None:
        return None
    return Changes(
        patch=patches,
        ablate=_listed(ablate.get("heads")),
        ablate_with=None if how == "zero" else how,
        ablate_attention=bool(ablate.get("attention")),
        ablate_seed=ablate.get("seed") or 0,
        ablate_experts=_listed(ablate.get("experts")),
        block=tuple(asked.block),
        **steer,
    )


def _steering(given: list[Any], vectors: Vectors) -> dict[str, Any] | None:
    """One expression of files, if all vectors are added at the same layers to all tokens."""
    if not given:
        return {}
    entries = [_given({"vector": x} if isinstance(x, str) else x) for x in given]
    if any(x.get("operator", "add") != "add" or x.get("keep_norm") for x in entries):
        return None
    if any(x.get("tokens") is not None or x.get("generated") is False for x in entries):
        return None
    layers = {None if x.get("layers") is None else _numbers(x["layers"]) for x in entries}
    if len(layers) > 1:
        return None
    text = ""
    for x in entries:
        coefficient = float(x.get("coefficient", 1))
        sign = "-" if coefficient < 0 else "+"
        text += f" {sign} " if text else sign.strip("+")
        size, vector = abs(coefficient), _files(x["vector"], vectors)
        single = _NAME.fullmatch(x["vector"]) is not None
        text += "" if size == 1 else f"{size:.9g}*"  # float32, whole
        text += vector if single or (size == 1 and sign == "+") else f"({vector})"
    (at,) = layers
    return {"steer": (text,), **({} if at is None else {"steer_layers": at})}


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """A field that is null is as if it were not there."""
    return {name: value for name, value in fields.items() if value is not None}


def _files(expression: str, vectors: Vectors) -> str:
    """Arithmetic with names as arithmetic with files."""
    return _NAME.sub(lambda m: vectors.file_name(m[0]), expression)


def _numbers(given: Any) -> str:
    return ",".join(map(str, given)) if isinstance(given, list) else str(given)


def _listed(given: Any) -> str | None:
    return None if given is None else _numbers(given)
