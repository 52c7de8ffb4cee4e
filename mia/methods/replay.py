"""Replay: a saved result is made again and compared number by number.

A document says what made it (`mia.io.runs`): the command and its arguments, the SHA-256 of the
model and of each file that was read, the versions, the build of llama.cpp, the processor. `replay`
runs the same and pairs both documents by the path of each value: `lens.[3].top.[0].logit`.

Texts, token ids and all whole numbers must be equal. Other numbers agree if
|a - b| <= tolerance * max(1, |a|, |b|). With the same model, versions, build, processor and threads
the default tolerance is 0: such a run gives the same bits (on smollm2 also with another number of
threads). Elsewhere it is what another order of roundings moves (`NOISE`); for probabilities a
quarter of that, the steepest slope of the logistic function.

It runs commands, so this is the one method that knows of them (`mia.methods.rerun`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mia.errors import FileError, RangeError
from mia.io.files import read_utf8
from mia.io.runs import Replay, Run, parse_run
from mia.notices import MiaWarning, notice
from mia.show.report import Report
from mia.show.text import columns, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

#: how far logits move where llama.cpp rounds in another order, by GGUF's file type; quantized
#: weights round activations to 8 bits
NOISE = {"0": 1e-4, "1": 1e-2, "32": 1e-1}
_QUANTIZED_NOISE = 1.0
_SLOPE = 0.25

TEXTS = "texts and ids"
_KINDS = {
    "logits": "logit sum sum_after_capping embed bias attn mlp heads attn_bias rest",
    "log-probabilities": "logprob dev_logprob drop reward best_reward",
    "probabilities": "prob weights p_matching p_matching_plain dev dev_accuracy dev_by_set accuracy",
    "effects": "effect effects change score scores sd",
    "estimates": "value low high zero_shot icl",
    "norms": "norm norms cosine",
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
#: what only says by what a result was made; it is compared apart
_MADE_BY = {"mia", "llama_cpp_python", "model", "model_file", "model_sha256", "tokenizer_sha256"}
_SHOWN = 10

Path_ = tuple["str | int", ...]
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the numbers of one field moved.

    Attributes:
        field: its path, without the places in lists.
        n, differ: how many values it has, and how many are not the same to the bit.
        largest, mean: of the absolute differences; None for texts.
        largest_relative, mean_relative: the same, over the larger of both sizes.
        agrees: all are within the tolerance.
    """

    field: str
    kind: str
    n: int
    differ: int
    largest: float | None
    mean: float | None
    largest_relative: float | None
    mean_relative: float | None
    agrees: bool


