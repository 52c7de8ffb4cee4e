"""mia replay: damaged results, changed files, other models, and what a stranger's result may do."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import document, refused, run
from letters import write_tasks
from one_prompt import PROMPT
from tiny_gguf import write_tiny

import mia
from mia.errors import FileError
from mia.io.runs import Run
from mia.methods.replay import replay
from mia.methods.rerun import command_line

RUN = ("run", "-p", PROMPT, "-n", "3")


def saved(*words: str, stdin: str | None = None) -> dict[str, Any]:
    """The document of a command, kept in r.json."""
    result = document(*words, stdin=stdin)
    write(result)
    return result


def write(result: dict[str, Any]) -> None:
    Path("r.json").write_text(json.dumps(result))


def replayed(*words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The document of a replay of r.json, and its notices."""
    result = run("replay", "r.json", "--json", *words, code=code)
    value: dict[str, Any] = json.loads(result.stdout)
    return value, result.stderr


def test_a_document_says_how_it_was_made(path: Path, vector_files: None) -> None:
    made = saved("run", "-p", PROMPT, "-n", "2", "--steer", "v.gguf")
    entry = made["run"]
    assert entry["command"] == "run"
    assert entry["arguments"]["prompt"] == PROMPT and entry["arguments"]["n_predict"] == 2
    assert entry["arguments"]["steer"] == ["v.gguf"] and entry["arguments"]["seed"] == 0
    assert not {"json", "out", "quiet"} & entry["arguments"].keys()
    assert entry["files"].keys() == {"v.gguf"} and len(entry["files"]["v.gguf"]) == 64
    assert entry["model"]["sha256"] == made["model"]["sha256"]
    assert entry["model"]["threads"] == 1 and "stdin" not in entry
    assert entry["setup"].keys() == {
        "mia", "llama_cpp_python", "build", "extra_buffers", "processor"
    }  # fmt: skip


def test_the_command_line_is_shown_and_the_result_compared() -> None:
    saved(*RUN)
    result = run("replay", "r.json")
    assert result.stderr.startswith("mia: running mia run --model ")
    assert f"--prompt '{PROMPT}' --n-predict 3\n" in result.stderr
    assert result.stdout.startswith("exact: all ")
    assert "output_tokens.[].logprob  log-probabilities" in result.stdout


def test_python_needs_one_call() -> None:
    saved(*RUN)
    with pytest.warns(mia.MiaWarning, match="running mia run"):
        report = replay("r.json")
    assert (report.verdict, report.failed) == ("exact", False)


@pytest.mark.parametrize(
    ("off", "tolerance", "verdict"),
    [
        (1e-6, None, "different"),
        (1e-3, "1e-4", "different"),
        (1e-3, "1e-2", "within tolerance"),
    ],
)
def test_a_changed_number(off: float, tolerance: str | None, verdict: str) -> None:
    made = saved(*RUN)
    made["output_tokens"][1]["logprob"] += off
    write(made)
    words = [] if tolerance is None else ["--tolerance", tolerance]
    report, _ = replayed(*words, code=int(verdict == "different"))
    assert report["verdict"] == verdict
    (moved,) = (f for f in report["fields"] if f["differ"])
    assert moved["field"] == "output_tokens.[].logprob"
    assert (moved["n"], moved["differ"]) == (3, 1)
    assert moved["largest"] == pytest.approx(off, rel=1e-6)
    assert moved["mean"] == pytest.approx(off / 3, rel=1e-6)
    assert [d["path"] for d in report["differences"]] == (
        ["output_tokens.1.logprob"] if verdict == "different" else []
    )


def test_a_changed_text_or_token_is_different_at_any_tolerance() -> None:
    made = saved(*RUN)
    made["output"] += "!"
    made["output_tokens"][0]["id"] += 1
    write(made)
    report, _ = replayed("--tolerance", "1000", code=1)
    assert report["verdict"] == "different" and report["n_differences"] == 2
    assert {d["path"] for d in report["differences"]} == {"output", "output_tokens.0.id"}
    plain = run("replay", "r.json", code=1).stdout
    assert plain.startswith("different: 2 of ")
    assert f"output: {json.dumps(made['output'], ensure_ascii=False)} -> " in plain


