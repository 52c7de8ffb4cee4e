"""What a command prints, Python prints in three lines at most."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import document, refused, run
from letters import write_tasks
from one_prompt import PROMPT
from tiny_gguf import write_tiny
from typer.main import get_command

from mia.cli import app
from mia.methods.rerun import NOT_REPLAYABLE
from mia.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")  # the command says them

#: command -> the same in Python, with `m`, the model, and P, the prompt
SAME: dict[str, tuple[list[str], str]] = {
    "tokens": (["-p", PROMPT], "from mia.methods import overview\nreport = overview.tokens(m, P)"),
    "sites": ([], "from mia.methods import overview\nreport = overview.sites(m)"),
    "logit-lens": (["l_out", "-p", PROMPT, "-k", "3"], 'report = m.lens(m.look(P, "l_out"), k=3)'),
    "save": (
        ["l_out-1", "a.safetensors", "-p", PROMPT],
        'report = m.look(P, "l_out-1")\nreport.save("a.safetensors")',
    ),
    "run": (
        ["-p", PROMPT, "-n", "3", "--ablate", "1.2"],
        "from mia import Changes\n"
        'edits = Changes(ablate="1.2").edits(m, m.ids(P))\n'
        "report = m.generate(P, 3, edits=edits, baseline=True)",
    ),
    "patch": (
        ["l_out-1", "a.npy", "-p", PROMPT, "-n", "3"],
        "from mia.methods.patching import patches\n"
        'edits = patches(m, m.ids(P), "l_out-1", ["a.npy"])\n'
        "report = m.generate(P, 3, edits=edits, baseline=True)",
    ),
    "sweep": (
        ["-p", PROMPT, "--zero", "--over", "layer", "--token-idx", "-1"],
        "from mia.methods.sweep import sweep\n"
        "from mia.sweeps.experiments import Ablation\n"
        'report = sweep(m, P, Ablation(), over="layer", tokens="-1")',
    ),
    "merge": (
        ["part.jsonl", "-o", "all.jsonl"],
        'from mia.methods.sweep import merge\nreport = merge(["part.jsonl"], "all.jsonl")',
    ),
    "diff": (
        ["tiny.gguf", "other.gguf", "-p", PROMPT],
        "from mia import Model\n"
        "from mia.methods.diff import diff\n"
        'with Model("tiny.gguf", threads=1) as a, Model("other.gguf", threads=1) as b: report = diff(a, b, P)',
    ),
    "why": (
        ["-p", PROMPT, "--no-parts"],
        "from mia.methods.why import why\nreport = why(m, P, parts=False)",
    ),
    "attention": (
        ["-p", PROMPT, "--layers", "1", "-k", "2"],
        'from mia.methods.attention import attention\nreport = attention(m, P, layers="1", k=2)',
    ),
    "experts": (
        ["-m", "mixture.gguf", "-p", PROMPT, "--layers", "1..2", "-k", "2"],
        "from mia import Model\n"
        "from mia.methods.experts import experts\n"
        'with Model("mixture.gguf", threads=1) as m: report = experts(m, P, layers="1..2", k=2)',
    ),
    "explore": (
        ["-p", PROMPT, "-n", "3"],
        "from mia.methods.explore import explore\nreport = explore(m, P, n_predict=3)",
    ),
    "heads": (
        ["--repeat-random", "5", "--prompts", "2"],
        "from mia.methods.heads import RandomRepeats, heads\nreport = heads(m, RandomRepeats(5, 2))",
    ),
    "ablate": (
        ["-p", PROMPT, "--answer", " Paris"],
        'from mia.methods.ablation import ablate\nreport = ablate(m, P, " Paris")',
    ),
    "attribute": (
        ["-p", PROMPT, "--answer", "a"],
        'from mia.methods.attribution import attribute\nreport = attribute(m, P, "a")',
    ),
    "steer": (
        ["v.gguf", "-p", PROMPT, "--coeff", "1,2", "-n", "3"],
        "from mia.methods.steer import steer\n"
        'report = steer(m, P, "v.gguf", coeffs=[1, 2], n_predict=3)',
    ),
    "steer-explain": (
        ["v.gguf", "-p", PROMPT],
        'from mia.methods.steer import explain\nreport = explain(m, P, "v.gguf")',
    ),
    "bake": (
        ["v.gguf", "-o", "w.gguf", "--coeff", "0.5"],
        'from mia.methods.bake import bake\nreport = bake(m, "v.gguf", "w.gguf", strength=0.5)',
    ),
    "steer-words": (
        [
            "v.gguf",
            "-p",
            PROMPT,
            "--words",
            "positive_words",
            "--samples",
            "2",
            "-n",
            "4",
            "--temperature",
            "1",
        ],
        "from mia.methods.listed_words import listed_words\n"
        'report = listed_words(m, P, "v.gguf", "positive_words", samples=2, n_predict=4)',
    ),
    "tune": (
        ["v.gguf", "-p", PROMPT, "--answer", "a", "--runs", "12", "--neutral-tokens", "16"],
        "from mia.methods.tune import tune\n"
        "from mia.tuning import scores, trials\n"
        'report = tune(m, P, "v.gguf", scores.Answer("a"), runs=12, neutral=trials.Neutral(tokens=16))',
    ),
    "actadd": (
        [
            "--plus",
            "cat",
            "--minus",
            "dog",
            "--coeff",
            "3",
            "--layers",
            "1",
            "-p",
            PROMPT,
            "-n",
            "3",
        ],
        "from mia.methods import actadd\n"
        'report = actadd.add(m, P, [actadd.Addition("cat", "dog", 3, 1)], n_predict=3)',
    ),
    "perplexity": (
        ["-p", PROMPT],
        "from mia.methods.perplexity import measure\nreport = measure(m, P)",
    ),
    "perplexity-sweep": (
        ["--on", "on.txt", "--steer", "v.gguf"],
        "from mia.methods.perplexity_sweep import sweep\n"
        'report = sweep(m, {"on-topic": "on.txt"}, "v.gguf")',
    ),
    "vector train": (
        ["pairs.jsonl", "-o", "w.gguf"],
        "from mia.datasets.pairs import select_pairs\n"
        "from mia.methods import contrast\n"
        'report = contrast.learn(m, select_pairs("pairs.jsonl"), name="w").write("w.gguf")',
    ),
    "vector show": (
        ["v.gguf"],
        'from mia.vectors.report import inspect\nreport = inspect("v.gguf", m)',
    ),
    "vector combine": (
        ["2*v.gguf", "-o", "w.gguf"],
        "from mia.vectors.expression import read\n"
        "from mia.vectors.report import VectorReport\n"
        'report = VectorReport(read("2*v.gguf")).write("w.gguf")',
    ),
    "vector convert": (
        ["v.gguf", "-o", "w.safetensors"],
        "from mia.vectors import load\n"
        "from mia.vectors.report import VectorReport\n"
        'report = VectorReport(load("v.gguf")).write("w.safetensors")',
    ),
    "caa train": (
        ["ab.json", "-o", "w.gguf"],
        "from mia.datasets.choices import select_items\n"
        "from mia.methods import caa\n"
        'report = caa.learn(m, [select_items("ab.json")]).write(["w.gguf"])',
    ),
    "caa eval": (
        ["v.gguf", "ab.json", "--layers", "1,2"],
        "from mia.datasets.choices import select_items\n"
        "from mia.methods.caa_evaluation import evaluate\n"
        'report = evaluate(m, "v.gguf", select_items("ab.json"), layers="1,2")',
    ),
    "iti train": (
        ["ab.json", "-o", "w.safetensors", "--n-heads", "2"],
        "from mia.datasets.choices import select_questions\n"
        "from mia.methods import iti\n"
        'report = iti.learn(m, select_questions("ab.json"), n_heads=2).write("w.safetensors")',
    ),
    "iti eval": (
        ["v.gguf", "ab.json"],
        "from mia.datasets.choices import select_questions\n"
        "from mia.methods.iti_evaluation import evaluate\n"
        'report = evaluate(m, "v.gguf", select_questions("ab.json"))',
    ),
    "tasks": ([], "from mia.methods import tasks\nreport = tasks.overview()"),
    "task-vector train": (
        ["next.json", "-o", "w.safetensors", "--sets", "2", "--dummies", "2"],
        "from mia.methods.task_vectors import TaskVectorTraining, train_many\n"
        'files = ["w.safetensors"]\n'
        'report = train_many(m, ["next.json"], how=TaskVectorTraining(sets=2, dummies=2), files=files)',
    ),
    "task-vector eval": (
        ["next.json", "--sets", "2", "--dummies", "2"],
        "from mia.methods.task_vectors import TaskVectorTraining, evaluate_tasks\n"
        'report = evaluate_tasks(m, ["next.json"], how=TaskVectorTraining(sets=2, dummies=2))',
    ),
    "task-vector conflict": (
        ["next.json", "before.json", "--sets", "2", "--dummies", "2"],
        "from mia.methods.task_vectors import TaskVectorTraining, conflict\n"
        'report = conflict(m, "next.json", "before.json", how=TaskVectorTraining(sets=2, dummies=2))',
    ),
    "function-vector train": (
        ["next.json", "-o", "w.safetensors", "--prompts", "2", "--effect-prompts", "1"],
        "from mia.methods.function_vectors import FunctionVectorTraining, train_many\n"
        "how = FunctionVectorTraining(prompts=2, effect_prompts=1)\n"
        'report = train_many(m, ["next.json"], how=how, files=["w.safetensors"])',
    ),
    "function-vector eval": (
        ["next.json", "--prompts", "2", "--effect-prompts", "1"],
        "from mia.methods.function_vectors import FunctionVectorTraining, evaluate_tasks\n"
        "how = FunctionVectorTraining(prompts=2, effect_prompts=1)\n"
        'report = evaluate_tasks(m, ["next.json"], how=how)',
    ),
    "function-vector compose": (
        ["next.json,next.json,next.json,next.json", "--prompts", "2", "--effect-prompts", "1"],
        "from mia.datasets.tasks import composition\n"
        "from mia.methods.function_composition import compose_tasks\n"
        'report = compose_tasks(m, [composition(",".join(["next.json"] * 4))], prompts=2, effect_prompts=1)',
    ),
    "soft-vector train": (
        [
            "next.json",
            "-o",
            "w.safetensors",
            "--evaluations",
            "20",
            "--population",
            "4",
            "--batch",
            "2",
            "--prompts",
            "2",
        ],
        "from mia.methods.icl import experiment\n"
        "from mia.methods.soft_vectors import SoftVectorTraining as T, train\n"
        'report = train(experiment(m, "next.json"), T("reinforce", 20, 4, 2, prompts=2), file="w.safetensors")',
    ),
    "soft-vector eval": (
        ["next.json", "w.safetensors"],
        "from mia.methods.soft_vectors import evaluate_task\n"
        'report = evaluate_task(m, "next.json", "w.safetensors")',
    ),
    "models": ([], "from mia.models.reports import models\nreport = models()"),
    "models cache": ([], "from mia.models.reports import copies\nreport = copies()"),
    "models convert": (
        ["tiny.gguf", "f16", "w.gguf"],
        'from mia.models.reports import convert\nreport = convert("tiny.gguf", "f16", "w.gguf")',
    ),
    "report": (
        ["tokens.json"],
        'from mia.methods.results import results\nreport = results("tokens.json")',
    ),
    "replay": (
        ["tokens.json"],
        'from mia.methods.replay import replay\nreport = replay("tokens.json")',
    ),
    "doctor": ([], "from mia.models.doctor import doctor\nreport = doctor(m)"),
}
#: `models pull` needs a hub (tests/models), `demo` smollm2 (tests/test_smollm2.py), `rpc-server` a
#: build with RPC (tests/llama/test_rpc.py), `serve` runs until it is stopped (tests/serve)
ELSEWHERE = {"models pull", "demo", "rpc-server", "serve"}


def _commands(group: Any, prefix: str = "") -> set[str]:
    names = set()
    for name, command in group.commands.items():
        inner = _commands(command, f"{prefix}{name} ") if hasattr(command, "commands") else set()
        if not inner or command.invoke_without_command:
            names.add(prefix + name)
        names |= inner
    return names


def test_every_command_is_here() -> None:
    assert SAME.keys() | ELSEWHERE == _commands(get_command(app))


@pytest.fixture
def data(folder: Path, path: Path, vector_files: None) -> None:
    write_tasks(folder)
    Path("on.txt").write_text("The cat sat\nThe sky is blue\n")
    (folder / "tiny.gguf").symlink_to(path)
    write_tiny(folder / "mixture.gguf", "mixtral")
    write_tiny(folder / "other.gguf", "llama", seed=1)
    with Model(path, threads=1) as m:
        m.look(PROMPT, "l_out-1").save("a.npy")
    run("tokens", "-p", PROMPT, "-o", "tokens.json")
    run("sweep", *SAME["sweep"][0], "--shard", "1/1", "-o", "part.jsonl")


def prepared(name: str) -> tuple[list[str], str]:
    """The row of a command, with the files that it needs."""
    words, lines = SAME[name]
    if name in ("iti train", "iti eval"):
        pytest.importorskip("sklearn")
    if name == "iti eval":
        run("iti", "train", "ab.json", "-o", "v.gguf.safetensors", "--n-heads", "2")
        words, lines = (
            ["v.gguf.safetensors", *words[1:]],
            lines.replace("v.gguf", "v.gguf.safetensors"),
        )
    if name == "soft-vector eval":
        run("soft-vector", "train", *SAME["soft-vector train"][0])
    return words, lines


@pytest.mark.filterwarnings("default::mia.notices.MiaWarning")
@pytest.mark.parametrize("name", SAME)
def test_python_prints_what_the_command_prints(name: str, path: Path, data: None) -> None:
    words, lines = prepared(name)
    assert lines.count("\n") < 3
    printed = run(*name.split(), *words).stdout
    names: dict[str, Any] = {"P": PROMPT}
    with Model(path, threads=1) as names["m"]:
        exec(lines, names)
    report = names["report"]
    assert f"{report}\n" == printed
    assert json.loads(json.dumps(report.document())) == report.document()


def files(folder: Path) -> dict[Path, bytes]:
    """What lies there, without what mia remembers."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts}


