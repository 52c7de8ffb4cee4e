"""Child processes that do blocks of work: one that crashes or hangs is known by what it had begun.

A block is a dictionary with "task", the name of a generator function as `module:function`, and its arguments. It yields
dictionaries, which come back here as they are made. One with "at" says which piece of the block begins;
if the child then dies, the rest of the block goes to a new one from "at" + 1 on, as its "first".
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Block = dict[str, Any]
Event = dict[str, Any]


@dataclass(eq=False)
class _Child:
    process: subprocess.Popen[str]
    block: Block | None = None
    at: int | None = None
    heard: float = 0.0

    def give(self, block: Block) -> None:
        self.block, self.at, self.heard = block, None, time.monotonic()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(block) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: its last line will say so


def work(blocks: Iterator[Block], *, workers: int, seconds: float) -> Iterator[tuple[Block, Event]]:
    """Lets children do blocks, and gives each event with its block.

    A child that ends before its block is over gives `{"died": text, "at": …}`, one that says nothing
    for so many seconds `{"hung": seconds, "at": …}`.
    """
    lines: queue.Queue[tuple[_Child, str | None]] = queue.Queue()
    children: list[_Child] = []
    again: list[Block] = []

    def next_block() -> Block | None:
        return again.pop() if again else next(blocks, None)

    def start(block: Block) -> None:
        child = _Child(_process())
        children.append(child)
        threading.Thread(target=_listen, args=(child, lines), daemon=True).start()
        child.give(block)

    def rest_of(child: _Child) -> None:
        if child.block is not None and child.at is not None:
            again.append({**child.block, "first": child.at + 1})

    try:
        while True:
            while len(children) < workers and (block := next_block()) is not None:
                start(block)
            if not children:
                return
            try:
                child, line = lines.get(timeout=1.0)
            except queue.Empty:
                for child in [c for c in children if time.monotonic() - c.heard > seconds]:
                    children.remove(child)
                    _end(child.process)
                    rest_of(child)
                    yield child.block or {}, {"hung": seconds, "at": child.at}
                continue
            if child not in children:
                continue  # it was ended
            child.heard = time.monotonic()
            if line is None:
                children.remove(child)
                how = _death(child.process)
                _end(child.process)
                if child.block is not None:
                    rest_of(child)
                    yield child.block, {"died": how, "at": child.at}
                continue
            event = json.loads(line)
            if "at" in event:
                child.at = event["at"]
            if "over" not in event:
                yield child.block or {}, event
                continue
            following = next_block()
            if following is None:
                children.remove(child)
                _end(child.process)
            else:
                child.give(following)
    finally:
        for child in children:
            _end(child.process)


def _process() -> subprocess.Popen[str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-m", "reliability.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"},
    )


def _listen(child: _Child, lines: queue.Queue[tuple[_Child, str | None]]) -> None:
    """Reads a child's lines; its errors are kept short, so that a pipe never fills."""
    assert child.process.stdout is not None and child.process.stderr is not None
    last: list[str] = []

    def errors() -> None:
        assert child.process.stderr is not None
        for line in child.process.stderr:
            last.append(line.rstrip())
            del last[:-20]

    reader = threading.Thread(target=errors, daemon=True)
    reader.start()
    for line in child.process.stdout:
        lines.put((child, line))
    child.process.wait()
    reader.join()
    child.process.stdout.close()
    child.process.stderr.close()
    child.process.last_words = "; ".join(last)  # type: ignore[attr-defined]
    lines.put((child, None))


def _death(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    try:
        how = signal.Signals(-code).name
    except ValueError:
        how = f"exit status {code}"
    return f"{how}: {getattr(process, 'last_words', '')[-500:]}"


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()


# -- the child ---------------------------------------------------------------------------


def main() -> None:
    """Does blocks from stdin. What else writes to stdout goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: Event) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    for line in sys.stdin:
        block = json.loads(line)
        module, _, name = block.pop("task").partition(":")
        for event in getattr(import_module(module), name)(**block):
            tell(event)
        tell({"over": True})
    os._exit(0)


if __name__ == "__main__":
    main()
