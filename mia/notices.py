"""Notices: what a person should know and a program need not stop for.

In Python they are warnings of the class `MiaWarning`; the command line prints each as a line on
stderr.
"""

from __future__ import annotations

import warnings

from mia.show.text import safe


class MiaWarning(UserWarning):
    """Something about a result that its reader should know."""


class MissingBos(MiaWarning):
    """A prompt has no BOS in front. The command line says so once."""


def notice(text: str, kind: type[MiaWarning] = MiaWarning) -> None:
    """Warns in one line; what a terminal would obey is spelled out."""
    warnings.warn(safe(text), kind, stacklevel=3)
