"""Runs: what a command was called with and what it read, kept in its document, so that the same can
be run again (`mia.methods.replay`).

    "run": {"command": "steer", "arguments": {"prompt": "…", …},
            "files": {"v.gguf": SHA-256, …}, "stdin": text, "model": {…}, "others": [{…}],
            "setup": {…}}

Files are read in a few places (`read_utf8`, `read_safetensors`, the readers of `.npy` and of vectors).
Each calls `reading` first. While nothing is recorded or replayed, that does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mia.errors import FileError, ModelError, UsageError
from mia.show import streams
from mia.show.text import visible

_PACKAGE = Path(__file__).parents[1]
#: how files that come with mia are named in a document
_SHIPPED = "mia:"


@dataclass
class Run:
    """A run of a command, as its document tells it.

    Attributes:
        command: its words: "vector train".
        arguments: its options and arguments as they were parsed, by name.
        files: SHA-256 of each file that it read, by its path as it was given.
        stdin: what it read there, None if it did not.
        model: name, SHA-256 and type of the weights of the model that it opened, and how. What takes
            long is a function, which the document calls when the work is done.
        others: the same of the models that it opened after that one.
        setup: the versions and the build of the library, the processor.
    """

    command: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    stdin: str | None = None
    model: dict[str, Any] | None = None
    setup: dict[str, Any] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The `run` entry of a document."""
        from mia import __version__

        return {
            "command": self.command,
            "arguments": self.arguments,
            **({"files": self.files} if self.files else {}),
            **({} if self.stdin is None else {"stdin": self.stdin}),
            **({} if self.model is None else {"model": _called(self.model)}),
            **({"others": [_called(m) for m in self.others]} if self.others else {}),
            "setup": self.setup or {"mia": __version__},
        }

    def reads(self, path: Path) -> None:
        # a pipe would be empty afterwards
        if _is_file(path) and (name := _name(path)) not in self.files:
            self.files[name] = _sha256(path)

    def reads_stdin(self) -> str:
        if self.stdin is None:
            self.stdin = streams.read_stdin()
        return self.stdin

    def opens(self, name: str, sha256: Callable[[], str]) -> None:
        """Before a model is loaded. `sha256`: gives that of its file."""

    def imports(self, function: str) -> None:
        """Before a function of the user's is imported."""

    def opened(self, model: dict[str, Any], setup: dict[str, Any]) -> None:
        """After a model was loaded: what `mia.io.provenance` says of it and of the library."""
        if self.model is None:
            self.model, self.setup = model, setup
        else:
            self.others.append(model)

    @property
    def models(self) -> list[dict[str, Any]]:
        """Every model that it opened, in order."""
        return [*([] if self.model is None else [self.model]), *self.others]


@dataclass
class Replay(Run):
    """A run that repeats another. It writes no file, and reads only the files that the other says
    it read, if they have not changed.

    Attributes:
        of: the run that it repeats.
        any_model: the model may be another one.
        trust: the functions that it names may be imported.
        notices: what is not as it was.
    """

    of: Run = field(default_factory=Run)
    any_model: bool = False
    trust: bool = False
    notices: list[str] = field(default_factory=list)

    def reads(self, path: Path) -> None:
        name, shown = _name(path), visible(str(path))
        if name not in self.of.files:
            raise FileError(f"{shown} is not among the files that the result says it is made of")
        if not _is_file(path):
            raise FileError(f"there is no file {shown}, which the result is made of")
        super().reads(path)
        if self.files[name] != self.of.files[name]:
            old, new = self.of.files[name][:12], self.files[name][:12]
            raise FileError(
                f"{shown} has changed: its SHA-256 was {visible(old)}…, and is {new}… now"
            )

    def reads_stdin(self) -> str:
        if self.of.stdin is None:
            raise FileError("the result does not hold what it read from stdin")
        return self.of.stdin

    def opens(self, name: str, sha256: Callable[[], str]) -> None:
        new, i = sha256(), len(self.models)
        old = self.of.models[i] if i < len(self.of.models) else {}
        if old.get("sha256") == new:
            return
        text = visible(
            f"the result was made with {old.get('name', 'no model')} (SHA-256 "
            f"{str(old.get('sha256'))[:12]}…), {name} is another file ({new[:12]}…)"
        )
        if not self.any_model:
            raise ModelError(text)
        self.notices.append(text)

    def opened(self, model: dict[str, Any], setup: dict[str, Any]) -> None:
        super().opened(_called(model), setup)

    def imports(self, function: str) -> None:
        if not self.trust:
            raise UsageError(
                f"the result names a function of its maker, {function!r}: it is imported only if "
                "the result is trusted"
            )


def _called(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v() if callable(v) else v for k, v in facts.items()}


_run: ContextVar[Run | None] = ContextVar("run", default=None)


def current() -> Run | None:
    """The run that is recorded or replayed, None for neither."""
    return _run.get()


@contextlib.contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Keeps in `run` what is read meanwhile."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What is read and opened meanwhile is no part of the run: files that it made itself."""
    token = _run.set(None)
    try:
        yield
    finally:
        _run.reset(token)


def writes_nothing() -> bool:
    """Whether files are not to be written: a replay only compares."""
    return isinstance(_run.get(), Replay)


def reading(path: str | Path) -> None:
    """What reads a file of the user's calls this first.

    Raises `FileError` in a replay, if the file is none of the result's or has changed."""
    if (run := _run.get()) is not None:
        run.reads(Path(path))


def read_stdin() -> str:
    """All of stdin; in a replay what it was then."""
    run = _run.get()
    return streams.read_stdin() if run is None else run.reads_stdin()


def _is_file(path: Path) -> bool:
    """False too for what no file can be called."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    """Not the remembered one: a file that was edited within the clock's tick would have it."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    except OSError as err:
        raise FileError(f"cannot read {path}: {err.strerror or err}") from err
    return digest.hexdigest()


def _name(path: Path) -> str:
    """The path as it was given; data that comes with mia lies elsewhere on every machine."""
    if path.is_relative_to(_PACKAGE):
        return _SHIPPED + path.relative_to(_PACKAGE).as_posix()
    return str(path)


def parse_run(value: Any) -> Run:
    """The `run` entry of a document. Raises `FileError` if it is none."""
    if not isinstance(value, dict):
        raise FileError("it does not say which command made it (results saved from Python do not)")
    for key, kind in _ENTRIES.items():
        if key in value and not isinstance(value[key], kind):
            raise FileError(f"run.{key} is {value[key]!r:.60}")
    if "command" not in value or "arguments" not in value:
        raise FileError("its run has no command and arguments")
    files = value.get("files", {})
    if not all(isinstance(v, str) for v in files.values()):
        raise FileError("run.files is no table of SHA-256")
    if not all(isinstance(m, dict) for m in value.get("others", [])):
        raise FileError("run.others is no list of models")
    run = {k: value[k] for k in _ENTRIES if k in value}
    return Run(**run)


_ENTRIES: Mapping[str, type] = {
    "command": str,
    "arguments": dict,
    "files": dict,
    "stdin": str,
    "model": dict,
    "others": list,
    "setup": dict,
}
