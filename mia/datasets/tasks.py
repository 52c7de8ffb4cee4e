"""Tasks: pairs of an input and its output, and the prompts made of them.

`load("antonym")` reads one of the tasks that come with mia (`index()` lists them), or a
file: JSONL lines `{"input": …, "output": …}`, a JSON array of such objects (as in
ericwtodd/function_vectors), or one flat object `{"input": "output", …}` (as in
roeehendel/icl_task_vectors). An output may be a list of right answers; examples use the
first one.

A `Split` keeps three parts of a task apart: examples come from `train`, layers are chosen
on `dev`, and results are reported on `test`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mia.datasets.reader import read_records
from mia.datasets.shipped import find, folder
from mia.errors import FileError, RangeError, UsageError, did_you_mean
from mia.io.kinds import described, kinds_of

#: how many shuffles are drawn, to find one that leaves few right answers
_SHUFFLES = 256
FAMILIES = ("knowledge", "language", "linguistic", "algorithmic", "symmetric")


@dataclass(frozen=True, slots=True)
class Pair:
    """An input and its right answers; examples use the first."""

    input: str
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.outputs[0]


@dataclass(frozen=True, slots=True)
class Task:
    """A name and its pairs, each input once.

    Attributes:
        known_of: how many pairs the task had before it was reduced to those that a model
            knows; None if it has all of them.
    """

    name: str
    pairs: tuple[Pair, ...]
    family: str = ""
    description: str = ""
    known_of: int | None = None


@dataclass(frozen=True, slots=True)
class Composition:
    """Four tasks of two steps each: AC is to BC as AD is to BD (Todd et al. 2023, section 3.3).

    A and B choose an element of a list, C copies it and D maps it."""

    name: str
    ac: str
    bc: str
    bd: str
    ad: str


# -- reading -----------------------------------------------------------------------


@cache
def _index() -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder("tasks") / "index.json").read_text(encoding="utf-8"))
    return index


def index() -> list[dict[str, Any]]:
    """Name, family, description and count of every task that comes with mia."""
    return list(_index()["tasks"])


def compositions() -> list[Composition]:
    """The compositions that come with mia."""
    return [
        Composition(c["name"], c["AC"], c["BC"], c["BD"], c["AD"]) for c in _index()["compositions"]
    ]


def composition(text: str) -> Composition:
    """A composition by its name, or "AC,BC,BD,AD": four tasks. Raises `UsageError` naming the
    known compositions, or if there is no such task."""
    parts = text.split(",")
    if len(parts) == 1:
        by_name = {c.name: c for c in compositions()}
        if text not in by_name:
            near = did_you_mean(text, by_name)
            raise UsageError(
                f"unknown composition {text!r}{near or ';'} known: {', '.join(by_name)}"
            )
        return by_name[text]
    if len(parts) != 4:
        raise UsageError(f"{text!r} is not a composition; expected four tasks AC,BC,BD,AD")
    load_many(parts)
    return Composition(parts[3], *parts)


def load(name: str | Path) -> Task:
    """A task by its name, or from a .jsonl or .json file.

    Raises:
        UsageError: no such task.
        FileError: a file that is not one of the three formats.
    """
    entry = next((e for e in index() if e["name"] == str(name)), None)
    if entry is not None:
        pairs = read_pairs(find(name, "tasks"))
        return Task(entry["name"], pairs, entry["family"], entry["description"])
    path = Path(name)
    if path.suffix not in (".json", ".jsonl"):
        if kinds := kinds_of(path):
            raise FileError(f"{path} is {described(kinds)}, not a file of pairs")
        known = ", ".join(e["name"] for e in index())
        near = did_you_mean(str(name), known.split(", "))
        raise UsageError(
            f"unknown task {str(name)!r}{near}{' Give' if near else '; give'} "
            f"a .json or .jsonl file, or one of {known}"
        )
    return Task(path.stem, read_pairs(path))


def load_many(names: str | Path | Iterable[str | Path]) -> list[Task]:
    """Tasks by name or file, each once; "all" stands for every task that comes with mia.

    Raises as `load` does."""
    names = [names] if isinstance(names, (str, Path)) else names
    every = [e["name"] for e in index()]
    expanded = [n for name in names for n in (every if name == "all" else [name])]
    return [load(name) for name in dict.fromkeys(expanded)]


def read_pairs(path: str | Path) -> tuple[Pair, ...]:
    """The pairs of a file in any of the three formats; a repeated pair counts once.

    Raises `FileError` naming the place of an error, or both places of an input that has
    different answers."""
    by_input: dict[str, tuple[Pair, str]] = {}
    for where, row in _records(Path(path)):
        pair = _pair(row, f"{path}, {where}")
        first, place = by_input.setdefault(pair.input, (pair, where))
        if first != pair:
            a, b = (", ".join(map(repr, p.outputs)) for p in (first, pair))
            raise FileError(
                f"{path}: the input {pair.input!r} has the answer {a} at {place} and {b} at "
                f"{where}; if both are right, write them as one list"
            )
    if not by_input:
        raise FileError(f"{path} has no pairs of an input and an output")
    return tuple(pair for pair, _ in by_input.values())


def _records(path: Path) -> list[tuple[str, Any]]:
    """(where, {"input", "output"}) from JSONL, an array, or a flat object."""
    records = read_records(path, f"the task {path}")
    where, whole = records[0] if len(records) == 1 else ("", None)
    if isinstance(whole, dict) and where.startswith("line"):
        # A flat object may have "input" among its words, but no task has fewer than 5 pairs.
        parts = {"input", "output"} & whole.keys()
        if len(parts) < 2 and not (parts and len(whole) < 5):
            return [(f"key {k!r}", {"input": k, "output": v}) for k, v in whole.items()]
    return records


def _pair(row: Any, where: str) -> Pair:
    if not isinstance(row, dict):
        raise FileError(f'{where} is not an object with "input" and "output"')
    for part in ("input", "output"):
        if part not in row:
            raise FileError(f"{where} has no {part!r}")
    outputs = row["output"] if isinstance(row["output"], list) else [row["output"]]
    texts = [_text(t, where) for t in (row["input"], *outputs)]
    if len(texts) < 2 or not all(texts):
        raise FileError(f"{where} has an empty input or output")
    return Pair(texts[0], tuple(dict.fromkeys(texts[1:])))


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise FileError(f"{where}: {value!r} is neither text nor a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise FileError(
            f"{where}: {value!r} is not a finite number; write it in quotes if it is text"
        )
    return str(value).strip()


# -- prompts -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """How a pair is written: a text with {input}, {output} and something that ends the answer.

    A query is the same text up to {output}, without the space before it: that space belongs
    to the first token of the answer.
    """

    text: str

    def __post_init__(self) -> None:
        i, o = self.text.find("{input}"), self.text.find("{output}")
        if not 0 <= i < o or self.text.count("{input}") + self.text.count("{output}") != 2:
            raise UsageError(
                f"the format {self.text!r} needs {{input}} once and {{output}} once after it"
            )
        if not self.end:
            raise UsageError(
                f"the format {self.text!r} ends with {{output}}; end it with something that "
                r"separates examples, such as \n"
            )

    @property
    def _before(self) -> str:
        return self.text[: self.text.index("{output}")]

    @property
    def end(self) -> str:
        """The text after an answer."""
        return self.text[self.text.index("{output}") + len("{output}") :]

    def example(self, pair: Pair) -> str:
        return self._before.replace("{input}", pair.input) + pair.output + self.end

    def query(self, text: str) -> str:
        return self._before.rstrip(" ").replace("{input}", text)

    def answer(self, output: str) -> str:
        """An answer as it continues the query, with the space in front if there is one."""
        before = self._before
        return before[len(before.rstrip(" ")) :] + output

    def prompt(self, examples: Sequence[Pair], query: str) -> str:
        return "".join(map(self.example, examples)) + self.query(query)


FORMATS = {"qa": Format("Q: {input}\nA: {output}\n\n"), "arrow": Format("{input} -> {output}, ")}


def read_format(text: str | Format) -> Format:
    """`qa`, `arrow`, or a text with {input} and {output}. Raises `UsageError`."""
    if isinstance(text, Format):
        return text
    if text in FORMATS:
        return FORMATS[text]
    if "{" not in text:
        raise UsageError(
            f"unknown format {text!r}; known: {', '.join(FORMATS)}, or a text with {{input}} and "
            "{output}"
        )
    return Format(text)


# -- splits ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Parts of a task without a common input."""

    train: tuple[Pair, ...]
    dev: tuple[Pair, ...]
    test: tuple[Pair, ...]


