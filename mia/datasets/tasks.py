"""Tasks: pairs of an input and its output, and the prompts made of them.

`load("antonym")` reads one of the tasks that come with mia (`index()` lists them), or a
file: JSONL lines `{"input": …, "output": …}`, a JSON array of such objects (as in
ericwtodd/function_vectors), or one flat object `{"input": "output", …}` (as in
roeehendel/icl_task_vectors). An output may be a list of right answers, the first of which
is the one shown in examples.

A `Split` keeps three parts of a task apart: examples come from `train` only, layers are
chosen on `dev`, and what is reported is of `test`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mia.datasets.shipped import json_lines
from mia.errors import FileError, RangeError, UsageError
from mia.io.files import read_utf8

_FOLDER = Path(__file__).parents[1] / "data" / "tasks"
_DEALS = 256  # how many times answers are shuffled, to find a deal with few right ones
FAMILIES = ("knowledge", "language", "linguistic", "algorithmic", "symmetric")


@dataclass(frozen=True, slots=True)
class Pair:
    """An input and its right answers, the one to show first."""

    input: str
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.outputs[0]


@dataclass(frozen=True, slots=True)
class Task:
    """A name and its pairs, each input once.

    Attributes:
        known_of: how many pairs there were, where only those are left that a model knows.
    """

    name: str
    pairs: tuple[Pair, ...]
    family: str = ""
    description: str = ""
    known_of: int | None = None


@dataclass(frozen=True, slots=True)
class Composition:
    """Four tasks that share two steps: AC is to BC as AD is to BD (Todd et al. 2023, section 3.3).

    A and B choose an element of a list, C gives it back and D maps it."""

    name: str
    ac: str
    bc: str
    bd: str
    ad: str


# -- reading -----------------------------------------------------------------------


@cache
def _index() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_FOLDER / "index.json").read_text(encoding="utf-8"))
    return found


def index() -> list[dict[str, Any]]:
    """Name, family, description and count of every task that comes with mia."""
    return list(_index()["tasks"])


def compositions() -> list[Composition]:
    """The compositions that come with mia."""
    return [
        Composition(c["name"], c["AC"], c["BC"], c["BD"], c["AD"]) for c in _index()["compositions"]
    ]


def composition(name: str) -> Composition:
    """One of them. Raises `UsageError` naming those there are."""
    found = {c.name: c for c in compositions()}
    if name not in found:
        raise UsageError(f"unknown composition {name!r}; known: {', '.join(found)}")
    return found[name]


def load(name: str | Path) -> Task:
    """A task by its name, or from a .jsonl or .json file.

    Raises:
        UsageError: no such task.
        FileError: a file that is not one of the three formats.
    """
    entry = next((e for e in index() if e["name"] == str(name)), None)
    if entry is not None:
        pairs = read_pairs(_FOLDER / f"{name}.jsonl")
        return Task(entry["name"], pairs, entry["family"], entry["description"])
    path = Path(name)
    if path.suffix not in (".json", ".jsonl"):
        known = ", ".join(e["name"] for e in index())
        raise UsageError(
            f"unknown task {str(name)!r}; give a .json or .jsonl file, or one of {known}"
        )
    return Task(path.stem, read_pairs(path))


def read_pairs(path: str | Path) -> tuple[Pair, ...]:
    """The pairs of a file in any of the three formats; a pair that is there twice counts once.

    Raises `FileError` naming the place, or both places of an input with different answers."""
    text = read_utf8(path, f"the task {path}")
    found: dict[str, tuple[Pair, str]] = {}
    for where, row in _rows(text, path):
        pair = _pair(row, f"{path}, {where}")
        first, place = found.setdefault(pair.input, (pair, where))
        if first != pair:
            a, b = (", ".join(map(repr, p.outputs)) for p in (first, pair))
            raise FileError(
                f"{path}: the input {pair.input!r} has the answer {a} at {place} and {b} at "
                f"{where}; if both are right, write them as one list"
            )
    if not found:
        raise FileError(f"{path} has no pairs of an input and an output")
    return tuple(pair for pair, _ in found.values())


def _rows(text: str, path: str | Path) -> list[tuple[str, Any]]:
    """(where, {"input", "output"}) from JSONL, an array, or a flat object."""
    read = partial(json.loads, object_pairs_hook=partial(_object, path))
    try:
        whole = read(text)
    except ValueError as err:
        first = text.lstrip().split("\n", 1)[0].rstrip()
        if first and not (first[0] == "{" and first[-1] == "}"):  # it is not a line of JSONL
            raise FileError(f"{path} is not JSON: {err}") from err
        whole = None
    if isinstance(whole, list):
        return [(f"item {i}", row) for i, row in enumerate(whole)]
    if isinstance(whole, dict):
        # A flat object may have "input" among its words, but no task has fewer than 5 pairs.
        parts = {"input", "output"} & whole.keys()
        if len(parts) == 2 or (parts and len(whole) < 5):
            return [("line 1", whole)]
        return [(f"key {k!r}", {"input": k, "output": v}) for k, v in whole.items()]
    return json_lines(text, path, read)


def _object(path: str | Path, items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would keep the last of two values."""
    made: dict[str, Any] = {}
    for key, value in items:
        if key in made and made[key] != value:
            raise FileError(f"{path}: the key {key!r} has two values, {made[key]!r} and {value!r}")
        made[key] = value
    return made


