"""Random requests, run jointly in groups and each alone: the numbers must be the same."""

from __future__ import annotations

import json
import os
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mia.engine import limits
from mia.errors import MiaError
from mia.model import Model
from mia.request import Request, Result
from reliability.compare import (
    GELU_TOLERANCE,
    TOLERANCE,
    differences,
    first_other_token,
    until,
    worst,
)
from reliability.groups import Facts, Json, edit_of, nudges, random_group, request_of
from reliability.part import Options, Part, count
from reliability.workers import Block, Event, work

#: names of the tiny models, with the arguments of `write_tiny`
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "gemma2, window 4": ("gemma2", {"window": 4}),
    "gpt2": ("gpt2", {}),
    "mamba": ("mamba", {}),
    "mixtral": ("mixtral", {}),
    "qwen2moe": ("qwen2moe", {}),
    "dots1": ("dots1", {}),
}
#: a tiny model's context, so that the cells of one are few
CTX = 128
#: groups in a block: one opening of a model serves them all
GROUPS = 24
#: a group of tiny requests takes a hundredth of this
HANG_SECONDS = 120.0


def write_models(folder: Path, models: Path | None = None) -> dict[str, Path]:
    """The tiny models, and the GGUF files of `models`, by name."""
    from tiny_gguf import write_tiny

    paths = {}
    for name, (arch, options) in TINY.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '')}.gguf"
        paths[name] = path if path.exists() else write_tiny(path, arch, **options)
    if models is not None:
        paths.update({p.name: p.absolute() for p in sorted(models.glob("*.gguf"))})
    return paths


# -- one group ---------------------------------------------------------------------------


@dataclass
class Pair:
    """One file opened twice: to run requests alone, and jointly under odd limits."""

    alone: Model
    joint: Model
    facts: Facts
    tolerance: float
    limits: Json = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Pair:
        alone, joint = (Model(path, threads=1, ctx=CTX) for _ in range(2))
        facts = Facts.of(alone.unfused_topology, n_vocab=alone.n_vocab, n_ctx=CTX)
        _ = joint.site_checks  # with the limits that everybody has
        return cls(alone, joint, facts, GELU_TOLERANCE if facts.gelu else TOLERANCE)

    def run_joint(self, requests: Sequence[Request], odd: Json) -> list[Result]:
        if odd != self.limits:
            self.joint._engine.sessions.close()  # contexts are as large as the limits said
            self.limits = odd
        with odd_limits(odd):
            return self.joint.run(requests)


