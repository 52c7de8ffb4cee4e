"""A tiny task for tests of in-context methods: the next letter, and the one before.

`run` and `twice` run commands with this setup; `write_tasks` puts the tasks into a folder as
next.json and before.json."""

import json
from pathlib import Path
from typing import Any

import commands
import numpy as np
from typer.testing import Result

from mia.datasets.tasks import Format, Pair, Task
from mia.methods.icl import TaskSetup

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NEXT = dict(zip(LETTERS, LETTERS[1:] + "a", strict=True))
TASK = Task("next", tuple(Pair(a, (b,)) for a, b in NEXT.items()))
BEFORE = Task("before", tuple(Pair(b, (a,)) for a, b in NEXT.items()))
FORMAT = Format("{input}:{output};")
SETUP = TaskSetup(format=FORMAT, shots=2, n_test=6, n_dev=4)
#: the same as options
WORDS = ("--shots", "2", "--format", FORMAT.text, "--test", "6", "--dev", "4")


def probability(logits: np.ndarray, answers: tuple[int, ...]) -> float:
    """Of the answers together, by a row of logits (n_vocab,)."""
    p = np.exp(logits - logits.max())
    return float(p[list(answers)].sum() / p.sum())


def write_tasks(folder: Path) -> None:
    (folder / "next.json").write_text(json.dumps(NEXT))
    (folder / "before.json").write_text(json.dumps({b: a for a, b in NEXT.items()}))


def run(*words: str, code: int = 0) -> Result:
    return commands.run(*words, *WORDS, code=code)


def twice(*words: str) -> dict[str, Any]:
    """The JSON of a command, which a second run repeats."""
    first, second = (run(*words, "--json").stdout for _ in range(2))
    assert first == second
    document: dict[str, Any] = json.loads(first)
    assert document["model"]["n_layer"] == 3
    return document
