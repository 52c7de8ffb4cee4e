"""`command`: what every command has in common.

A command is a function that parses its options, calls the library once, and returns a `Report`.
`command` unfolds its dataclasses of options, adds `--json`, `-o`, `-q` and `--plot`, shows the
report, and turns mia's errors into one line and its notices into lines on stderr.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
import typer.core

from mia.errors import MiaError, UsageError

if TYPE_CHECKING:
    from mia.show.report import Report

OUTPUT = "Output"
#: options that take several words each time they are given; typer has none of these
_SEVERAL = {"--patch": 4, "--save": 2}
#: and one whose first word tells how many there are
_BY_FIRST = {"--ablate-with": {"mean": 2, "resample-from": 2}}
_JOINT = "\x1f"


class _Command(typer.core.TyperCommand):
    """Joins the words of such an option into one, which `split_words` takes apart."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            out.append(word)
            n = _SEVERAL.get(word)
            if word in _BY_FIRST and rest:
                n = _BY_FIRST[word].get(rest[0], 1)
            if n is not None and any(word in p.opts for p in self.params):
                values, rest = rest[:n], rest[n:]
                if len(values) < n:
                    print(f"mia: {word} expects {n} values, got {len(values)}", file=sys.stderr)
                    raise typer.Exit(2)
                out.append(_JOINT.join(values))
        return super().parse_args(ctx, out)


def split_words(values: Sequence[str] | None) -> list[list[str]]:
    """The words of each time an option of several words was given."""
    return [v.split(_JOINT) for v in values or []]


def refuse(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Raises `UsageError` if one of these options is on the command line, where it would do
    nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')} {reason}")


def option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


JsonOption = Annotated[bool, option("--json", help="Print one JSON document.", panel=OUTPUT)]
QuietOption = Annotated[bool, option("-q", "--quiet", help="No notices on stderr.", panel=OUTPUT)]
OutOption = Annotated[
    str | None,
    option("-o", "--out", help="Write the result to a file instead of stdout.", panel=OUTPUT),
]


@dataclass
class _Json:
    json: JsonOption = False


@dataclass
class _Quiet:
    quiet: QuietOption = False


@dataclass
class _Out:
    out: OutOption = None


@dataclass
class _Plot:
    plot: Annotated[
        str | None,
        option("--plot", help="Draw the result: .png, .svg or .pdf.", panel=OUTPUT),
    ] = None


@dataclass
class _PlotOrPage:
    plot: Annotated[
        str | None,
        option(
            "--plot", help="Draw the result: .png, .svg, .pdf, or a page (.html).", panel=OUTPUT
        ),
    ] = None


def command(
    app: typer.Typer,
    name: str,
    *,
    panel: str | None = None,
    plot: bool = False,
    page: bool = False,
    examples: Sequence[str] = (),
    hint: str | None = None,
) -> Callable[[Callable[..., Report | None]], Callable[..., Report | None]]:
    """Registers a command. A function with an `out` parameter of its own writes that file itself;
    one with a `plot` parameter of its own learns whether there will be a picture.

    Args:
        panel: the heading under which `mia --help` lists it.
        plot: the report has a picture; page: also an .html page.
        examples: command lines for the end of its help.
        hint: a line on stderr after the report was shown to a person.
    """

    def register(function: Callable[..., Report | None]) -> Callable[..., Report | None]:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function).parameters
        groups = {n: hints[n] for n in signature if is_dataclass(hints[n])}
        own = [
            p.replace(annotation=hints[n], kind=inspect.Parameter.KEYWORD_ONLY)
            for n, p in signature.items()
            if n not in groups
        ]
        output: list[type] = [_Json, _Quiet]
        if "out" not in signature:
            output.insert(1, _Out)
        if (plot or page) and "plot" not in signature:
            output.append(_PlotOrPage if page else _Plot)
        required = [p for p in own if p.default is inspect.Parameter.empty]
        optional = [p for p in own if p.default is not inspect.Parameter.empty]
        for group in (*groups.values(), *output):
            optional.extend(_unfolded(group))
        names = [f.name for kind in output for f in fields(kind)]

        @functools.wraps(function)
        def call(**values: Any) -> None:
            output = {n: values.pop(n) for n in names}
            if "plot" in signature:
                output["plot"] = values["plot"]
            for n, group in groups.items():
                values[n] = group(**{f.name: values.pop(f.name) for f in fields(group)})
            deliver(lambda: function(**values), output, page=page, hint=hint)

        parameters = [*required, *optional]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        del call.__wrapped__  # typer would look through to the dataclasses
        about = _joined(inspect.getdoc(function) or "")
        app.command(name, cls=_Command, help=about, rich_help_panel=panel, epilog=epilog(examples))(
            call
        )
        return function

    return register