def test_another_model(path: Path, folder: Path) -> None:
    model = folder / "m.gguf"
    shutil.copy(path, model)
    made = saved(*RUN, "-m", "m.gguf")
    shutil.copy(write_tiny(folder / "other.gguf", "llama", seed=7), model)
    message = refused("replay", "r.json", "-q")
    assert message.startswith("the result was made with m (SHA-256 ")
    assert made["model"]["sha256"][:12] in message and "m is another file" in message
    report, notices = replayed("-m", str(path))  # the same weights elsewhere
    assert (report["verdict"], report["tolerance"]) == ("exact", 0)
    report, notices = replayed("-m", "other.gguf", code=1)
    assert "other is another file" in notices
    # F32 weights: by default what roundings move, which this is not
    assert report["verdict"] == "different" and report["tolerance"] == 1e-4


def test_a_vector_that_was_edited_since(vector_files: None) -> None:
    saved("steer", "v.gguf", "-p", PROMPT, "-n", "2")
    assert replayed()[0]["verdict"] == "exact"
    data = bytearray(Path("v.gguf").read_bytes())
    data[-1] ^= 1
    Path("v.gguf").write_bytes(data)
    assert "v.gguf has changed: its SHA-256 was " in refused("replay", "r.json", "-q")
    Path("v.gguf").unlink()
    assert (
        refused("replay", "r.json", "-q") == "there is no file v.gguf, which the result is made of"
    )


def test_captures_texts_and_shipped_data_are_files_of_a_result(
    folder: Path, vector_files: None
) -> None:
    run("save", "l_out-1", "a.safetensors", "-p", PROMPT)
    Path("prompt.txt").write_text(PROMPT)
    patched = ("patch", "l_out-1", "a.safetensors", "-f", "prompt.txt", "-n", "1")
    assert saved(*patched)["run"]["files"].keys() == {"a.safetensors", "prompt.txt"}
    assert replayed()[0]["verdict"] == "exact"
    several = ("run", "-p", PROMPT, "-n", "1", "--patch", "l_out-1", "a.safetensors", "-1", "0..1")
    made = saved(
        *several, "--patch", "l_out-1", "a.safetensors", "0", "-1", "--save", "q-1", "q.npy"
    )
    assert made["run"]["arguments"]["patch"][0] == ["l_out-1", "a.safetensors", "-1", "0..1"]
    Path("q.npy").unlink()
    assert replayed()[0]["verdict"] == "exact" and not Path("q.npy").exists()
    Path("prompt.txt").write_text("another")
    assert saved("tasks", "antonym")["run"]["files"].keys() == {"mia:data/tasks/antonym.jsonl"}
    assert replayed()[0]["verdict"] == "exact"


def test_stdin_is_part_of_the_document() -> None:
    made = saved("tokens", "-f", "-", stdin=PROMPT)
    assert made["run"]["stdin"] == PROMPT
    assert replayed()[0]["verdict"] == "exact"
    del made["run"]["stdin"]
    write(made)
    assert "does not hold what it read from stdin" in refused("replay", "r.json", "-q")


def test_another_version_or_build_is_said_and_allows_the_noise_of_the_weights() -> None:
    made = saved(*RUN)
    made["output_tokens"][0]["logprob"] += 1e-5
    made["run"]["setup"] |= {"mia": "0.0.1", "build": "another"}
    write(made)
    report, notices = replayed()
    assert report["verdict"] == "within tolerance" and report["tolerance"] == 1e-4
    assert f"mia: mia was 0.0.1, is {mia.__version__}\n" in notices
    assert "mia: the build of llama.cpp was another, is " in notices
    assert len(report["notices"]) == 2


