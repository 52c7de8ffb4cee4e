"""Tasks that end badly, for tests/test_soak.py: children of `reliability.workers` import them."""

import os
import time
from collections.abc import Iterator
from typing import Any


def badly(n: int, bad: int, how: str, first: int = 0) -> Iterator[dict[str, Any]]:
    """Pieces `first` to n - 1, of which one kills the process, raises or never ends."""
    for i in range(first, n):
        yield {"at": i}
        if i == bad:
            if how == "dies":
                os.abort()
            if how == "hangs":
                time.sleep(600)
            raise ValueError("a foreign one")
        yield {"good": i}
