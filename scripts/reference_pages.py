"""Writes docs/commands.md from the commands, and the tables of sites and operators where a page
has a place for them."""

import enum
import html
import inspect
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.text import Text
from typer.models import ArgumentInfo, OptionInfo

from mia.cli import app
from mia.edits import OPERATORS
from mia.sites import SITES

ROOT = Path(__file__).parents[1]
COMMANDS = "docs/commands.md"
#: pages with a table that is written here, between `<!-- sites -->` and `<!-- /sites -->`
WITH_TABLES = ("README.md", "docs/guide/sites-and-edits.md")
#: an option is shared if it has the same names, help, default and panel in so many commands
SHARED = 4
NO_PANEL = "Options"
HEADER = """# Commands

<!-- Written by scripts/make_reference from the commands; change their help, not this page. -->

Data goes to stdout; notices and progress go to stderr. The exit status is 0 if the command did
its work, 1 after an error, and 2 if the command line itself is wrong. An error is one line that
starts with `mia:`; with `--json` it also leaves a document on stdout,
`{"error": {"type": "FileError", "message": "…"}}`. If a reader leaves early, as in `mia sites | head`,
the status is 0.
"""


@dataclass(frozen=True)
class Option:
    """An option or an argument, as the page shows it."""

    names: tuple[str, ...]  # ("-m", "--model"); an argument's has one, in capitals
    value: str
    help: str
    default: str
    panel: str
    required: bool

    @property
    def is_argument(self) -> bool:
        return not self.names[0].startswith("-")

    @property
    def row(self) -> str:
        names = " ".join([", ".join(self.names), self.value]).strip()
        if "|" in names:  # neither GitHub nor mkdocs lets one stand in `…` in a table
            names = f"<code>{html.escape(names).replace('|', '&#124;')}</code>"
        else:
            names = f"`{names}`"
        default = f"`{self.default}`" if self.default else ""
        return f"| {names} | {escaped(self.help)} | {default} |"


@dataclass(frozen=True)
class Command:
    """A command of the tree: `words` are what a person types."""

    words: tuple[str, ...]
    help: str
    epilog: str
    options: tuple[Option, ...]

    @property
    def usage(self) -> str:
        arguments = [o for o in self.options if o.is_argument]
        named = [o for o in self.options if not o.is_argument]
        parts = [o.names[0] if o.required else f"[{o.names[0]}]" for o in arguments]
        parts += [f"{o.names[0]} {o.value}" for o in named if o.required]
        if any(not o.required for o in named):
            parts.append("[OPTIONS]")
        return " ".join([*self.words, *parts])


def escaped(text: str) -> str:
    """Plain text that Markdown shows as it is, in a cell of a table too."""
    for char in "\\*<[|`":
        text = text.replace(char, "\\" + char)
    return " ".join(text.split())


def plain(help_text: str | None) -> str:
    """Help without rich's markup."""
    return Text.from_markup(inspect.cleandoc(help_text or "")).plain


# -- from functions to options -------------------------------------------------------


def option(parameter: inspect.Parameter, annotation: Any) -> Option:
    """What typer makes of `name: Annotated[type, typer.Option(...)] = default`."""
    kind, *extras = typing.get_args(annotation)
    info = next(e for e in extras if isinstance(e, OptionInfo | ArgumentInfo))
    required = parameter.default is inspect.Parameter.empty
    text = plain(info.help)
    if info.envvar:
        text += f" Environment: {info.envvar}."
    # in an annotation, typer takes the first name for the default
    first = (info.default,) if isinstance(info.default, str) else ()
    names: tuple[str, ...] = (*first, *(info.param_decls or ()))
    value = info.metavar or value_of(kind)
    if isinstance(info, ArgumentInfo):
        names, value = (info.metavar or parameter.name.upper(),), ""
        if typing.get_origin(without_none(kind)) is list:
            names = (f"{names[0]}...",)
    return Option(
        names or (f"--{parameter.name.replace('_', '-')}",),
        value,
        text,
        "" if required else default_of(parameter.default),
        info.rich_help_panel if isinstance(info.rich_help_panel, str) else NO_PANEL,
        required,
    )


