"""A user's own functions, named as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mia.errors import UsageError


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
    try:
        found = getattr(importlib.import_module(module_name), function)
    except AttributeError:
        raise UsageError(f"{name!r}: the module {module_name} has no {function}") from None
    except Exception as err:  # a user's module may fail in any way
        raise UsageError(f"{name!r}: cannot import {module_name}: {err}") from err
    if not callable(found):
        raise UsageError(f"{name!r} is not a function")
    return found
