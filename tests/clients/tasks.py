"""Tasks for lm-evaluation-harness, of data that comes with mia: nothing is fetched.

python tests/clients/tasks.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mia.datasets.tasks import load

#: a task of mia, how many of its pairs are asked, and the question
QUESTIONS = [
    ("antonym", 40, "The opposite of {} is"),
    ("country_capital", 40, "The capital of {} is the city of"),
    ("english_french", 30, "In French, the English word {} is"),
]
N_CHOICES = 4
STOPS = ["\n", "Q:"]


def write_tasks(folder: Path) -> Path:
    """The folder for `--include_path`: `mia_choices` (multiple choice), `mia_texts` (perplexity of
    texts) and `mia_answers` (short answers are written), each with its JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, "mia_choices", _choices(), _CHOICES)
    _write(folder, "mia_texts", _texts(), _TEXTS)
    _write(folder, "mia_answers", _answers(), _ANSWERS)
    return folder


_CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_TEXTS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}
_ANSWERS = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": STOPS, "max_gen_toks": 16, "do_sample": False},
    "filter_list": [
        {"name": "bare", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    ],
    "metric_list": [{"metric": "exact_match", "ignore_punctuation": True}],
}


def _choices() -> list[dict[str, Any]]:
    """Each question with its answer among those of three others."""
    rng = np.random.default_rng(0)
    rows = []
    for name, n, question in QUESTIONS:
        pairs = load(name).pairs
        for pair in pairs[:n]:
            others = [p.output for p in pairs if not set(p.outputs) & set(pair.outputs)]
            wrong = rng.choice(sorted(set(others)), N_CHOICES - 1, replace=False).tolist()
            answer = int(rng.integers(N_CHOICES))
            choices = [*wrong[:answer], pair.output, *wrong[answer:]]
            rows.append(
                {"question": question.format(pair.input), "choices": choices, "answer": answer}
            )
    return rows


def _texts() -> list[dict[str, Any]]:
    return [
        {"text": " ".join(f"{question.format(p.input)} {p.output}." for p in load(name).pairs[:12])}
        for name, _, question in QUESTIONS
    ]


def _answers() -> list[dict[str, Any]]:
    pairs = load("country_capital").pairs
    shown = "".join(f"Q: {p.input}\nA: {p.output}\n\n" for p in pairs[50:54])
    return [{"question": f"{shown}Q: {p.input}\nA:", "answer": p.output} for p in pairs[:16]]


def _write(folder: Path, name: str, rows: list[dict[str, Any]], task: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
    }
    whole = {"task": name, **source, "test_split": "test", **task}
    (folder / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")  # YAML too


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]))