def without_none(kind: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (a for a in typing.get_args(kind) if a is not type(None))
    return kind


def value_of(kind: Any) -> str:
    """The word for a value: INTEGER, or the choices."""
    kind = without_none(kind)
    if typing.get_origin(kind) is list:
        return value_of(typing.get_args(kind)[0])
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(str(choice.value) for choice in kind)
    return {bool: "", int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def default_of(value: Any) -> str:
    if value is None or isinstance(value, bool) or value == "":
        return ""
    return str(value.value if isinstance(value, enum.Enum) else value)


def options(function: Callable[..., Any] | None) -> tuple[Option, ...]:
    """Of a command's function, in its order."""
    if function is None:
        return ()
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function, include_extras=True)
    return tuple(
        option(p, hints[name])
        for name, p in parameters.items()
        if hints.get(name) is not typer.Context
    )


def commands(tree: typer.Typer, words: tuple[str, ...] = ("mia",)) -> Iterator[Command]:
    """The tree's own options, its commands in their order, and those of the groups in it."""
    callback = tree.registered_callback
    about = tree.info.help if isinstance(tree.info.help, str) else ""
    function = callback.callback if callback else None
    yield Command(words, plain(about), "", options(function))
    for info in tree.registered_commands:
        assert info.callback is not None
        command = info.name or info.callback.__name__.replace("_", "-")
        text = info.help or info.callback.__doc__
        yield Command((*words, command), plain(text), plain(info.epilog), options(info.callback))
    for group in tree.registered_groups:
        assert group.typer_instance is not None
        name = group.name or group.typer_instance.info.name
        yield from commands(group.typer_instance, (*words, str(name)))


# -- the pages -----------------------------------------------------------------------


def pages() -> dict[str, str]:
    """What make_reference writes: {file below the root: text}."""
    tables = {file: with_tables((ROOT / file).read_text(encoding="utf-8")) for file in WITH_TABLES}
    return {COMMANDS: commands_page(), **tables}


def with_tables(text: str) -> str:
    """The text with today's tables between their comments."""
    for name, lines in (("sites", site_table()), ("operators", operator_table())):
        between = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        body = "\n".join(lines)
        text = re.sub(between, lambda m, b=body: m[1] + b + m[2], text, flags=re.S)  # type: ignore[misc]
    return text


def site_table() -> list[str]:
    lines = ["| mia | llama.cpp | TransformerLens | one token's row |", "|---|---|---|---|"]
    for kind in SITES:
        names = [f"`{text}`" if text else "" for text in kind.spellings()]
        lines.append("| " + " | ".join([*names, " × ".join(kind.shape)]) + " |")
    return lines


def operator_table() -> list[str]:
    rows = [(o.name, o.formula.replace("|", "\\|")) for o in OPERATORS.values()]
    return ["| operator | h becomes |", "|---|---|", *(f"| `{n}` | {f} |" for n, f in rows)]


def commands_page() -> str:
    every = list(commands(app))
    count = Counter(o for c in every for o in c.options if not o.is_argument)
    shared = {o for o, n in count.items() if n >= SHARED and o.panel != NO_PANEL}
    text = [HEADER, "## Options of many commands\n"]
    for panel in dict.fromkeys(o.panel for o in count if o in shared):
        text += [f"### {panel}\n", table([o for o in count if o in shared and o.panel == panel])]
    text.append("## The commands\n")
    text += [section(c, shared) for c in every]
    return "\n".join(text).rstrip() + "\n"


def table(rows: list[Option]) -> str:
    head = "| option | meaning | default |\n|---|---|---|\n"
    return head + "".join(f"{o.row}\n" for o in rows)


def section(command: Command, shared: set[Option]) -> str:
    text = [f"### {' '.join(command.words)}\n"]
    text += [f"{escaped(paragraph)}\n" for paragraph in command.help.split("\n\n") if paragraph]
    if command.options:
        text.append(f"```text\n{command.usage}\n```\n")
    if command.epilog:
        text.append(f"```sh\n{command.epilog}\n```\n")
    if own := [o for o in command.options if o not in shared]:
        text.append(table(own))
    if common := [f"`{o.names[-1]}`" for o in command.options if o in shared]:
        text.append(f"And, [as everywhere](#options-of-many-commands): {', '.join(common)}.\n")
    return "\n".join(text)


if __name__ == "__main__":
    for file, text in pages().items():
        (ROOT / file).write_text(text, encoding="utf-8", newline="\n")