def _pair(row: Any, where: str) -> Pair:
    if not isinstance(row, dict):
        raise FileError(f'{where} is not an object with "input" and "output"')
    for part in ("input", "output"):
        if part not in row:
            raise FileError(f"{where} has no {part!r}")
    given = row["output"] if isinstance(row["output"], list) else [row["output"]]
    texts = [_text(t, where) for t in (row["input"], *given)]
    if len(texts) < 2 or not all(texts):
        raise FileError(f"{where} has an empty input or output")
    return Pair(texts[0], tuple(dict.fromkeys(texts[1:])))


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise FileError(f"{where}: {value!r} is neither text nor a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise FileError(f"{where}: {value!r} is no finite number; write it in quotes if it is text")
    return str(value).strip()


# -- prompts -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """How a pair is written: a text with {input}, {output} and what ends the answer.

    The query is the same text up to {output}, less the space that stands before it; that
    space belongs to the answer's first token.
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
        """What stands after an answer."""
        return self.text[self.text.index("{output}") + len("{output}") :]

    def example(self, pair: Pair) -> str:
        return self._before.replace("{input}", pair.input) + pair.output + self.end

    def query(self, text: str) -> str:
        return self._before.rstrip(" ").replace("{input}", text)

    def answer(self, output: str) -> str:
        """An answer as it continues the query: with the space in front, if there was one."""
        before = self._before
        return before[len(before.rstrip(" ")) :] + output

    def prompt(self, examples: Sequence[Pair], query: str) -> str:
        return "".join(map(self.example, examples)) + self.query(query)


FORMATS = {"qa": Format("Q: {input}\nA: {output}\n\n"), "arrow": Format("{input} -> {output}, ")}


def read_format(text: str) -> Format:
    """`qa`, `arrow`, or a text with {input} and {output}. Raises `UsageError`."""
    if text in FORMATS:
        return FORMATS[text]
    if "{" not in text:
        raise UsageError(
            f"unknown format {text!r}; known: {', '.join(FORMATS)}, or a text with {{input}} and {{output}}"
        )
    return Format(text)


# -- splits ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Parts of a task that have no input in common."""

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
    """Shuffles a task and cuts it: at most 60 % of it is test, at most 20 % dev, and less of it test
    where train would not have `shots` examples and a query.

    Raises `RangeError` where less than one pair would be left of a part."""
    if n_test < 1 or n_dev < 1:
        raise RangeError(
            f"{n_test} test and {n_dev} dev queries are asked for; at least one of each"
        )
    n = len(task.pairs)
    n_test, n_dev = min(n_test, int(0.6 * n)), min(n_dev, int(0.2 * n))
    if not n_test or not n_dev:
        raise RangeError(
            f"{task.name} has {n} pairs; at least 5 are needed for train, dev and test"
        )
    n_test = min(n_test, n - n_dev - shots - 1)
    if n_test < 1:
        raise RangeError(
            f"{task.name} has {n} pairs, too few for {shots} examples in a prompt (--shots) and queries to "
            "try them on"
        )
    order = [task.pairs[i] for i in rng.permutation(n)]
    test, dev = order[:n_test], order[n_test : n_test + n_dev]
    return Split(tuple(order[n_test + n_dev :]), tuple(dev), tuple(test))


def draw(
    pool: Sequence[Pair], n: int, rng: np.random.Generator, *, without: str | None = None
) -> list[Pair]:
    """n different examples, none with the input `without`. Raises `RangeError` where there are
    too few."""
    allowed = [p for p in pool if p.input != without]
    if n > len(allowed):
        raise RangeError(
            f"{n} examples are asked for; {len(allowed)} are left for them: "
            "ask for fewer (--shots), or give the task more pairs"
        )
    return [allowed[i] for i in rng.choice(len(allowed), n, replace=False)]


def shuffled(examples: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    """The same inputs with the outputs dealt anew (Todd et al. 2023: prompts that say how to
    answer, and not what).

    None stays with its own input; of several such deals the one that leaves the fewest right
    answers, which matters where many inputs have the same one."""
    n = len(examples)
    if n < 2:
        return list(examples)
    sets = [set(e.outputs) for e in examples]
    right = np.array([[bool(a & b) for b in sets] for a in sets])  # (n, n)
    best, fewest = np.empty(0, np.intp), n + 1
    for _ in range(_DEALS):
        order = rng.permutation(n)
        turned = np.empty(n, np.intp)  # a cycle through a random order: nothing stays in its place
        turned[order] = np.roll(order, 1)
        left = int(right[np.arange(n), turned].sum())
        if left < fewest:
            best, fewest = turned, left
        if not left:
            break
    return [Pair(e.input, examples[int(j)].outputs) for e, j in zip(examples, best, strict=True)]
