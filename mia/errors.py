"""What can go wrong, as a tree of exceptions.

    MiaError
    ├── UsageError       a value the caller gave is wrong: names it and the valid ones
    │   ├── SiteError        unknown site, or one that this model or graph does not have
    │   └── RangeError       a layer, head, token index or dimension out of range
    ├── ModelError       the model file cannot be used, or the library refuses it
    ├── FileError        a capture, vector or result file cannot be read or written
    └── EngineError      llama.cpp failed, or does not behave as this version expects

Every message is one line that a person can act on, safe for a terminal whatever names it holds;
the command line prints it and exits with 1.
"""

from __future__ import annotations

from collections.abc import Iterable

from mia.show.text import safe


class MiaError(Exception):
    """Base of every error that mia raises on purpose."""

    def __init__(self, message: object = ""):
        super().__init__(safe(str(message)))


class UsageError(MiaError, ValueError):
    """A value the caller gave is wrong."""


class SiteError(UsageError):
    """A site that does not exist, or that this model does not have."""


class RangeError(UsageError):
    """A layer, head, token index or dimension out of range."""


class ModelError(MiaError):
    """A model that cannot be found, read or run."""


class FileError(MiaError):
    """A capture, vector or result file that cannot be read or written."""


class EngineError(MiaError):
    """llama.cpp failed, or is not the version that mia knows how to read."""


class NotFiniteError(EngineError):
    """The model made numbers that are not finite."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A part of a message about an unknown name: ", did you mean a or b?", or nothing where no
    other name is near. Capitals do not matter, and a name may be cut short."""
    from difflib import get_close_matches

    names = {name.lower(): name for name in known if name != word}
    word = word.lower()
    near = get_close_matches(word, names, cutoff=cutoff)
    near += [n for n in names if len(word) > 2 and n.startswith(word) and n not in near]
    near = [names[n] for n in near[:3]]
    return f", did you mean {' or '.join(near)}?" if near else ""
