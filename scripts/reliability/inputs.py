"""Damaged inputs for every reader, in child processes: see `reliability.readers`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from reliability.part import Options, Part, count
from reliability.readers import mutate_readers
from reliability.workers import Block, Event, work

#: inputs that one call makes: what a child that dies had begun is known so well
PIECE = 250
HANG_SECONDS = 120.0


def block(first: int, n: int, size: int, seed: int) -> Iterator[Event]:
    """Pieces `first` to `n` - 1 of a block; a piece has `size` inputs and a seed of its own."""
    for i in range(first, n):
        yield {"at": i}
        findings = mutate_readers(size, seed + i)
        yield {
            "read": dict(findings.read),
            "refused": dict(findings.refused),
            "foreign": [(name, what, data.hex()) for name, what, data in findings.foreign],
        }


def inputs(options: Options) -> Part:
    """Gives at least `options.n` damaged inputs to the readers in turn."""
    part = Part("inputs")
    size = min(PIECE, max(1, options.n // options.workers))
    read: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    foreign: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    begun = 0

    def blocks() -> Iterator[Block]:
        nonlocal begun
        while begun * size < options.n and not options.is_over:
            n = max(1, min(8, -(-options.n // size) - begun))
            task = {"task": "reliability.inputs:block", "first": 0, "n": n, "size": size}
            yield {**task, "seed": options.seed * 10**6 + begun}
            begun += n

    said = 0
    for given, event in work(blocks(), workers=options.workers, seconds=HANG_SECONDS):
        if "read" in event:
            read.update(event["read"])
            refused.update(event["refused"])
            for name, what, data in event["foreign"]:
                kind = re.sub(r"\d+", "0", f"{name}: {what}")[:120]
                foreign[kind] += 1
                if foreign[kind] == 1:
                    file = f"input-{options.seed}-{len(foreign)}.bin"
                    path = options.keep(file, bytes.fromhex(data))
                    part.wrong(f"{name}: {what} ({path})")
        elif "died" in event or "hung" in event:
            lost["died" if "died" in event else "hung"] += 1
            seed = given["seed"] + (event["at"] or 0)
            how = event.get("died") or f"no answer in {event['hung']:.0f} s"
            part.wrong(f"mutate_readers({given['size']}, {seed}): {how}")
        total = read.total() + refused.total() + foreign.total()
        if total >= said + 10_000:
            said = total
            part.say(f"{count(total)} inputs, {foreign.total()} foreign, {options.seconds:.0f} s")
    figures = part.figures
    figures["damaged inputs"] = count(read.total() + refused.total() + foreign.total())
    figures["readers"] = count(len({*read, *refused}))
    figures["read all the same"] = count(read.total())
    figures["refused by one clear error"] = count(refused.total())
    figures["foreign exceptions"] = count(foreign.total())
    figures["crashes, hangs"] = f"{lost['died']}, {lost['hung']}"
    return part