@dataclass(frozen=True, eq=False)
class ReplayReport(Report):
    """A result beside the one that was made again.

    Attributes:
        file: the result's file.
        command: the command line that was run.
        verdict: "exact" (the same to the bit), "within tolerance" or "different".
        fields: the drift of each field.
        differences: the first values that do not agree: {path, saved, now}.
        notices: what was not as it was: versions, the build, the model.
    """

    file: str
    command: str
    verdict: Literal["exact", "within tolerance", "different"]
    tolerance: float
    fields: list[Drift]
    differences: list[dict[str, Any]]
    n_differences: int
    notices: list[str]

    @property
    def failed(self) -> bool:
        return self.verdict == "different"

    def document(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "command": self.command,
            "verdict": self.verdict,
            "tolerance": self.tolerance,
            "fields": self.rows(),
            "n_differences": self.n_differences,
            "differences": self.differences,
            "notices": self.notices,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {k: _finite(v) if isinstance(v, float) else v for k, v in asdict(f).items()}
            for f in self.fields
        ]

    def plain(self) -> str:
        rows = [_cells(f) for f in self.fields]
        return "\n".join([self._summary(), columns(_TITLES, rows), *self._lines()])

    def table(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for i, title in enumerate(_TITLES):
            table.add_column(title, justify="left" if i < 2 else "right")
        for f in self.fields:
            colour = "green" if not f.differ else "yellow" if f.agrees else "red"
            table.add_row(*(Text(c) for c in _cells(f)), style=colour)
        colour = {"exact": "green", "different": "red"}.get(self.verdict, "yellow")
        lines = [Text(line) for line in self._lines()]
        return Group(Text(self._summary(), style=f"bold {colour}"), table, *lines)

    def _summary(self) -> str:
        n, differ = sum(f.n for f in self.fields), sum(f.differ for f in self.fields)
        if self.verdict == "exact":
            return f"exact: all {n} values are the same"
        if self.verdict == "within tolerance":
            return f"within tolerance: {differ} of {n} values moved, by {self.tolerance:g} at most"
        return f"different: {self.n_differences} of {n} values do not agree"

    def _lines(self) -> list[str]:
        lines = [f"{d['path']}: {_text(d['saved'])} -> {_text(d['now'])}" for d in self.differences]
        if self.n_differences > len(lines):
            lines.append(f"… and {self.n_differences - len(lines)} more")
        return [visible(line) for line in lines]


_TITLES = ["field", "kind", "n", "differ", "largest", "mean", "largest %", "mean %"]


def _cells(f: Drift) -> list[str]:
    def percent(x: float | None) -> float | None:
        return None if x is None else 100 * x

    numbers = (f.largest, f.mean, percent(f.largest_relative), percent(f.mean_relative))
    drifts = ["" if x is None else f"{x:.3g}" for x in numbers]
    return [visible(f.field), f.kind, str(f.n), str(f.differ), *drifts]


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# -- running it again --------------------------------------------------------------------


def replay(
    file: str | Path,
    *,
    model: str | None = None,
    tolerance: float | None = None,
    trust: bool = False,
) -> ReplayReport:
    """Makes a saved result again and compares. Nothing is written, and no file is read but those
    that the result says it was made of.

    Args:
        file: a document that a command wrote.
        model: another model than the result's; a notice says so.
        tolerance: by how much numbers may differ; by default 0, but where the build, the processor
            or the model is another the noise of its weights.
        trust: import the functions (`module:function`) that the result names.

    Raises:
        FileError: no result of a command, one that cannot be replayed, or a file that it is made
            of has changed.
        ModelError: the model is another file.
        UsageError: it names a function and is not trusted.
    """
    from mia.methods.rerun import command_line, rerun, shown

    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise RangeError(f"tolerance must be 0 or more, got {tolerance}")
    saved, run = read_result(file)
    try:
        words = command_line(run, model)
    except FileError as err:
        raise FileError(f"{file}: {err}") from err
    again = Replay(of=run, any_model=model is not None, trust=trust)
    notice(f"running {shown(words)}")
    with warnings.catch_warnings():
        # what the command says of its options was said when it first ran
        warnings.simplefilter("ignore", MiaWarning)
        report = rerun(words, again)
    notices = [*again.notices, *_changes(run, again)]
    now = json.loads(json.dumps(report.document()))
    if saved.get("tokens") != now.get("tokens"):
        notices.append("the prompt has other tokens than then")
    for text in notices:
        notice(text)
    if tolerance is None:
        tolerance = _default_tolerance(run, again)
    if model is not None:
        saved, now = _without_model(saved), _without_model(now)
    return compare(saved, now, tolerance, file=str(file), command=shown(words), notices=notices)


def read_result(file: str | Path) -> tuple[dict[str, Any], Run]:
    """A document and the run that made it. Raises `FileError`."""
    text = read_utf8(file)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise FileError(f"{file} is not JSON: {err}") from err
    if not isinstance(document, dict):
        raise FileError(f"{file} is no result of a command")
    try:
        return document, parse_run(document.get("run"))
    except FileError as err:
        raise FileError(f"{file} cannot be replayed: {err}") from err


def _without_model(document: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in document.items() if k != "model"}


def _changes(old: Run, new: Run) -> list[str]:
    """What is not as it was, a line each."""
    names = {
        "mia": "mia",
        "llama_cpp_python": "llama-cpp-python",
        "build": "the build of llama.cpp",
        "extra_buffers": "extra weight buffers",
        "processor": "the processor",
        "as_type": "the type that the weights are opened as",
        "lora": "the list of LoRA adapters",
        "kv_type": "the type of the KV cache",
        "ctx": "the context",
        "threads": "the number of threads",
        "rpc": "the list of RPC servers",
    }
    before, after = (
        {"rpc": "empty", **(run.model or {}), **setup}
        for run, setup in ((old, old.setup), (new, _setup(new)))
    )
    return [
        visible(f"{name} was {_short(before.get(key))}, is {_short(after.get(key))}")
        for key, name in names.items()
        if before.get(key) != after.get(key)
    ]


def _setup(run: Run) -> dict[str, Any]:
    from mia import __version__

    return run.setup or {"mia": __version__}


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) < 50 else f"{text[:12]}…"