def test_the_variable_of_the_day_does_not_choose_the_model() -> None:
    saved(*RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_MODEL", "gone.gguf")
        assert replayed()[0]["verdict"] == "exact"
    made = Run("tokens", {"model": "smollm2", "prompt": "a", "chat": False, "bos": None})
    assert command_line(made) == ["tokens", "--model", "smollm2", "--prompt", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"na', "r.json is not JSON: "),
        ("", "r.json is not JSON: "),
        ("[" * 100_000, "r.json is not JSON: "),
        ('{"run": "\\ud800"}', "r.json cannot be replayed: it does not say which command made it"),
        ("[1, 2]", "r.json is no result of a command"),
        ("{}", "r.json cannot be replayed: it does not say which command made it"),
        ('{"run": 3}', "r.json cannot be replayed: it does not say which command made it"),
        ('{"run": {"command": "run"}}', "its run has no command and arguments"),
        ('{"run": {"command": 3, "arguments": {}}}', "run.command is 3"),
        ('{"run": {"command": "run", "arguments": {}, "files": {"a": 1}}}', "no table of SHA-256"),
        ('{"run": {"command": "fly", "arguments": {}}}', "there is no command mia 'fly'"),
        ('{"run": {"command": "vector", "arguments": {}}}', "there is no command mia 'vector'"),
        ('{"run": {"command": "", "arguments": {}}}', "there is no command mia ''"),
        ('{"run": {"command": "doctor", "arguments": {}}}', "it describes the machine"),
        ('{"run": {"command": "run", "arguments": {"x": 1}}}', "mia run has no option 'x'"),
        ('{"run": {"command": "run", "arguments": {"prompt": {}}}}', "{} is no argument of mia run"),
        ('{"run": {"command": "run", "arguments": {"n_predict": "a"}}}', "cannot be run so: "),
        ('{"run": {"command": "run", "arguments": {"patch": [["a"]]}}}', "cannot be run so"),
        ('{"run": {"command": "run", "arguments": {"save": ["-a"]}}}', "--save expects 2 values"),
    ],
)  # fmt: skip
def test_what_is_no_result(text: str, message: str) -> None:
    Path("r.json").write_text(text)
    assert message in refused("replay", "r.json", "-q")


def test_odd_numbers_are_compared() -> None:
    made = saved(*RUN)
    made["output_tokens"][0]["logprob"] = float("nan")
    made["output_tokens"][1]["logprob"] = 10**400
    made["output_tokens"][2]["logprob"] = None
    made["more"] = {"deep": []}
    write(made)
    report, _ = replayed("--tolerance", "9", code=1)
    paths = [d["path"] for d in report["differences"]]
    assert paths == [*(f"output_tokens.{i}.logprob" for i in range(3)), "more.deep"]
    assert report["differences"][-1]["now"] == "(absent)"


# -- a result of a stranger --------------------------------------------------------------------


def test_a_result_reads_no_file_that_it_does_not_know(folder: Path) -> None:
    made = saved("tokens", "-p", PROMPT)
    (folder / "secret.txt").write_text("key")
    del made["run"]["arguments"]["prompt"]
    made["run"]["arguments"]["prompt_file"] = "secret.txt"
    write(made)
    assert refused("replay", "r.json", "-q") == (
        "secret.txt is not among the files that the result says it is made of"
    )
    made["run"]["files"] = {"secret.txt": "0" * 64}
    write(made)
    assert "secret.txt has changed" in refused("replay", "r.json", "-q")


@pytest.mark.parametrize(
    "arguments",
    [
        {"save": [["l_out-1", "victim.txt"]]},
        {"out": "victim.txt", "json": True, "quiet": True},
    ],
)
def test_a_result_writes_nothing(arguments: dict[str, Any], folder: Path) -> None:
    made = saved(*RUN)
    (folder / "victim.txt").write_text("mine")
    made["run"]["arguments"] |= arguments
    write(made)
    replayed("--tolerance", "0", code=0)
    assert (folder / "victim.txt").read_text() == "mine"


def test_pictures_are_not_drawn_again(folder: Path) -> None:
    saved("logit-lens", "l_out", "-p", PROMPT, "--plot", "lens.png")
    (folder / "lens.png").unlink()
    assert replayed()[0]["verdict"] == "exact"
    assert not (folder / "lens.png").exists()


