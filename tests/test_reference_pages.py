"""docs/commands.md is what the commands say of themselves; tables of sites and operators are
those of the code."""

import re
from typing import Any

import pytest
from typer.main import get_command

import reference_pages
from mia.cli import app
from mia.edits import OPERATORS


@pytest.mark.parametrize("file", reference_pages.pages())
def test_a_page_is_up_to_date(file: str) -> None:
    text = (reference_pages.ROOT / file).read_text(encoding="utf-8")
    assert text == reference_pages.pages()[file], "run scripts/make_reference"


def test_tables_are_written_between_their_comments() -> None:
    text = (
        "a\n<!-- sites -->\nold\n<!-- /sites -->\nb\n<!-- operators -->\n\n<!-- /operators -->\nc"
    )
    lines = reference_pages.with_tables(text).splitlines()
    assert (lines[:2], lines[-2:]) == (["a", "<!-- sites -->"], ["<!-- /operators -->", "c"])
    assert "| `q.i` | `Qcur-i` | `blocks.i.attn.hook_q` | n_head × head_dim |" in lines
    assert "| `resid_pre.i` |  | `blocks.i.hook_resid_pre` | n_embd |" in lines
    assert "| `replace` | c·v |" in lines and "old" not in lines


def typers_options(command: Any, words: tuple[str, ...] = ("mia",)) -> dict[str, set[str]]:
    """What typer itself reads: {"mia run": {"--model", ...}}."""
    own = {o for p in command.params for o in [*p.opts, *p.secondary_opts] if o.startswith("-")}
    options = {" ".join(words): own - {"--help"}}
    for name, child in getattr(command, "commands", {}).items():
        options |= typers_options(child, (*words, name))
    return options


def test_the_page_has_every_command_and_option() -> None:
    listed = {
        " ".join(c.words): {
            name for o in c.options if not o.is_argument for n in o.names for name in n.split("/")
        }
        for c in reference_pages.commands(app)
    }
    listed["mia"] |= {"--install-completion", "--show-completion"}  # typer's, in the guide
    assert listed == typers_options(get_command(app))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7.* of <s>", r"7.\* of \<s>"),
        ("zero|mean FILE [more]", r"zero\|mean FILE \[more]"),
        ("\\n is\n read", r"\\n is read"),
    ],
)
def test_help_is_shown_as_it_is(text: str, expected: str) -> None:
    assert reference_pages.escaped(text) == expected


def test_help_names_every_operator_that_takes_a_value() -> None:
    options = [o for c in reference_pages.commands(app) for o in c.options]
    (text,) = {o.help for o in options if "--operator" in o.names}
    words = re.findall(r"\w+", text)
    assert [o.name for o in OPERATORS.values() if o.value and o.name not in words] == []
