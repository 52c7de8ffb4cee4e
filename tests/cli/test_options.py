"""Options mean the same everywhere, and docs/options.md says what."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer

from mia.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
#: options of one name that cannot mean quite the same, and why
OWN_MEANING = {
    "--out": "commands that make a file write that file",
    "--bos": "in-context tasks put it in front by default",
    "--plot": "some reports are pages too",
}


def _commands(group: Any, name: str = "mia") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, command in getattr(group, "commands", {}).items():
        out[f"{name} {key}"] = command
        out |= _commands(command, f"{name} {key}")
    return out


@pytest.fixture(scope="module")
def options() -> dict[str, dict[str, str]]:
    """option -> command -> help."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, command in _commands(typer.main.get_command(app)).items():
        for p in command.params:
            longest = max((o for o in p.opts if o.startswith("--")), key=len, default=None)
            if longest not in (None, "--help", "--version"):
                found[longest][name] = getattr(p, "help", "") or ""
    return found


def test_one_name_has_one_meaning(options: dict[str, dict[str, str]]) -> None:
    for name, by_command in options.items():
        texts = {re.sub(r"; default[^.]*\.|Default[^.]*\.", ".", t) for t in by_command.values()}
        if name not in OWN_MEANING:
            assert len(texts) == 1, f"{name}: {by_command}"


def test_the_page_lists_every_option_that_commands_share(
    options: dict[str, dict[str, str]],
) -> None:
    listed = set(re.findall(r"^\| `(?:-\w`, `)?(--[\w-]+)", PAGE.read_text(), re.M))
    shared = {name for name, by_command in options.items() if len(by_command) > 1}
    assert shared <= listed, f"missing: {sorted(shared - listed)}"
    assert listed <= options.keys(), f"no such option: {sorted(listed - options.keys())}"
