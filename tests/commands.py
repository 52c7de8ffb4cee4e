"""Runs commands in this process, as a person types them: `run`, `document` and `refused`.

Tests in tests/cli run in an empty folder with a tiny model (tests/cli/conftest.py).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from oracle import Oracle
from typer.main import get_command
from typer.testing import CliRunner, Result

from mia.cli import app


def run(*words: str, stdin: str | None = None, code: int = 0) -> Result:
    """A command that must exit with `code`. It uses one thread unless the words say otherwise:
    on a busy machine a barrier between two costs more than the tiny models take."""
    name = _command(*words)
    threads = ["-t", "1"] if _takes_threads(*name) and not {"-t", "--threads"} & {*words} else []
    result = CliRunner().invoke(app, [*name, *threads, *words[len(name) :]], input=stdin)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def document(*words: str, stdin: str | None = None) -> dict[str, Any]:
    """What a command prints with --json."""
    value: dict[str, Any] = json.loads(run(*words, "--json", stdin=stdin).stdout)
    return value


def refused(*words: str) -> str:
    """The message of a command that fails: one line on stderr, nothing on stdout, exit code 1."""
    result = run(*words, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("mia: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("mia: ").removesuffix("\n")


def shown_help(*words: str) -> str:
    """The help of a command, without frames and line breaks."""
    result = CliRunner().invoke(
        app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.replace("│", " ").split())


def greedy(path: Path, tokens: list[int], edits: Any, n: int) -> list[int]:
    """The oracle's continuation of a prompt under edits, what a command must generate."""
    oracle = Oracle(path)
    out: list[int] = []
    for _ in range(n):
        out.append(int(oracle.run([*tokens, *out], edits)["logits"][-1].argmax()))
    return out


@cache
def _tree() -> Any:
    return get_command(app)


def _command(*words: str) -> tuple[str, ...]:
    """The words that name the command: ("vector", "train")."""
    command = _tree()
    for i, word in enumerate(words):
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return words[:i]
    return words


@cache
def _takes_threads(*name: str) -> bool:
    command = _tree()
    for word in name:
        command = command.commands[word]
    return any("--threads" in parameter.opts for parameter in command.params)