def test_functions_are_imported_only_from_a_trusted_result(
    folder: Path, vector_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "ours_of_replay.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\ndef f(h, v, c): return h + c * v\n"
    )
    made = saved("steer", "v.gguf", "-p", PROMPT, "-n", "2", "--operator", "ours_of_replay:f")
    assert made["run"]["files"].keys() == {"v.gguf", "ours_of_replay.py"}
    monkeypatch.delitem(sys.modules, "ours_of_replay")
    (folder / "imported").unlink()
    assert "'ours_of_replay:f': it is imported only if" in refused("replay", "r.json", "-q")
    assert not (folder / "imported").exists()
    assert replayed("--trust")[0]["verdict"] == "exact"
    monkeypatch.delitem(sys.modules, "ours_of_replay")
    (folder / "ours_of_replay.py").write_text("raise SystemExit\n")
    assert "ours_of_replay.py has changed" in refused("replay", "r.json", "-q", "--trust")


def test_the_shown_command_line_is_safe_for_a_terminal() -> None:
    made = saved("tokens", "-p", PROMPT)
    made["run"]["arguments"]["prompt"] = "a\x1b]52;c;aGk=\x07\nb"
    made["run"]["setup"]["processor"] = "\x1b[2J"
    write(made)
    result = run("replay", "r.json", code=1)
    assert "\x1b" not in result.stdout + result.stderr
    made = saved("tasks", "antonym")
    made["run"]["files"] = dict.fromkeys(made["run"]["files"], "\x1b[2J")
    write(made)
    assert "\x1b" not in refused("replay", "r.json", "-q")


def test_a_value_that_looks_like_an_option_stays_a_value() -> None:
    made = saved("tokens", "-p", "--help")
    assert made["tokens"] and replayed()[0]["verdict"] == "exact"
    made["run"]["arguments"]["prompt"] = "--patch"
    write(made)
    assert replayed(code=1)[0]["verdict"] == "different"


def test_a_bad_tolerance_is_refused_in_python() -> None:
    with pytest.raises(mia.UsageError, match="tolerance must be 0 or more, got nan"):
        replay("r.json", tolerance=float("nan"))
    with pytest.raises(FileError, match=r"cannot read gone\.json"):
        replay("gone.json")


def test_files_that_a_command_writes_itself_are_not_written_again(
    folder: Path, vector_files: None
) -> None:
    """Among them a picture that changes what the document holds."""
    write_tasks(folder)
    words = ("next.json", "--sets", "2", "--dummies", "2", "--plot", "curve.png")
    pytest.importorskip("matplotlib")
    assert "--plot" in command_of("task-vector", "eval", *words)
    assert not (folder / "curve.png").exists()
    assert "--out" in command_of("vector", "train", "pairs.jsonl", "-o", "deep/w.gguf", made="deep")
    assert not (folder / "deep").exists()


def command_of(*words: str, made: str = "") -> str:
    """The command line of an exact replay, what the command wrote taken away before."""
    if made:
        Path(made).mkdir()
    before = set(Path().rglob("*.*"))
    saved(*words)
    for file in set(Path().rglob("*.*")) - before - {Path("r.json")}:
        if "cache" not in file.parts:
            file.unlink()
    if made:
        shutil.rmtree(made)
    report, _ = replayed()
    assert report["verdict"] == "exact"
    line: str = report["command"]
    return line


def test_a_terminal_shows_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(*RUN)
    made["output_tokens"][0]["logprob"] += 1e-5
    write(made)
    monkeypatch.setattr("mia.cli._command.on_terminal", lambda: True)
    shown = run("replay", "r.json", code=1).stdout
    assert shown.startswith("different: 1 of ") and "┃ kind" in shown


def test_two_runs_give_the_same_bits_here(path: Path) -> None:
    """Why the default tolerance is 0."""
    for words in (("logit-lens", "l_out"), ("attention",), ("perplexity",)):
        first = document(*words, "-p", PROMPT)
        assert document(*words, "-p", PROMPT) == first


@pytest.mark.slow
@pytest.mark.parametrize("words", [("logit-lens", "l_out"), ("attention",), ("run", "-n", "20")])
def test_smollm2_gives_the_same_digits_with_another_number_of_threads(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mia.llama.c_numbers.processors", lambda: 2)  # on one core too
    made = saved(*words, "-p", PROMPT, "-m", "smollm2", "-t", "1")
    assert replayed()[0]["verdict"] == "exact"
    made["run"]["arguments"]["threads"] = 2
    write(made)
    report, notices = replayed("--tolerance", "0")
    assert report["verdict"] == "exact" and "the number of threads was 1, is 2" in notices