def _default_tolerance(old: Run, new: Run) -> float:
    models, models_now = ([{**m, "name": ""} for m in run.models] for run in (old, new))
    if models == models_now and old.setup == _setup(new):
        return 0.0
    kinds = [str(m["file_type"]) for m in [*models, *models_now] if "file_type" in m]
    return max((NOISE.get(k, _QUANTIZED_NOISE) for k in kinds), default=0.0)


# -- comparing ---------------------------------------------------------------------------


def compare(
    saved: dict[str, Any],
    now: dict[str, Any],
    tolerance: float,
    *,
    file: str = "",
    command: str = "",
    notices: list[str] | None = None,
) -> ReplayReport:
    """Pairs the values of two documents by their path."""
    old, new = dict(_values(saved)), dict(_values(now))
    pairs: dict[str, list[tuple[Path_, Any, Any]]] = {}
    for path in [*old, *(p for p in new if p not in old)]:
        name = ".".join(p if isinstance(p, str) else "[]" for p in path)
        pair = (path, old.get(path, _ABSENT), new.get(path, _ABSENT))
        pairs.setdefault(name, []).append(pair)
    fields, wrong = [], []
    for name, rows in pairs.items():
        drift, differing = _drift(name, rows, tolerance)
        fields.append(drift)
        wrong += differing
    if wrong:
        verdict: Any = "different"
    else:
        verdict = "within tolerance" if any(f.differ for f in fields) else "exact"
    shown = [{"path": _joined(p), "saved": _shown(a), "now": _shown(b)} for p, a, b in wrong]
    return ReplayReport(
        file, command, verdict, tolerance, fields, shown[:_SHOWN], len(wrong), notices or []
    )


def _values(document: dict[str, Any]) -> Iterator[tuple[Path_, Any]]:
    """Each value that is no list or object, by its path; an empty one stands for itself."""
    left: list[tuple[Path_, Any]] = [((k,), v) for k, v in reversed(document.items()) if k != "run"]
    while left:
        path, value = left.pop()
        if isinstance(value, dict) and value:
            made_by = _MADE_BY if path[-1] == "metadata" or path == ("model",) else ()
            left += [((*path, k), v) for k, v in reversed(value.items()) if k not in made_by]
        elif isinstance(value, list) and value:
            left += [((*path, i), v) for i, v in reversed(list(enumerate(value)))]
        else:
            yield path, value


def _drift(
    name: str, rows: list[tuple[Path_, Any, Any]], tolerance: float
) -> tuple[Drift, list[tuple[Path_, Any, Any]]]:
    """The drift of a field, and those of its values that do not agree."""
    numbers = any(isinstance(x, float) for _, *pair in rows for x in pair)
    names = name.split(".")
    last = next((p for p in reversed(names) if p != "[]" and not p.isdigit()), "")
    kind = _KIND.get(last, _KIND.get(names[0], "numbers")) if numbers else TEXTS
    allowed = tolerance * _SLOPE if kind == "probabilities" else tolerance
    absolute, relative, differ, wrong = [], [], 0, []
    for path, a, b in rows:
        if not (_is_number(a) and _is_number(b) and numbers):
            if type(a) is not type(b) or a != b:
                differ += 1
                wrong.append((path, a, b))
            continue
        size = max(abs(_float(a)), abs(_float(b)))
        off = 0.0 if a == b else _off(_float(a), _float(b))
        absolute.append(off)
        relative.append(off / size if size and math.isfinite(off) else off)
        differ += off > 0
        if off > allowed * max(1.0, size) or not math.isfinite(off):
            wrong.append((path, a, b))
    largest, mean = _largest_and_mean(absolute)
    drift = Drift(name, kind, len(rows), differ, largest, mean, *_largest_and_mean(relative),
                  not wrong)  # fmt: skip
    return drift, wrong


def _largest_and_mean(values: list[float]) -> tuple[float | None, float | None]:
    return (max(values), math.fsum(values) / len(values)) if values else (None, None)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _float(x: float) -> float:
    try:
        return float(x)
    except OverflowError:  # a whole number of JSON has no limit
        return math.inf


def _off(a: float, b: float) -> float:
    if math.isnan(a) and math.isnan(b):
        return 0.0
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _shown(value: Any) -> Any:
    if value is _ABSENT:
        return "(absent)"
    return _finite(value) if isinstance(value, float) else value


def _joined(path: Path_) -> str:
    return ".".join(str(p) for p in path)
