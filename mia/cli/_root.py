"""`Root`: the command `mia` itself. It decides how mia ends.

Whatever goes wrong is one line on stderr, with --json also a document on stdout. Exit status: 0
done, 1 an error, 2 a command line that cannot be read, 130 stopped by Ctrl-C. A reader that left
(`mia … | head`) got what it wanted: status 0.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer.core

from mia.errors import FileError, MiaError
from mia.show.streams import say, write_document


class Root(typer.core.TyperGroup):
    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line. `standalone_mode`: end the process, with the status above."""
        how = (prog_name or "mia", complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(args, *how, **extra)
        in_json = "--json" in (sys.argv[1:] if args is None else args)
        faults = sys.excepthook

        def last_words(kind: type[BaseException], err: BaseException, trace: Any) -> None:
            """Of what ends the process from within the library (`mia.llama.rpc`)."""
            if isinstance(err, MiaError):
                _say(kind.__name__, str(err), in_json)
            else:
                faults(kind, err, trace)

        sys.excepthook = last_words
        try:
            code = super().main(args, *how, **extra)
            _flush()
            if code == 130:
                say("stopped")
            sys.exit(code)
        except BaseException as err:
            # typer and rich turn a broken pipe into status 1
            if isinstance(err, BrokenPipeError) or isinstance(err.__context__, BrokenPipeError):
                _leave_quietly()
            elif isinstance(err, MiaError):
                _say(type(err).__name__, str(err), in_json)
                sys.exit(1)
            elif hasattr(err, "format_message"):  # click's errors, wherever typer keeps them
                _say_usage(err, in_json)
                sys.exit(err.exit_code)  # type: ignore[attr-defined]
            raise
        finally:
            sys.excepthook = faults


def _flush() -> None:
    """Writes what is left, while an error can still be told. Raises `FileError`."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        raise FileError(f"cannot write to stdout: {err.strerror}") from err


def _say(kind: str, message: str, in_json: bool) -> None:
    say(message)
    if in_json:
        with contextlib.suppress(FileError):  # stdout itself may be what is wrong
            write_document({"error": {"type": kind, "message": message}})


def _say_usage(err: Any, in_json: bool) -> None:
    """A command line that cannot be read, as the other errors: one line, and where help is."""
    message = " ".join(err.format_message().split()).rstrip(".").replace("Value error, ", "")
    if type(err).__name__ == "NoArgsIsHelpError":  # it has printed the help
        return
    help = "" if getattr(err, "ctx", None) is None else f"; see {err.ctx.command_path} --help"
    _say("UsageError", message[:1].lower() + message[1:] + help, in_json)


def _leave_quietly() -> None:
    """Ends with 0; what stdout still holds goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
