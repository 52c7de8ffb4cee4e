"""What the library shows the outside: its public names, and no word of the command line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

import mia
from mia.cli import app

PACKAGE = Path(mia.__file__).parent
NAMES = [
    "Activations",
    "Capture",
    "Changes",
    "Edit",
    "EngineError",
    "FileError",
    "Generation",
    "Head",
    "Hook",
    "IclExperiment",
    "LogitDifference",
    "LogitLens",
    "LogitSum",
    "MiaError",
    "MiaWarning",
    "Model",
    "ModelError",
    "RangeError",
    "Readout",
    "Report",
    "Request",
    "Result",
    "Sampling",
    "Site",
    "SiteError",
    "Steering",
    "TaskSetup",
    "TokenLogits",
    "UsageError",
    "Vector",
    "show_progress",
]


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from mia import *", names)
    names.pop("__builtins__")
    assert sorted(names) == NAMES
    assert all(value.__name__ == name for name, value in names.items() if isinstance(value, type))
    assert sorted({*NAMES, "__version__"}) == sorted(dir(mia))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mia.nothing


#: flags of other programs, in the files that name them
OTHER_PROGRAMS = {
    ("llama/probe.py", "-m"),
    ("llama/probe.py", "--force-reinstall"),
    ("llama/probe.py", "--no-deps"),
    ("llama/probe.py", "--no-cache-dir"),
    ("llama/probe.py", "--no-binary"),
}


def short_options() -> set[str]:
    """Those of all commands: {"-m", "-o", ...}."""
    options: set[str] = set()
    commands = [get_command(app)]
    while commands:
        command = commands.pop()
        options |= {o for p in command.params for o in p.opts if not o.startswith("--")}
        commands += getattr(command, "commands", {}).values()
    return {o for o in options if o.startswith("-")}


def flags(text: str, short: set[str]) -> Iterator[str]:
    """Every long option in a text, and those short ones that mia has."""
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*|(?<![\w-])-[a-zA-Z](?![\w-])", text):
        if flag.startswith("--") or flag in short:
            yield flag


def test_the_library_names_no_option_of_the_command_line() -> None:
    """A message or docstring outside mia/cli speaks of arguments, not of --flags."""
    short = short_options()
    assert {"-m", "-o", "-p"} <= short
    files = [p for p in PACKAGE.rglob("*.py") if "cli" not in p.parts and p.name != "__main__.py"]
    named = {
        (file.relative_to(PACKAGE).as_posix(), flag)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for flag in flags(node.value, short)
    }
    assert named - OTHER_PROGRAMS == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'5-0' is not QUERIES->KEYS", []),
        ("--block '5-0' is wrong", ["--block"]),
        ("(see --ablate-with); -o FILE", ["--ablate-with", "-o"]),
        ("c and -c, -x; a - b -- c; resid_post-1", []),
    ],
)
def test_what_counts_as_an_option(text: str, expected: list[str]) -> None:
    assert list(flags(text, {"-o"})) == expected
