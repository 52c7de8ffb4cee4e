"""The command line as a whole: what starting it costs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from mia.cli import app


def test_import_and_help_stay_light() -> None:
    """No numpy, no llama.cpp: what makes start-up slow is not even imported."""
    code = (
        "import sys, mia, mia.cli\n"
        "heavy = {'numpy', 'llama_cpp', 'safetensors', 'huggingface_hub', 'matplotlib', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import mia

    for name in mia.__all__:
        assert getattr(mia, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mia.nothing


def test_paragraphs_of_help_are_not_broken_into_lines() -> None:
    def all_commands(group: Any) -> Iterator[Any]:
        for command in getattr(group, "commands", {}).values():
            yield command
            yield from all_commands(command)

    for command in all_commands(typer.main.get_command(app)):
        for paragraph in (command.help or "").split("\n\n"):
            assert "\n" not in paragraph, f"{command.name}: {paragraph}"
