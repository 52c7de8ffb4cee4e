"""What can go wrong, as a tree of exceptions.

    MiaError
    ├── UsageError       a value the caller gave is wrong: names it and the valid ones
    │   ├── SiteError        unknown site, or one that this model or graph does not have
    │   └── RangeError       a layer, head, token index or dimension out of range
    ├── ModelError       the model file cannot be used, or the library refuses it
    ├── FileError        a capture, vector or result file cannot be read or written
    └── EngineError      llama.cpp failed, or does not behave as this version expects

Every message is one line that a person can act on; the command line prints it
and exits with 1.
"""


class MiaError(Exception):
    """Base of every error that mia raises on purpose."""


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
