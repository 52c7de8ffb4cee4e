"""`command`: what every command has in common.

A command is a function that parses its options, calls the library once, and returns a `Report`.
`command` unfolds its dataclasses of options, adds `--json`, `-o`, `-q` and `--plot`, shows the
report, and turns mia's notices into lines on stderr (`mia.cli._root` its errors).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
import typer.core

from mia.errors import UsageError
from mia.names import completion
from mia.show.report import PICTURES, check_ending, endings, save_report
from mia.show.streams import on_terminal, say, write_data, write_document, write_table
from mia.show.text import safe

if TYPE_CHECKING:
    from mia.show.report import Report

OUTPUT = "Output"
#: options that take several words each time they are given; typer has none of these
_SEVERAL = {"--patch": 4, "--save": 2}
#: and one whose first word tells how many there are
_BY_FIRST = {"--ablate-with": {"mean": 2, "resample-from": 2}}
_JOINT = "\x1f"
#: the parameters that the command line of the running command has
_GIVEN: set[str] = set()


class _Command(typer.core.TyperCommand):
    """Joins the words of such an option into one, which `split_words` takes apart, and keeps what
    a run reads for its document."""

    #: the options of output that the command does not see
    output: tuple[str, ...] = ()

    def invoke(self, ctx: Any) -> Any:
        from mia.methods.rerun import recorded

        with recorded(ctx):
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            out.append(word)
            n = _SEVERAL.get(word)
            if word in _BY_FIRST and rest:
                n = _BY_FIRST[word].get(rest[0], 1)
            name, equals, _ = word.partition("=")
            if equals and name in _SEVERAL and any(name in p.opts for p in self.params):
                print(f"mia: {name} expects {_SEVERAL[name]} values after it", file=sys.stderr)
                raise typer.Exit(2)
            if n is not None and any(word in p.opts for p in self.params):
                values, rest = rest[:n], rest[n:]
                if len(values) < n:
                    ctx.fail(f"{word} expects {n} values, got {len(values)}")
                out.append(_JOINT.join(values))
        rest = super().parse_args(ctx, out)
        sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
        _GIVEN.clear()
        _GIVEN.update(n for n, s in sources.items() if s is not None and s.name == "COMMANDLINE")
        return rest


def split_words(values: Sequence[str] | None) -> list[list[str]]:
    """The words of each time an option of several words was given."""
    return [v.split(_JOINT) for v in values or []]


def given(name: str) -> bool:
    """Whether the running command has this option on its command line."""
    return name in _GIVEN


def refuse(names: Sequence[str], reason: str) -> None:
    """Raises `UsageError` if one of these options is on the command line, where it would do
    nothing."""
    for name in filter(given, names):
        raise UsageError(f"--{name.replace('_', '-')} {reason}")


def option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


JsonOption = Annotated[bool, option("--json", help="Print one JSON document.", panel=OUTPUT)]
QuietOption = Annotated[bool, option("-q", "--quiet", help="No notices on stderr.", panel=OUTPUT)]
OutOption = Annotated[
    str | None,
    option(
        "-o",
        "--out",
        help="Write the result to a file instead of stdout: .json, .csv (its rows), .html (a page), or "
        "a picture where there is one (.png, .svg, .pdf).",
        panel=OUTPUT,
    ),
]


def _plot_option(help: str) -> Any:
    return Annotated[str | None, option("--plot", help=help, panel=OUTPUT)]


def _group(name: str, kind: Any, default: Any = None) -> type:
    return make_dataclass(f"_{name}", [(name, kind, field(default=default))])


_JSON, _QUIET = _group("json", JsonOption, False), _group("quiet", QuietOption, False)
_OUT, _PLOT, _PLOT_OR_PAGE = (
    _group("out", OutOption),
    _group("plot", _plot_option("Draw the result: .png, .svg or .pdf.")),
    _group("plot", _plot_option("Draw the result: .png, .svg, .pdf, or a page (.html).")),
)


def command(
    app: typer.Typer,
    name: str,
    *,
    panel: str | None = None,
    plot: bool = False,
    page: bool = False,
    report: bool = True,
    rows: bool = False,
    files: Sequence[str] = (),
    examples: Sequence[str] = (),
    hint: str | None = None,
) -> Callable[[Callable[..., Report | None]], Callable[..., Report | None]]:
    """Registers a command. A function with an `out` parameter of its own writes that file itself;
    one with a `plot` parameter of its own learns whether there will be a picture.

    Args:
        panel: the heading under which `mia --help` lists it.
        report: whether it returns one; else only -q is added.
        plot: the report has a picture; page: --plot also takes an .html page.
        rows: the function's parameter `rows` is the file of -o if that is a .jsonl, which the
            function writes itself.
        files: endings that -o takes besides those of every report.
        examples: command lines for the end of its help.
        hint: a line on stderr after the report was shown to a person.
    """

    def register(function: Callable[..., Report | None]) -> Callable[..., Report | None]:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function).parameters
        file = function.__module__.rpartition(".")[2]
        groups = {n: hints[n] for n in signature if is_dataclass(hints[n])}
        own = [
            p.replace(annotation=hints[n], kind=inspect.Parameter.KEYWORD_ONLY)
            for n, p in signature.items()
            if n not in groups and not (rows and n == "rows")
        ]
        output: list[type] = [_JSON, _QUIET] if report else [_QUIET]
        if report and "out" not in signature:
            output.insert(1, _OUT)
        if (plot or page) and "plot" not in signature:
            output.append(_PLOT_OR_PAGE if page else _PLOT)
        required = [p for p in own if p.default is inspect.Parameter.empty]
        optional = [p for p in own if p.default is not inspect.Parameter.empty]
        for group in (*groups.values(), *output):
            optional.extend(_unfolded(group))
        names = [f.name for kind in output for f in fields(kind)]
        picture = plot or page or "plot" in signature
        others = (*files, ".jsonl") if rows else files
        known = None if "out" in signature else endings(picture=picture, own=others)

        @functools.wraps(function)
        def call(**values: Any) -> None:
            output = {n: values.pop(n) for n in names}
            if rows:
                output["rows"] = values["rows"] = _rows_file(output["out"])
            if "plot" in signature:
                output["plot"] = values["plot"]
                values["plot"] = values["plot"] or _picture(output.get("out"))
            for n, group in groups.items():
                values[n] = group(**{f.name: values.pop(f.name) for f in fields(group)})
            deliver(lambda: function(**values), output, known=known, page=page, hint=hint)

        parameters = [*required, *optional]
        for p in parameters:
            for info in getattr(p.annotation, "__metadata__", ()):
                info.autocompletion = completion(file, p.name)
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        del call.__wrapped__  # typer would look through to the dataclasses
        about = joined(inspect.getdoc(function) or "")
        kind = type("Command", (_Command,), {"output": tuple(names)})
        app.command(name, cls=kind, help=about, rich_help_panel=panel, epilog=epilog(examples))(
            call
        )
        return function

    return register


def _rows_file(out: str | None) -> str | None:
    return out if out is not None and out.lower().endswith(".jsonl") else None


def joined(text: str) -> str:
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
    known: Sequence[str] | None = None,
    page: bool = False,
    hint: str | None = None,
) -> None:
    """Makes a report, and writes or shows it; notices are lines on stderr.

    Args:
        output: the values of the options of output.
        known: how the name of the report's file may end; by default as that of every report.
        page: a picture may be an .html page.
        hint: a notice after the report was shown to a person.
    """
    from mia.methods.rerun import replayed
    from mia.notices import notice

    if (reports := replayed.get()) is not None:
        reports.append(make())
        return
    with _library_messages(quiet=output["quiet"]):
        _check_output(output, endings(picture=False) if known is None else known, page)
        report = make()
        if report is not None:
            _write_or_show(report, output)
            if hint is not None and not output["json"] and not output.get("out"):
                notice(hint)
            if report.failed:
                raise typer.Exit(1)


@contextlib.contextmanager
def _library_messages(*, quiet: bool) -> Iterator[None]:
    """The library's notices as lines on stderr, its progress as bars where that is a terminal."""
    from mia.notices import MiaWarning, MissingBos
    from mia.progress import show_progress

    show_progress(not quiet and sys.stderr is not None and sys.stderr.isatty())
    with contextlib.ExitStack() as stack:
        stack.callback(show_progress, False)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore" if quiet else "always", MiaWarning)
        other = warnings.showwarning
        told: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, MiaWarning):
                key = category.__name__ if category is MissingBos else str(message)
                if key in told:
                    return
                told.add(key)
                say(str(message))
            else:
                other(safe(str(message), "\n"), category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _picture(out: str | None) -> str | None:
    """`out` if it is to be a picture."""
    return out if out is not None and out.lower().endswith(PICTURES) else None


def _check_output(output: dict[str, Any], known: Sequence[str], page: bool) -> None:
    """Sees before any work that the files can be written."""
    if (out := output.get("out")) is not None:
        from mia.io.files import check_writable
        from mia.show.plots import check_picture

        check_ending(out, known)
        check_picture(out) if _picture(out) else check_writable(out)
    if output.get("plot") is not None:
        from mia.show.plots import check_picture

        check_picture(output["plot"], [".html"] if page else [])


def _write_or_show(report: Report, output: dict[str, Any]) -> None:
    """Writes the report to the requested files; without --json or -o, prints it."""
    from mia.io import runs
    from mia.methods.rerun import again
    from mia.notices import notice

    run = runs.current()
    entry = None if run is None else run.document()
    if (picture := output.get("plot")) is not None:
        report.plot(picture)
        notice(f"wrote {picture}")
    if (out := output.get("out")) is not None:
        if output.get("rows") is None:  # else it is there already
            save_report(report, out, entry, None if run is None else again(run))
        notice(f"wrote {out}")
    if output["json"]:
        write_document({**report.document(), **({"run": entry} if entry else {})})
    elif out is None:
        show(report)


def show(report: Report) -> None:
    """A table on a terminal, plain lines elsewhere."""
    if on_terminal():
        write_table(report.table)
    else:
        write_data(report.plain())
