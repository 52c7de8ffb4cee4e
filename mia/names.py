"""Names by their first letters, for a shell to complete: sites, models, tasks and shipped data.
Nothing here opens a model or imports numpy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

from mia.errors import MiaError


def completion(group: str, parameter: str) -> Callable[[str], list[str]] | None:
    """What completes a parameter of the commands of `mia.cli.<group>`, from its beginning; None
    where there are no names."""
    return _BY_NAME.get(f"{group}.{parameter}") or _BY_NAME.get(parameter)


def _site(incomplete: str) -> list[str]:
    """mia's and llama.cpp's names; of sites that are joined by +, the last is completed."""
    from mia.sites import SITES

    before, plus, part = incomplete.rpartition("+")
    names = [n for kind in SITES for n in (kind.name, *kind.llama)]
    return [before + plus + n for n in dict.fromkeys(names) if n.startswith(part)]


def _model(incomplete: str) -> list[str]:
    from mia.models.registry import registry

    with contextlib.suppress(MiaError):
        return [n for n in registry() if n.startswith(incomplete)]
    return []


def _shipped(kind: Literal["contrast", "ab", "tasks"]) -> Callable[[str], list[str]]:
    """Shipped data of a kind."""

    def names(incomplete: str) -> list[str]:
        from mia.datasets import shipped

        known = shipped.names(kind) + (["all"] if kind == "tasks" else [])
        return [n for n in known if n.startswith(incomplete)]

    return names


_BY_NAME = {
    "model": _model,
    "tools.name": _model,
    "diff.a": _model,
    "diff.b": _model,
    "site": _site,
    "sites": _site,
    "name": _shipped("tasks"),
    "tasks": _shipped("tasks"),
    "other": _shipped("tasks"),
    "vector.data": _shipped("contrast"),
    "data": _shipped("ab"),
}