def _joined(text: str) -> str:
    """A docstring with each paragraph on one line, as typer lists commands line by line."""
    return "\n\n".join(" ".join(p.split()) for p in text.split("\n\n"))


def epilog(examples: Sequence[str]) -> str | None:
    """The examples at the end of a command's help."""
    if not examples:
        return None
    # rich reads [ as the start of a style
    return "\n\n".join(["Examples:", *(f"  {e}".replace("[", "\\[") for e in examples)])


@functools.cache
def _unfolded(group: type) -> list[inspect.Parameter]:
    """A dataclass's fields as parameters; most commands have the same groups."""
    types = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
        )
        for f in fields(group)
    ]


def deliver(
    make: Callable[[], Report | None],
    output: dict[str, Any],
    *,
    page: bool = False,
    hint: str | None = None,
) -> None:
    """Makes a report, and writes or shows it; errors and notices are lines on stderr.

    Args:
        output: the values of the options of output.
        page: a picture may be an .html page.
        hint: a notice after the report was shown to a person.
    """
    from mia.notices import notice

    with one_line_errors(), _library_messages(quiet=output["quiet"]):
        _check_output(output, page)
        report = make()
        if report is not None:
            _write_or_show(report, output)
            if hint is not None and not output["json"] and not output.get("out"):
                notice(hint)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What mia raises on purpose is one line on stderr, and exit code 1."""
    try:
        yield
    except MiaError as err:
        print(f"mia: {err}", file=sys.stderr)
        raise typer.Exit(1) from err


@contextlib.contextmanager
def _library_messages(*, quiet: bool) -> Iterator[None]:
    """The library's notices as lines on stderr, its progress as bars where that is a terminal."""
    from mia.notices import MiaWarning
    from mia.progress import show_progress

    show_progress(not quiet and sys.stderr.isatty())
    with contextlib.ExitStack() as stack:
        stack.callback(show_progress, False)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore" if quiet else "always", MiaWarning)
        other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, MiaWarning):
                print(f"mia: {message}", file=sys.stderr)
            else:
                other(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _check_output(output: dict[str, Any], page: bool) -> None:
    """Sees before any work that the files can be written."""
    if output.get("out") is not None:
        from mia.io.files import check_writable

        check_writable(output["out"])
    if output.get("plot") is not None:
        from mia.show.plots import check_picture

        check_picture(output["plot"], [".html"] if page else [])


def _write_or_show(report: Report, output: dict[str, Any]) -> None:
    """Writes the report to the requested files; without --json or -o, prints it."""
    from mia.notices import notice

    if (picture := output.get("plot")) is not None:
        report.plot(picture)
        notice(f"wrote {picture}")
    if (out := output.get("out")) is not None:
        report.save(out)
        notice(f"wrote {out}")
    if output["json"]:
        print(json.dumps(report.document(), ensure_ascii=False))
    elif out is None:
        show(report)


def show(report: Report) -> None:
    """A table on a terminal, plain lines elsewhere."""
    if on_terminal():
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        console.print(report.table(console.width))
    else:
        print(report.plain())


def on_terminal() -> bool:
    return sys.stdout.isatty()
