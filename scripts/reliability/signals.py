"""Commands that are stopped at a random moment: how they end, and what they leave.

SIGINT must end a command with exit status 130 and one line; SIGTERM and SIGKILL end it as the system does
(143 and 137 in a shell). A result is there whole or not at all, no traceback is printed, and the next command
works in the same folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mia.errors import MiaError
from mia.io.files import read_safetensors
from mia.models import registry
from reliability.part import Options, Part, count
from reliability.requests import write_models

#: a command that was sent a signal must be over after so many seconds
HANG_SECONDS = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
PROMPT = "The capital of France is Paris. The capital of Italy is"


@dataclass(frozen=True)
class Command:
    """Arguments of mia, and the file that it writes."""

    arguments: tuple[str, ...]
    out: str

    def line(self, model: str) -> list[str]:
        """What to run: `MODEL` in the arguments is the model, `-m MODEL` is added elsewhere."""
        given = [model if a == "MODEL" else a for a in self.arguments]
        own = [] if "MODEL" in self.arguments else ["-m", model, "-t", "1"]
        to = [self.out] if {"convert", "save"} & set(given) else ["-o", self.out]
        return [*given, *to, *own]


SMALL = (
    Command(("run", "-p", PROMPT, "-n", "100", "--ablate", "1.0", "-q"), "run.json"),
    Command(("save", "-p", PROMPT, "-q", "l_out"), "save.safetensors"),
    Command(("attention", "-p", PROMPT, "-q"), "maps.safetensors"),
    Command(("models", "convert", "MODEL", "q8_0"), "converted.gguf"),
)
LARGE = (
    Command(("run", "-p", PROMPT, "-n", "12", "--ablate", "1.0", "-q"), "run.json"),
    Command(("save", "-p", PROMPT, "-q", "l_out"), "save.safetensors"),
    Command(("heads", "--repeat-random", "12", "--prompts", "1", "-q"), "heads.json"),
    Command(("vector", "train", "sentiment", "-q"), "vector.gguf"),
)


def signals(options: Options) -> Part:
    """Stops `options.n` commands."""
    part = Part("signals")
    with tempfile.TemporaryDirectory() as place:
        _Signals(part, options, Path(place)).run()
    return part


class _Signals:
    def __init__(self, part: Part, options: Options, place: Path):
        self.part, self.options, self.place = part, options, place
        self.rng = random.Random(options.seed)
        self.ended: Counter[str] = Counter()
        self.whole = self.none = self.next_ones = 0
        tiny = str(write_models(place)["llama"])
        self.commands = [(tiny, c) for c in SMALL]
        try:
            registry.resolve("smollm2")
        except MiaError:
            part.say("smollm2 is not installed: only the tiny model is asked")
        else:
            self.commands += [("smollm2", c) for c in LARGE]
        self.out = place / "out"
        self.out.mkdir()
        #: seconds that each command takes when nothing stops it
        self.took: dict[tuple[str, Command], float | None] = {}

    def run(self) -> None:
        for i in range(self.options.n):
            if self.options.is_over:
                break
            # both models from the start, so that a short run asks both
            half = len(self.commands) // 2 if len(self.commands) > len(SMALL) else 0
            j = (i // 2 + (i % 2) * half) % len(self.commands)
            number = SIGNALS[self.rng.randrange(3)] if i >= 3 else SIGNALS[i]
            self.stop(*self.commands[j], number)
            if (i + 1) % 10 == 0:
                self.part.say(f"{i + 1} commands stopped, {self.options.seconds:.0f} s")
        figures = self.part.figures
        figures["commands stopped"] = count(self.ended.total())
        for how, n in sorted(self.ended.items()):
            figures[f"ended: {how}"] = count(n)
        figures["result there whole, not at all"] = f"{self.whole}, {self.none}"
        figures["commands run after a kill in the same folder"] = count(self.next_ones)

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        env = {**os.environ, "XDG_CACHE_HOME": str(self.place / "cache"), "PYTHONSAFEPATH": "1"}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        return subprocess.Popen(
            [sys.executable, "-m", "mia", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=self.out,
            # a shell starts what runs in its background deaf to Ctrl-C
            preexec_fn=_hear_signals if os.name == "posix" else None,
        )

    def seconds(self, model: str, command: Command) -> float:
        """How long the command takes, in a second run: the first learns what the model's sites are."""
        while self.took.get((model, command)) is None:
            first = (model, command) not in self.took
            began = time.monotonic()
            process = self.start(command.line(model))
            _, err = process.communicate()
            self.took[model, command] = None if first else time.monotonic() - began
            if process.returncode:
                self.part.wrong(f"{' '.join(command.line(model))} fails: {err.strip()[-300:]}")
            self.clear()
        return self.took[model, command] or 0.0

    def stop(self, model: str, command: Command, number: signal.Signals) -> None:
        delay = self.rng.uniform(0.02, 1.02) * self.seconds(model, command)
        process = self.start(command.line(model))
        time.sleep(delay)
        process.send_signal(number)
        what = f"{' '.join(command.line(model))}, {number.name} after {delay:.2f} s"
        try:
            _, err = process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.ended["it did not"] += 1
            self.part.wrong(f"{what}: goes on for {HANG_SECONDS:.0f} s")
            return
        self.ended[self.judge(what, number, process.returncode, err)] += 1
        left = {p.name for p in self.out.iterdir()}
        if command.out in left:
            self.whole += 1
            if reason := damage(self.out / command.out):
                self.part.wrong(f"{what}: {command.out} is not whole: {reason}")
        else:
            self.none += 1
            if process.returncode == 0:
                self.part.wrong(f"{what}: exit status 0 without a result")
        extra = left - {command.out}
        if extra and number == signal.SIGINT:
            self.part.wrong(f"{what}: leaves {', '.join(sorted(extra))}")
        elif odd := [n for n in extra if not (n.startswith(".mia-") and n.endswith(".tmp"))]:
            self.part.wrong(f"{what}: leaves {', '.join(odd)}")
        if number == signal.SIGKILL:
            self.next_works(what, model, command)
        self.clear()

    def judge(self, what: str, number: signal.Signals, code: int, err: str) -> str:
        """How a command ended, in words."""
        if code == 0:
            return "by itself, before the signal"
        own_lines = [line for line in err.splitlines() if f"{os.sep}mia{os.sep}" in line]
        first = (
            f"{os.sep}mia{os.sep}__init__.py",
            "__main__.py",
        )  # before a line of mia can hear it
        began = [line for line in own_lines if not any(name in line for name in first)]
        if "Traceback" in err and not began:
            return f"{number.name} while Python itself was starting or ending"
        if "Traceback" in err:
            self.part.wrong(f"{what}: a traceback: {err.strip()[-300:]}")
        fine = {signal.SIGINT: (130, -2), signal.SIGTERM: (-15, 143), signal.SIGKILL: (-9,)}
        if code not in fine[number]:
            self.part.wrong(f"{what}: exit status {code}: {err.strip()[-300:]}")
        return f"{number.name} with status {code if code > 0 else 128 - code} (of a shell)"

    def next_works(self, what: str, model: str, command: Command) -> None:
        """The same command in the folder as the kill left it."""
        process = self.start(command.line(model))
        _, err = process.communicate()
        self.next_ones += 1
        if process.returncode:
            self.part.wrong(f"{what}: the next command fails: {err.strip()[-300:]}")
        elif reason := damage(self.out / command.out):
            self.part.wrong(f"{what}: the next command's {command.out} is not whole: {reason}")

    def clear(self) -> None:
        for path in self.out.iterdir():
            path.unlink()


def _hear_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def damage(path: Path) -> str:
    """Why a result is not whole; "" if it is."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            read_safetensors(path)
        else:
            registry.check_gguf(path)
    except (MiaError, OSError, ValueError) as err:
        return str(err)
    return ""
