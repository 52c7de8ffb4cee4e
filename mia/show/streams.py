"""stdin, stdout and stderr: data goes out exactly into a pipe and safely to a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from mia.errors import FileError
from mia.show.text import as_json, safe

#: bytes of text that are read at most
MAX_TEXT = 1 << 28


def prepare() -> None:
    """Makes the streams of this process such that no character is refused.

    A closed stdin, stdout or stderr is filled, or the next file that is opened would take its
    place, and what C code prints would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # an encoding without a character, or half a character: spelled out
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.excepthook = _show_fault


def say(text: str) -> None:
    """A line for the person, on stderr."""
    _to_stderr(safe(f"mia: {text}") + "\n")


def on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def write_data(text: str) -> None:
    """A text on stdout: as it is into a pipe or a file, `safe` on a terminal.

    Raises `FileError` where stdout takes nothing."""
    _deliver(lambda: print(safe(text, "\n\t") if on_terminal() else text, flush=True))


def write_part(text: str) -> None:
    """A part of a text on a terminal, at once. Raises `FileError` where stdout takes nothing."""
    _deliver(lambda: print(safe(text, "\n\t"), end="", flush=True))


def write_document(document: Any) -> None:
    """A JSON document on stdout; all ASCII where its encoding cannot hold every character.

    Raises `FileError` where stdout takes nothing."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    utf8 = encoding.lower().replace("-", "") == "utf8"
    write_data(as_json(document) if utf8 else json.dumps(document))


def write_table(table: Callable[[int], Any]) -> None:
    """A table on a terminal; `table` makes it for a number of columns. Raises `FileError`."""
    from mia.show.terminal import SafeConsole

    console = SafeConsole()
    _deliver(lambda: console.print(table(console.width)))


def _deliver(write: Callable[[], None]) -> None:
    if sys.stdout is None:
        raise FileError("cannot write the result: stdout is closed")
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:  # as with `| head`: the reader has what it wants
        _drop_stdout()
        raise SystemExit(0) from None
    except OSError as err:
        _drop_stdout()
        raise FileError(f"cannot write to stdout: {err.strerror or err}") from err


def _drop_stdout() -> None:
    """What stdout still holds is thrown away: Python would try to write it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def read_stdin() -> str:
    """All of stdin as text. Raises `FileError` where it is closed, or not UTF-8."""
    if sys.stdin is None:
        raise FileError("cannot read the prompt: stdin is closed")
    try:
        data = sys.stdin.buffer.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise FileError(f"cannot read stdin: it has more than {MAX_TEXT} bytes of text")
        text = data.decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")  # as a file is read
    except UnicodeDecodeError as err:
        byte = f"byte {err.object[err.start]:#04x} at {err.start}"
        raise FileError(f"cannot read stdin: it is not UTF-8 text ({byte})") from err
    except (OSError, ValueError) as err:
        raise FileError(f"cannot read stdin: {getattr(err, 'strerror', None) or err}") from err


def _show_fault(kind: type[BaseException], fault: BaseException, trace: Any) -> None:
    """A fault of mia itself, with its traceback; the message may have text from outside."""
    import traceback

    _to_stderr(safe("".join(traceback.format_exception(kind, fault, trace)), "\n\t"))


def _to_stderr(text: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens there
            sys.stderr.write(text)
            sys.stderr.flush()
