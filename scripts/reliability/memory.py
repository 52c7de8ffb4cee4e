"""Many requests of all kinds in one process: memory and open files stay flat, and nothing is kept booked."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mia.engine.cells import Ledger
from mia.engine.runner import Runner
from mia.engine.segments import Segment
from reliability.groups import random_group
from reliability.part import Options, Part, count
from reliability.requests import Pair, _own_cache, run_group, write_models
from reliability.workers import Block, Event, work

#: models that take turns
MODELS = ("llama", "gemma2, window 4", "mamba", "dots1")
#: what 10,000 requests may add; the allocator keeps some of what was freed
MAY_GROW = 24 << 20
HANG_SECONDS = 300.0


def resident() -> int:
    """Resident memory in bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def _state() -> dict[str, int]:
    gc.collect()  # a model that is dropped may wait for it
    return {"memory": resident(), "files": open_files()}


def block(paths: dict[str, str], seed: int, n: int, first: int = 0) -> Iterator[Event]:
    """About n requests, in groups and alone, on some models in turn. A third of them warm up."""
    yield {"at": 0}
    ledgers = _watch_ledgers()
    pairs = {name: Pair.open(Path(path)) for name, path in paths.items()}
    done, i, wrong = 0, 0, 0
    warm: dict[str, int] | None = None
    while done < n:
        name = MODELS[i % len(MODELS)]
        group = random_group(pairs[name].facts, (seed, 1, i))
        out = run_group(pairs[name], group)
        done += out.counts["requests"]
        wrong += len(out.wrong)
        i += 1
        if warm is None and done >= n // 3:
            warm = _state()
        if i % 250 == 0:
            yield {"done": done, "memory": resident()}
    end = _state()
    yield {
        "end": end,
        "warm": warm,
        "n": done,
        "runs": ledgers["runs"],
        "kept": ledgers["kept"],
        "wrong": wrong,
    }


def _watch_ledgers() -> dict[str, int]:
    """Counts runs, and those that kept a cell or a sequence at their end."""
    seen = {"runs": 0, "kept": 0}
    plain = Runner.run

    def run(self: Runner, tops: Sequence[Segment]) -> None:
        plain(self, tops)
        seen["runs"] += 1
        ledger: Ledger = self.ledger
        free = sorted(ledger.free) == list(range(ledger.n_sequences))
        seen["kept"] += bool(ledger.booked or not free or self.generating or self.waiting)

    Runner.run = run  # type: ignore[method-assign]
    return seen


def reopened(path: str, n: int, first: int = 0) -> Iterator[Event]:
    """Opens one file n times, with a run each; half of the models are dropped without close()."""
    from mia.model import Model
    from mia.request import Capture, Request

    yield {"at": 0}
    warm: dict[str, int] | None = None
    for i in range(n):
        model = Model(path, threads=1, ctx=64)
        model.run([Request([3, 4, 5], captures=[Capture("embed")])])
        if i % 2:
            model.close()
        del model
        if i == n // 3:
            warm = _state()
    yield {"end": _state(), "warm": warm, "n": n}


def memory(options: Options) -> Part:
    """Runs `options.n` requests in one process, and opens a model a fiftieth as often in another."""
    part = Part("memory")
    with tempfile.TemporaryDirectory() as place, _own_cache(place):
        models = {k: str(p) for k, p in write_models(Path(place)).items() if k in MODELS}
        llama = models["llama"]
        task = {"task": "reliability.memory:block", "paths": models, "seed": options.seed}
        again = {"task": "reliability.memory:reopened", "path": llama, "n": max(9, options.n // 50)}
        blocks: Iterator[Block] = iter([{**task, "n": options.n}, again])
        for given, event in work(blocks, workers=1, seconds=HANG_SECONDS):
            if "end" in event:
                _judge(part, given, event)
            elif "died" in event or "hung" in event:
                part.wrong(event.get("died") or f"no answer in {event['hung']:.0f} s")
            elif "done" in event:
                part.say(f"{event['done']} requests, {event['memory'] >> 20} MiB")
    return part


def _judge(part: Part, given: Block, event: Event) -> None:
    warm, end = event["warm"], event["end"]
    grown = end["memory"] - warm["memory"]
    figures = part.figures
    in_one = "paths" in given
    what = "requests in one process" if in_one else "models opened, half of them only dropped"
    figures[what] = count(event["n"])
    name = "" if in_one else ", models opened again"
    figures[f"resident memory after a third, at the end{name}"] = (
        f"{warm['memory'] / 2**20:.1f} MiB, {end['memory'] / 2**20:.1f} MiB"
    )
    figures[f"open files after a third, at the end{name}"] = f"{warm['files']}, {end['files']}"
    if grown > MAY_GROW:
        part.wrong(f"{what}: memory grew by {grown / 2**20:.1f} MiB")
    if end["files"] > warm["files"]:
        part.wrong(f"{what}: open files went from {warm['files']} to {end['files']}")
    if in_one:
        figures["runs, and those that kept a cell or sequence"] = (
            f"{event['runs']:,}, {event['kept']}"
        )
        if event["kept"]:
            part.wrong(f"{event['kept']} runs kept a cell or a sequence")
        if event["wrong"]:
            part.wrong(f"{event['wrong']} requests were wrong; the part `requests` finds them")
