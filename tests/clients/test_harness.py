"""lm-evaluation-harness asks `mia serve`, as its users ask any server, and transformers for the same:
the F32 copy of smollm2 is both sides' file, and each item must come out alike."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
REASON = "is not installed (tests/clients/requirements.txt)"
pytest.importorskip("lm_eval", reason=f"lm_eval {REASON}")
pytest.importorskip("transformers", reason=f"transformers {REASON}")
openai = pytest.importorskip("openai", reason=f"openai {REASON}")

from clients.tasks import write_tasks  # noqa: E402
from mia.model import Model  # noqa: E402

#: Differences of log-likelihoods that were seen: 1.0e-4 at an answer, 1.3e-3 at a text. The file in Q4_1,
#: whose products are rounded, differs by up to 1.0 and 1.3, and two of its choices are others.
ANSWER, TEXT = 5e-4, 4e-3
TASKS = "mia_choices,mia_texts,mia_answers"
Samples = dict[str, list[dict[str, Any]]]
Runs = tuple[dict[str, Samples], dict[str, Samples]]


@pytest.fixture(scope="module")
def file() -> Path:
    """smollm2 in F32."""
    with Model("smollm2", as_type="f32") as model:
        assert model.copy is not None
        return model.copy.path


@pytest.fixture(scope="module")
def server(file: Path) -> Iterator[str]:
    """The address of `mia serve`."""
    options = ["--as", "f32", "--threads", "1", "--port", "0"]
    command = [sys.executable, "-m", "mia", "serve", "-m", "smollm2", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://[^/;]+/v1", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield found[0]
        process.terminate()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def ask(tasks: Path, names: str, *options: str) -> Samples:
    """What the command of the harness writes for each item."""
    out = tasks / f"out-{options[1]}"
    lm_eval = Path(sys.executable).with_name("lm_eval")
    command = [lm_eval, *options, "--tasks", names, "--include_path", tasks, "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*map(str, command), "--output_path", str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    samples = {}
    for name in names.split(","):
        (path,) = out.glob(f"*/samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[name] = sorted(rows, key=lambda row: int(row["doc_id"]))
    return samples


def of_server(server: str, tasks: Path) -> dict[str, Samples]:
    """What `mia serve` gives, through the harness' command."""
    args = f"base_url={server}/completions,model=smollm2,num_concurrent=2,custom_prefix_token_id=0"
    plain = ["--model", "local-completions", "--model_args", args, "--batch_size", "16"]
    args = f"base_url={server}/chat/completions,model=smollm2,num_concurrent=4"
    chat = ["--model", "local-chat-completions", "--model_args", args, "--apply_chat_template"]
    return {"plain": ask(tasks, TASKS, *plain), "chat": ask(tasks, "mia_answers", *chat)}


def of_transformers(file: Path, tasks: Path) -> dict[str, Samples]:
    """What `--model hf` gives, with the tokenizer and the chat template of the file."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(1)
    options = {"dtype": "float32", "device": "cpu", "batch_size": 16, "prefix_token_id": 0}
    lm = HFLM(str(file.parent), gguf_file=file.name, **options)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def samples(names: str, **options: Any) -> Samples:
        found = simple_evaluate(
            lm, tasks=names.split(","), task_manager=manager, bootstrap_iters=0, **options
        )["samples"]
        return {name: sorted(found[name], key=lambda row: int(row["doc_id"])) for name in found}

    return {"plain": samples(TASKS), "chat": samples("mia_answers", apply_chat_template=True)}


@pytest.fixture(scope="module")
def runs(server: str, file: Path, tasks: Path) -> Runs:
    """Ours and theirs, side by side: each takes one processor."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(of_server, server, tasks)
        theirs = of_transformers(file, tasks)
        return ours.result(), theirs


def likelihoods(sample: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice."""
    return [float(response[0][0]) for response in sample["resps"]]


def test_accuracies_are_those_of_transformers(runs: Runs) -> None:
    """Item by item: the same log-likelihoods, the same choices."""
    ours, theirs = (run["plain"]["mia_choices"] for run in runs)
    assert len(ours) == len(theirs) >= 100
    for a, b in zip(ours, theirs, strict=True):
        assert a["doc"] == b["doc"]
        assert likelihoods(a) == pytest.approx(likelihoods(b), rel=0, abs=ANSWER), a["doc"]
        assert [r[0][1] == "True" for r in a["resps"]] == [r[0][1] for r in b["resps"]]
        assert (a["acc"], a["acc_norm"]) == (b["acc"], b["acc_norm"]), a["doc"]
    for metric in ("acc", "acc_norm"):  # neither a model that knows all nor one that guesses
        assert 0.4 < sum(row[metric] for row in ours) / len(ours) < 0.95


def test_whole_texts_are_as_likely(runs: Runs) -> None:
    ours, theirs = (run["plain"]["mia_texts"] for run in runs)
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert float(a["resps"][0][0]) == pytest.approx(float(b["resps"][0][0]), rel=0, abs=TEXT)


def test_the_same_answers_are_written(runs: Runs) -> None:
    ours, theirs = (run["plain"]["mia_answers"] for run in runs)
    assert [row["resps"] for row in ours] == [row["resps"] for row in theirs]
    assert 0 < sum(row["exact_match"] for row in ours) < len(ours)


def test_the_same_chat(runs: Runs) -> None:
    ours, theirs = (run["chat"]["mia_answers"] for run in runs)
    assert [row["resps"] for row in ours] == [row["resps"] for row in theirs]
    assert ours != [] and all(row["resps"][0][0] for row in ours)


def test_one_entry_for_each_token_of_the_prompt(server: str, file: Path) -> None:
    """`echo` with `logprobs`, of a text and of token ids, through OpenAI's client."""
    text = "The capital of France is Paris, \N{EURO SIGN} 1234."
    with Model(file) as model, openai.OpenAI(base_url=server, api_key="none") as api:
        ids = model.tokenize(text)
        pieces = [model.piece(token) for token in ids]
        for prompt in (text, ids):
            for n in (0, 1):
                answer = api.completions.create(
                    model="smollm2", prompt=prompt, max_tokens=n, echo=True, logprobs=1
                )
                logprobs = answer.choices[0].logprobs
                assert logprobs.tokens[: len(ids)] == pieces
                assert len(logprobs.token_logprobs) == len(ids) + n
                assert logprobs.token_logprobs[0] is None
                assert all(x < 0 for x in logprobs.token_logprobs[1:])
