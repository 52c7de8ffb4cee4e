"""Options mean the same everywhere, docs/options.md says what, and none is without effect."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import refused, run

from mia.cli import app
from mia.llama.library import library_info

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
#: options of one name that cannot mean quite the same, and why
OWN_MEANING = {
    "--out": "commands that make a file write that file",
    "--bos": "in-context tasks put it in front by default",
    "--plot": "some reports are pages too",
    "--kl-budget": "steer chooses a coefficient by it, tune a setting",
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


# -- without effect ---------------------------------------------------------------------

_P = ["-p", "The cat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*_P, "--keep-newline"], "--keep-newline is for a prompt from a file or stdin (-f)"),
        ([*_P, "--patch-mode", "add"], "--patch-mode needs --patch"),
        ([*_P, "--steer-coeff", "2"], "--steer-coeff and --steer-layers need --steer"),
        ([*_P, "--steer-layers", "2"], "--steer-coeff and --steer-layers need --steer"),
        ([*_P, "--ablate-with", "zero"], "no heads to ablate: set ablate or select"),
        ([*_P, "--ablate-attention"], "no heads to ablate: set ablate or select"),
        (
            [*_P, "--ablate", "0.1", "--ablate-seed", "1"],
            "--ablate-seed needs --ablate-with resample or resample-from FILE",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "logit-lens", "save", "attention", "perplexity"])
def test_changes_without_effect_are_refused(command: str, words: list[str], message: str) -> None:
    more = ["l_out-1", "a.safetensors"] if command == "save" else []
    assert refused(command, *more, *words) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["heads", "--repeat-random", "5", "--chat"], "--chat needs a prompt (-p, -f)"),
        (["heads", *_P, "--prompts", "4"], "--prompts needs --repeat-random N"),
        (["heads", "--repeat-random", "5", "--draws", "4"], "--draws needs --ablate-top K"),
        (["logit-lens", "embed", *_P, "--layers", "1"], "layers 1: embed has no layers"),
        (
            ["vector", "show", "v.gguf", "-k", "0", "--ctx", "9"],
            "--ctx needs a model, and -k 0 opens none",
        ),
        (
            ["vector", "combine", "v.gguf", "-o", "w.safetensors", "--layer-zero"],
            "--layer-zero is for a .gguf; w.safetensors keeps layer 0 anyway",
        ),
        (
            ["caa", "train", "ab.json", "-o", "w.safetensors", "--layer-zero"],
            "--layer-zero is for a .gguf; w.safetensors keeps layer 0 anyway",
        ),
        (
            ["models", "--json", "pull", "x"],
            "options of mia models pull stand behind its name",
        ),
    ],
)
def test_options_that_another_would_need_are_refused(
    words: list[str], message: str, vector_files: None
) -> None:
    result = run(*words, code=1)
    assert result.stderr == f"mia: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "0"], "--seed does nothing: at temperature 0 nothing is drawn"),
        (
            ["--top-p", ".5", "--min-p", ".1"],
            "--top-p and --min-p do nothing: at temperature 0 nothing is drawn",
        ),
        (
            ["-n", "0", "--temperature", "1"],
            "--temperature does nothing: -n 0 generates nothing",
        ),
        (["--no-baseline"], "nothing is changed, so that there is one run"),
        (["--repeat-penalty", "1.2"], ""),
        (["--temperature", "1", "--seed", "2", "--top-p", ".5"], ""),
        (["--ablate", "0.1", "--no-baseline"], ""),
    ],
)
def test_options_of_a_sweep_that_do_nothing_are_told(words: list[str], message: str) -> None:
    told = run("run", *_P, "-n", "1", *words).stderr
    assert message in told if message else told == ""
    assert run("run", *_P, "-n", "1", *words, "-q").stderr == ""


def test_gpu_layers_without_a_gpu_are_told() -> None:
    gpu = library_info()["gpu"] == "yes"
    assert ("built for the CPU alone" in run("tokens", *_P, "--gpu-layers", "1").stderr) != gpu
