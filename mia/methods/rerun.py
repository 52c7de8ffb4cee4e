"""From a command line to its `Run`, and from a `Run` back to a command line that can be run.

It reads the commands off the command line's own tree, so that a new one needs nothing here.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from mia.errors import FileError, UsageError
from mia.show.again import Again
from mia.show.text import visible

if TYPE_CHECKING:
    from mia.io.runs import Replay, Run
    from mia.show.report import Report

#: commands that measure nothing that could be the same again, and why
NOT_REPLAYABLE = {
    "models": "it lists the files of one machine",
    "models pull": "it downloads a file",
    "models cache": "it lists the files of one machine",
    "models convert": "it writes a model file and measures nothing",
    "doctor": "it describes the machine that it runs on",
    "replay": "it compares two runs itself",
    "merge": "it joins files and measures nothing",
    "report": "it shows results that were made before",
}
#: stands between the words of an option that takes several
_JOINT = "\x1f"

#: where a report goes instead of to the user, while a command is run again
replayed: ContextVar[list[Report | None] | None] = ContextVar("replayed", default=None)


@contextlib.contextmanager
def recorded(context: Any) -> Iterator[None]:
    """Keeps what a command is called with and what it reads, if it writes a document."""
    from mia.io import runs

    values = context.params
    if replayed.get() is not None or not (values.get("json") or values.get("out")):
        yield
        return
    names: list[str] = []
    outer = context
    while outer.parent is not None:
        names.insert(0, outer.info_name)
        outer = outer.parent
    hidden = getattr(context.command, "output", ("json", "out", "quiet"))
    arguments = {
        k: _listed(v) for k, v in values.items() if k not in hidden and v is not None and v != ()
    }
    with runs.recorded(runs.Run(" ".join(names), arguments)):
        yield


def _listed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_listed(v) for v in value]
    return value.split(_JOINT) if isinstance(value, str) and _JOINT in value else value


def command_line(run: Run, model: str | None = None) -> list[str]:
    """The words that repeat a run: the options that are not at their default.

    Args:
        model: a model instead of its own.

    Raises:
        FileError: it cannot be repeated, or is no run of these commands.
    """
    command = _find(run.command)
    values = dict(run.arguments)
    for name in ("rpc", "dask", "resume"):  # of whoever made it; here MIA_RPC or models.toml decide
        values.pop(name, None)
    if model is not None:
        if not any(p.name == "model" for p in command.params):
            raise UsageError(f"{run.command} takes no other model")
        values["model"] = model
    threads = (run.model or {}).get("threads")
    if isinstance(threads, int) and threads <= _processors():
        values.setdefault("threads", threads)
    options: list[str] = []
    arguments: list[str] = []
    for p in command.params:
        if (value := values.pop(p.name, None)) is None or p.name in command.output:
            continue
        if p.param_type_name == "argument":
            arguments += [_text(run, v) for v in (value if isinstance(value, list) else [value])]
        elif value != p.default or p.envvar:
            options += _option(run, p, value)
    values.pop("threads", None)
    if values:
        raise FileError(f"mia {run.command} has no option {next(iter(values))!r:.60}")
    return [*run.command.split(), *options, *(["--", *arguments] if arguments else [])]


def again(run: Run) -> Again | None:
    """The command line of a run, for a page; None if it cannot be repeated."""

    def words(without: Collection[str]) -> list[str]:
        arguments = {k: v for k, v in run.arguments.items() if k not in without}
        # without the model's facts: threads are not asked for that were not
        return command_line(replace(run, arguments=arguments, model=None))

    try:
        options = {p.name: max(p.opts, key=len) for p in _find(run.command).params}
        return Again(words, options) if words(()) else None
    except (FileError, UsageError):
        return None


def _processors() -> int:
    from mia.llama.c_numbers import processors

    return processors()


def _find(name: str) -> Any:
    """The command of a name. Raises `FileError` if there is none, or it cannot be repeated."""
    if name in NOT_REPLAYABLE:
        raise FileError(f"a result of mia {name} cannot be replayed: {NOT_REPLAYABLE[name]}")
    command = _tree()
    for word in name.split():
        command = getattr(command, "commands", {}).get(word)
    if command is None or not hasattr(command, "output"):
        raise FileError(f"there is no command mia {name!r:.60}")
    return command


@cache
def _tree() -> Any:
    """All commands."""
    from importlib import import_module

    from typer.main import get_command

    # by name: the command line stands above the methods, and its tree is what is run here
    return get_command(import_module("mia.cli").app)


def _option(run: Run, parameter: Any, value: Any) -> list[str]:
    name = max(parameter.opts, key=len)
    if isinstance(value, bool):
        names = [name] if value else parameter.secondary_opts[:1]
        return list(names)
    words: list[str] = []
    for each in value if parameter.multiple and isinstance(value, list) else [value]:
        if isinstance(each, list):  # an option of several words
            words += [name, *(_text(run, v) for v in each)]
        else:
            text = _text(run, each)
            words += [f"{name}={text}"] if text.startswith("-") else [name, text]
    return words


def _text(run: Run, value: Any) -> str:
    if not isinstance(value, (str, int, float)) or _JOINT in str(value) or "\0" in str(value):
        raise FileError(f"{value!r:.60} is no argument of mia {run.command}")
    return str(value)


def shown(words: list[str]) -> str:
    """A command line as a person would type it, safe for a terminal."""
    return visible(shlex.join(["mia", *words]))


def _parsed(command: Any, name: str, words: list[str]) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return command.make_context(name, words)
    except Exception as err:
        says = getattr(err, "format_message", said.getvalue)()
        raise FileError(f"mia {name} cannot be run so: {visible(says.strip())}") from err


def rerun(words: list[str], run: Replay) -> Report:
    """Runs a command line; nothing is written or shown.

    Raises `FileError` if the command does not take these words, and what the command raises."""
    from mia.io import runs

    command = _find(run.of.command)
    rest = words[len(run.of.command.split()) :]
    reports: list[Report | None] = []
    token = replayed.set(reports)
    try:
        with runs.recorded(run), _parsed(command, run.of.command, rest) as context:
            command.invoke(context)
    finally:
        replayed.reset(token)
    if not reports or reports[0] is None:
        raise FileError(f"mia {run.of.command} gave no result")
    return reports[0]