_opened: list[tuple[Path, str]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, Path)):
        path, mode, flags = arguments
        if mode is None:  # os.open
            mode = "r" if flags & os.O_ACCMODE == os.O_RDONLY else "w"
        _opened.append((Path(path).absolute(), str(mode)))


sys.addaudithook(_audit)  # for as long as Python runs


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[dict[str, str]]:
    """The files of the folder that Python opens meanwhile, by name, and how; not what mia
    remembers, and not the model."""
    global _opened
    _opened = []
    names: dict[str, str] = {}
    yield names
    events, _opened = _opened, None
    for path, mode in events:
        looked_for = mode.startswith("r") and not path.is_file()
        own = path.parent.name in ("cache", "mia", "sites")
        if path.is_relative_to(folder) and not own and not looked_for:
            names[path.relative_to(folder).as_posix()] = mode
    for model in ("tiny.gguf", "mixture.gguf", "other.gguf"):
        names.pop(model, None)


@pytest.mark.parametrize("name", SAME)
def test_a_result_is_replayed_without_drift(name: str, folder: Path, data: None) -> None:
    words, _ = prepared(name)
    inputs = files(folder)
    out = [] if any(w in words for w in ("-o", "--out")) else ["-o", "result.json"]
    with opened(folder) as names:
        printed = run(*name.split(), *words, *out, "--json").stdout
    if out:
        assert json.loads(Path("result.json").read_text()) == json.loads(printed)
    read = {n for n, mode in names.items() if mode.startswith("r")}
    assert read <= json.loads(printed).get("run", {}).get("files", {}).keys()
    Path("result.json").write_text(printed)
    if name in NOT_REPLAYABLE:
        message = refused("replay", "result.json")
        assert message.endswith(f"cannot be replayed: {NOT_REPLAYABLE[name]}")
        return
    for made in files(folder).keys() - inputs.keys() - {folder / "result.json"}:
        made.unlink()  # a replay neither needs nor makes them
    before = files(folder)
    with opened(folder) as names:
        report = document("replay", "result.json")
    assert set(names.values()) == {"r"}
    assert (report["verdict"], report["notices"], report["tolerance"]) == ("exact", [], 0)
    assert report["n_differences"] == 0 and all(f["differ"] == 0 for f in report["fields"])
    assert files(folder) == before


def test_what_cannot_be_replayed_is_a_command() -> None:
    assert NOT_REPLAYABLE.keys() <= SAME.keys() | ELSEWHERE
