"""The command line as a whole: what starting it costs, and how it ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import run
from typer.testing import CliRunner

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


# -- how it ends ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--top-kk", "3"], "no such option: --top-kk"),
        (["run", "--seed", "abc"], "invalid value for '--seed'"),
        (["patch", "l_out", "--patch-mode", "swap"], "'swap' is not one of 'replace', 'add'"),
        (["steer"], "missing argument"),
        (["frob"], "no such command 'frob'"),
        (["run", "--patch", "l_out-1", "a"], "--patch expects 4 values, got 2"),
        (["models", "convert", "a"], "missing argument"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(words: list[str], message: str) -> None:
    result = run(*words, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and message in result.stderr
    name = "mia" if words == ["frob"] else " ".join(["mia", *words[: 1 + (words[0] == "models")]])
    assert result.stderr.startswith("mia: ") and result.stderr.endswith(f"; see {name} --help\n")


@pytest.mark.parametrize(
    ("words", "code", "kind", "message"),
    [
        (["steer", "no.gguf", "-p", "x"], 1, "FileError", "there is no file no.gguf"),
        (["logit-lens", "l_outt", "-p", "x"], 1, "SiteError", "unknown site 'l_outt'"),
        (["run", "--seed", "abc"], 2, "UsageError", "invalid value for '--seed'"),
    ],
)
def test_an_error_leaves_a_document_where_one_is_expected(
    words: list[str], code: int, kind: str, message: str
) -> None:
    result = run(*words, "--json", code=code)
    error = json.loads(result.stdout)["error"]
    assert error.keys() == {"type", "message"} and error["type"] == kind
    assert error["message"].startswith(message)
    assert result.stderr == f"mia: {error['message']}\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes break in another way")
@pytest.mark.parametrize("words", [["--help"], ["tasks"], ["sites", "--graph"], ["tokens", "-pa"]])
def test_a_reader_that_leaves_is_no_error(words: list[str], path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mia", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"MIA_MODEL": str(path)},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# -- the Tab key ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mia ru", {"run"}),
        ("mia run --pa", {"--patch", "--patch-mode"}),
        ("mia run -m smo", {"smollm2"}),
        ("mia heads --score pre", {"previous"}),
        ("mia logit-lens attn_n", {"attn_norm"}),
        ("mia logit-lens resid_mid ffn_i", {"ffn_inp"}),
        ("mia save l_out-3+resid_p", {"l_out-3+resid_pre", "l_out-3+resid_post"}),
        ("mia save l_out-3 a", set()),  # a file: the shell's
        ("mia vector train --site mlp_o", {"mlp_out"}),
        ("mia vector train sentim", {"sentiment"}),
        ("mia caa train agree", {"agree_vs_accurate"}),
        ("mia task-vector conflict present_gerund present_pa", {"present_past"}),
        ("mia models pull smo", {"smollm2"}),
    ],
)
def test_tab_completes(typed: str, offered: set[str]) -> None:
    environment = {
        "_MIA_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    result = CliRunner().invoke(app, [], prog_name="mia", env=environment)
    assert offered == set(result.stdout.split()), result.stderr


def test_completion_is_light_and_survives_a_broken_models_toml(tmp_path: Path) -> None:
    """No numpy even for names; and no traceback in the middle of a line that is typed."""
    (tmp_path / "models.toml").write_text("[broken")
    code = "import sys, mia.cli\ntry: mia.cli.main()\nfinally: assert 'numpy' not in sys.modules"
    for typed in ("mia logit-lens l_", "mia task-vector train ant", "mia run -m smo"):
        environment = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | environment | {"_MIA_COMPLETE": "complete_bash"},
        )
        assert (done.returncode, done.stderr) == (0, "")


# -- a prompt without a BOS -------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["tokens"],
        ["run", "-n", "1"],
        ["logit-lens"],
        ["save", "l_out", "a.safetensors"],
        ["attention"],
        ["explore", "-n", "1"],
        ["ablate", "--answer", " is", "--heads", "1.*"],
        ["attribute", "--answer", " is"],
        ["perplexity"],
        ["patch", "l_out-1", "--subtract-token", " is", "--to-token-idx", "0"],
    ],
    ids=lambda words: words[0],
)
def test_a_missing_bos_is_told_once(
    words: list[str], path_without_bos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mia.measure.prompts.first_token_is_sink", lambda model: True)
    words = [*words, "-p", "The capital of France is", "-m", str(path_without_bos)]
    told = run(*words).stderr
    assert told.count("BOS") == 1
    assert "sink of the first token 'The'" in told and "--bos puts <|endoftext|> there" in told
    assert "BOS" not in run(*words, "-q").stderr
    assert "BOS" not in run(*words, "--bos").stderr
    if words[0] != "patch":  # which changes the first token itself
        assert "BOS" not in run(*words, "--no-bos").stderr


def test_a_model_without_sinks_needs_no_bos(path_without_bos: Path) -> None:
    assert run("run", "-p", "The cat", "-n", "1", "-m", str(path_without_bos)).stderr == ""
