"""A user's own functions, named as `module:function`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mia.errors import UsageError
from mia.io import runs


def load_function(name: str) -> Callable[..., Any]:
    """Imports `module:function`; modules in the current folder are found too.

    Raises:
        UsageError: no such module, no such function, or importing it fails.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise UsageError(f"{name!r} is not a function; write module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    if (run := runs.current()) is not None:
        run.imports(name)
        _note_module(module_name)
    try:
        found = getattr(importlib.import_module(module_name), function)
    except AttributeError:
        raise UsageError(f"{name!r}: the module {module_name} has no {function}") from None
    except Exception as err:  # a user's module may fail in any way
        raise UsageError(f"{name!r}: cannot import {module_name}: {err}") from err
    if not callable(found):
        raise UsageError(f"{name!r} is not a function")
    return found


def _note_module(name: str) -> None:
    """The file of a module is one that the run reads, known before it is imported."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.has_location and spec.origin is not None:
            file = Path(spec.origin)
            here = Path.cwd()
            runs.reading(file.relative_to(here) if file.is_relative_to(here) else file)