def split(
    task: Task,
    rng: np.random.Generator,
    *,
    n_test: int = 100,
    n_dev: int = 40,
    shots: int = 0,
) -> Split:
    """Shuffles a task and splits it: at most 60 % is test and at most 20 % dev. Test gets fewer
    if train would be left with less than `shots` examples and a query.

    Raises `RangeError` if a part would be empty."""
    if n_test < 1 or n_dev < 1:
        raise RangeError(f"need at least 1 test and 1 dev query, got {n_test} and {n_dev}")
    n = len(task.pairs)
    n_test, n_dev = min(n_test, int(0.6 * n)), min(n_dev, int(0.2 * n))
    if not n_test or not n_dev:
        raise RangeError(
            f"{task.name} has {n} pairs; at least 5 are needed for train, dev and test"
        )
    n_test = min(n_test, n - n_dev - shots - 1)
    if n_test < 1:
        raise RangeError(
            f"{task.name} has {n} pairs, too few for a prompt of {shots} examples and "
            "queries to evaluate"
        )
    order = [task.pairs[i] for i in rng.permutation(n)]
    test, dev = order[:n_test], order[n_test : n_test + n_dev]
    return Split(tuple(order[n_test + n_dev :]), tuple(dev), tuple(test))


def draw(
    pool: Sequence[Pair], n: int, rng: np.random.Generator, *, without: str | None = None
) -> list[Pair]:
    """n different examples, none with the input `without`. Raises `RangeError` if there are
    too few."""
    allowed = [p for p in pool if p.input != without]
    if n > len(allowed):
        raise RangeError(
            f"need {n} examples, only {len(allowed)} available: ask for fewer shots, or give the "
            "task more pairs"
        )
    return [allowed[i] for i in rng.choice(len(allowed), n, replace=False)]


def shuffled(examples: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    """The same inputs with the outputs shuffled among them (Todd et al. 2023: prompts that show
    the form of an answer, but not the task).

    No output stays with its input. Of several shuffles the one with the fewest right answers
    is taken, which matters if many inputs have the same answer."""
    n = len(examples)
    if n < 2:
        return list(examples)
    sets = [set(e.outputs) for e in examples]
    right = np.array([[bool(a & b) for b in sets] for a in sets])  # (n, n)
    best, fewest = np.empty(0, np.intp), n + 1
    for _ in range(_SHUFFLES):
        order = rng.permutation(n)
        cycle = np.empty(n, np.intp)  # through a random order: nothing stays in its place
        cycle[order] = np.roll(order, 1)
        n_right = int(right[np.arange(n), cycle].sum())
        if n_right < fewest:
            best, fewest = cycle, n_right
        if not n_right:
            break
    return [Pair(e.input, examples[int(j)].outputs) for e, j in zip(examples, best, strict=True)]