@contextmanager
def odd_limits(odd: Json) -> Iterator[None]:
    """Other constants of the engine for a while."""
    before = {name: getattr(limits, name) for name in odd}
    for name, value in odd.items():
        setattr(limits, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(limits, name, value)


@dataclass
class Outcome:
    """What one group gave: counts, the worst error, and what is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    worst_at: str = ""
    wrong: list[str] = field(default_factory=list)


def run_group(pair: Pair, group: Json) -> Outcome:
    """Runs each request alone, then those that could be run jointly, and compares."""
    out = Outcome()
    out.counts["requests"] = len(group["requests"])
    # edits are made once: two requests with the same object share work
    edits: dict[int, Any] = {}
    requests: list[Request] = []
    alone: list[Result] = []
    refused: list[tuple[Request, str]] = []
    for i, r in enumerate(group["requests"]):
        try:
            for j in r["edits"]:
                edits[j] = edits.get(j) or edit_of(group["edits"][j])
            request = request_of(r, [edits.get(j) for j in range(len(group["edits"]))])  # type: ignore[misc]
        except MiaError:
            out.counts["refused when made"] += 1
            continue
        except Exception as err:
            out.wrong.append(f"request {i} when made: {_shown(err)}")
            continue
        try:
            alone.append(pair.alone.run([request])[0])
            requests.append(request)
        except MiaError as err:
            refused.append((request, str(err)))
        except Exception as err:
            out.wrong.append(f"request {i} alone: {_shown(err)}")
    if refused:
        _compare_refusals(pair, group, requests, refused, out)
    if requests:
        _compare_results(pair, group, requests, alone, out)
    return out


def _compare_refusals(
    pair: Pair,
    group: Json,
    requests: list[Request],
    refused: list[tuple[Request, str]],
    out: Outcome,
) -> None:
    """What is refused alone must be refused among others, by one of the same messages."""
    out.counts["refused"] += len(refused)
    among = [*requests, *(r for r, _ in refused)]
    try:
        pair.run_joint(among, group["limits"])
    except MiaError as err:
        if _kind(str(err)) not in [_kind(text) for _, text in refused]:
            out.wrong.append(f"refused alone by {refused[0][1]!r}, jointly by {str(err)!r}")
    except Exception as err:
        out.wrong.append(f"with refused ones: {_shown(err)}")
    else:
        out.wrong.append(f"refused alone, not jointly: {refused[0][1]!r}")


def _kind(message: str) -> str:
    """Where numbers that are not finite are seen first depends on what runs beside them."""
    return "not finite" if re.search("not finite|not numbers|infinite", message) else message


def _compare_results(
    pair: Pair, group: Json, requests: list[Request], alone: list[Result], out: Outcome
) -> None:
    try:
        joint = pair.run_joint(requests, group["limits"])
    except MiaError as err:
        out.wrong.append(f"refused jointly, not alone: {str(err)!r}")
        return
    except Exception as err:
        out.wrong.append(f"jointly: {_shown(err)}")
        return
    for i, (request, a, b) in enumerate(zip(requests, alone, joint, strict=True)):
        out.counts["compared"] += 1
        found = differences(a, b)
        error, name = worst(found)
        if error <= pair.tolerance:
            if error > out.worst:
                out.worst, out.worst_at = error, name
            continue
        if _is_a_tie(pair, request, a, b):
            out.counts["ties"] += 1
            continue
        bad = {k: v for k, v in found.items() if v > pair.tolerance}
        shown = ", ".join(f"{k} {v:.2g}" for k, v in sorted(bad.items(), key=lambda kv: -kv[1])[:4])
        out.wrong.append(f"request {i} of {len(requests)}: {shown}")


#: sizes of changes no larger than what rounding makes of them; and larger ones, that only a choice
#: of tokens may be compared with
_ROUNDING = (1e-6, -1e-6, 1e-5, -1e-5, 3e-5, -3e-5)
_LARGER = (1e-4, -1e-4, 1e-3, -1e-3)


def _is_a_tie(pair: Pair, request: Request, a: Result, b: Result) -> bool:
    """Whether a change no larger than rounding does as much to the request when it is alone: a
    token or an expert that wins by a hair, a step of llama.cpp's table of GELU in half floats, or numbers that
    an edit lets grow. What nothing moves there is wrong all the same.

    Where other tokens were generated, all that comes before must be the same so far, and a small change
    must be able to turn that one choice.
    """
    n, n_prompt = first_other_token(a, b), len(request.tokens)

    def cut(result: Result) -> Result:
        return result if n is None else until(result, n_prompt, n)

    found, moved = differences(cut(a), cut(b)), dict[str, float]()
    turned = n is None

    def is_explained() -> bool:
        return all(e <= max(pair.tolerance, 4 * moved.get(k, 0.0)) for k, e in found.items())

    for phase in range(10):
        for size in (*_ROUNDING, *(() if turned else _LARGER)):
            edits = [*request.edits, *nudges(pair.facts, size, phase)]
            with suppress(MiaError):
                other = pair.alone.run([replace(request, edits=edits)])[0]
                at = first_other_token(a, other)
                turned = turned or (at is not None and n is not None and at <= n)
                if size in _ROUNDING:
                    for name, e in differences(cut(a), cut(other)).items():
                        moved[name] = max(moved.get(name, 0.0), e)
        if turned and is_explained():
            return True
    return False


def _shown(err: BaseException) -> str:
    last = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__} at {Path(last.filename).name}:{last.lineno}: {err}"[:300]


# -- in a child ----------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _pair(path: str) -> Pair:
    return Pair.open(Path(path))


def block(path: str, seed: int, block: int, first: int, n: int, current: str) -> Iterator[Event]:
    """Groups `first` to `n` - 1 of a block. `current`: where the group that runs is kept."""
    yield {"opens": path}
    try:
        pair = _pair(path)
    except MiaError as err:
        yield {"not opened": str(err)}
        return
    for i in range(first, n):
        group = {"model": path, **random_group(pair.facts, (seed, block, i))}
        file = Path(f"{current}-{os.getpid()}.json")
        file.write_text(json.dumps(group), encoding="utf-8")
        yield {"at": i, "file": str(file)}
        out = run_group(pair, group)
        yield {
            "counts": dict(out.counts),
            "worst": out.worst,
            "worst_at": out.worst_at,
            "gelu": pair.facts.gelu,
            "wrong": out.wrong,
            "group": group if out.wrong else None,
        }


# -- the part ------------------------------------------------------------------------------


def requests(options: Options) -> Part:
    """Runs at least `options.n` requests over all models in turn."""
    part = Part("requests")
    with tempfile.TemporaryDirectory() as place, _own_cache(place):
        models = write_models(Path(place), options.models)
        _Requests(part, options, models, Path(place)).run()
    return part


class _Requests:
    def __init__(self, part: Part, options: Options, models: dict[str, Path], place: Path):
        self.part, self.options, self.models, self.place = part, options, models, place
        self.counts: Counter[str] = Counter()
        self.by_model: Counter[str] = Counter()
        self.not_opened: dict[str, str] = {}
        #: whether the model looks GELU up -> the largest difference, and where
        self.worst = {False: (0.0, "nothing"), True: (0.0, "nothing")}
        self.files: dict[tuple[str, int], str] = {}
        self.n_kept = 0

    def blocks(self) -> Iterator[Block]:
        """A block for each model in turn until there are enough requests."""
        names = list(self.models)
        # a group has 8.5 requests on average; small runs visit every tiny model all the same
        n = min(GROUPS, max(1, round(self.options.n / 8.5 / len(names))))
        i = 0
        while self.counts["requests"] < self.options.n and not self.options.is_over:
            if len(self.not_opened) == len(names):
                return
            name = names[i % len(names)]
            i += 1
            if name not in self.not_opened:
                yield {
                    "task": "reliability.requests:block",
                    "path": str(self.models[name]),
                    "seed": self.options.seed,
                    "block": i - 1,
                    "first": 0,
                    "n": n,
                    "current": str(self.place / "current"),
                }

    def run(self) -> None:
        said, blocks = 0, self.blocks()
        for block, event in work(blocks, workers=self.options.workers, seconds=HANG_SECONDS):
            name = next(n for n, p in self.models.items() if str(p) == block["path"])
            self.hear(name, block, event)
            if self.counts["requests"] >= said + 2000:
                said = self.counts["requests"]
                self.part.say(
                    f"{count(said)} requests, worst {self.worst[False][0]:.1e} ({self.worst[False][1]}), "
                    f"{len(self.part.faults)} faults, {self.options.seconds:.0f} s"
                )
        self.figures()

    def hear(self, name: str, block: Block, event: Event) -> None:
        key = block["path"], block["block"]
        if "not opened" in event:
            self.not_opened[name] = event["not opened"]
            self.part.say(f"{name} is left out: {event['not opened']}")
        elif "at" in event and "file" in event:
            self.files[key] = event["file"]
        elif "counts" in event:
            self.counts.update(event["counts"])
            self.by_model[name] += event["counts"]["requests"]
            at = f"{event['worst_at']} of {name}"
            self.worst[event["gelu"]] = max(self.worst[event["gelu"]], (event["worst"], at))
            for text in event["wrong"]:
                self.counts["wrong"] += 1
                self.part.wrong(f"{name}: {text} ({self.keep('wrong', event['group'])})")
        elif "died" in event or "hung" in event:
            what = f"died of {event['died']}" if "died" in event else f"hung {event['hung']:.0f} s"
            self.counts["died" if "died" in event else "hung"] += 1
            where = "when it was opened"
            if event["at"] is not None:
                group = json.loads(Path(self.files[key]).read_text(encoding="utf-8"))
                where = f"({self.keep('crash', group)})"
            else:
                self.not_opened[name] = what
            self.part.wrong(f"{name}: {what} {where}")

    def keep(self, kind: str, group: Json) -> Path:
        """The group for `--repeat`, with the model's name in place of a path that will be gone."""
        self.n_kept += 1
        model = Path(group["model"])
        if model.parent == self.place:
            group = {**group, "model": next(n for n, p in self.models.items() if p == model)}
        return self.options.keep(f"{kind}-{self.options.seed}-{self.n_kept}.json", group)

    def figures(self) -> None:
        c, figures = self.counts, self.part.figures
        figures["requests, jointly and alone"] = count(c["requests"])
        figures["models"] = count(len(self.by_model))
        figures["refused, both ways by the same error"] = count(
            c["refused"] + c["refused when made"]
        )
        figures["compared"] = count(c["compared"])
        for gelu, (error, at) in self.worst.items():
            which = ", models with a table of GELU" if gelu else ""
            figures[f"largest difference{which}"] = f"{error:.1e} ({at})"
        figures["ties, decided by rounding"] = count(c["ties"])
        figures["wrong numbers or errors"] = count(c["wrong"])
        figures["crashes, hangs"] = f"{c['died']}, {c['hung']}"
        if self.not_opened:
            figures["files that mia refuses"] = ", ".join(self.not_opened)


@contextmanager
def _own_cache(place: str) -> Iterator[None]:
    """What is remembered of files is not put beside what the user has."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


# -- again ---------------------------------------------------------------------------------


def repeat(file: Path) -> Part:
    """Runs a kept group again, and makes it as small as it can be while something is wrong."""
    part = Part("repeat")
    group = json.loads(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place, _own_cache(place):
        models = write_models(Path(place))
        path = models.get(group["model"], Path(group["model"]))
        for text in run_group(Pair.open(path), group).wrong:
            part.wrong(text)
        part.figures["requests"] = count(len(group["requests"]))
        if part.faults:
            small = smaller(path, group)
            kept = file.with_name(f"{file.stem}-small.json")
            kept.write_text(json.dumps(small, indent=1) + "\n", encoding="utf-8")
            left = f"{len(small['requests'])} requests ({kept})"
            part.figures["still wrong with"] = left
    return part


def smaller(path: Path, group: Json) -> Json:
    """The group without the requests, edits and captures that are not needed."""

    def is_wrong(tried: Json) -> bool:
        return bool(run_group(Pair.open(path), tried).wrong)

    def without(tried: Json, i: int, part: str, j: int) -> Json:
        requests = [dict(r) for r in tried["requests"]]
        requests[i][part] = [*requests[i][part][:j], *requests[i][part][j + 1 :]]
        return {**tried, "requests": requests}

    if is_wrong(tried := {**group, "limits": {}}):
        group = tried
    for i in reversed(range(len(group["requests"]))):
        tried = {**group, "requests": [r for j, r in enumerate(group["requests"]) if j != i]}
        if is_wrong(tried):
            group = tried
    for i, request in enumerate(group["requests"]):
        for part in ("captures", "edits"):
            for j in reversed(range(len(request[part]))):
                if is_wrong(tried := without(group, i, part, j)):
                    group = tried
    return group
