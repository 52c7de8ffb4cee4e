"""Notices: what a person should know and a program need not stop for.

In Python they are warnings of the class `MiaWarning`; the command line prints each as a line on
stderr.
"""

from __future__ import annotations

import warnings


class MiaWarning(UserWarning):
    """Something about a result that its reader should know."""


def notice(text: str) -> None:
    warnings.warn(text, MiaWarning, stacklevel=3)
