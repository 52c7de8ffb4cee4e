"""What every group uses: rows of the table, pairs that take turns, llama.cpp alone, processes."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from mia.edits import Edit
from mia.llama import Context, ContextParams
from mia.model import Model
from mia.request import Capture, Request

TEXT = (
    "The quick brown fox jumps over the lazy dog, and then the man said to the woman that he "
    "would not come back to the old house on the hill, because it was far too dark in there. "
)
N_PREFILL, N_DECODE = 256, 64
MEGABYTE = 1 << 20
#: BLAS libraries on one thread: those that wait spin, which is time of the processor
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Row:
    """One line of the table. `target` reads "at least" for ratios of speed, else "at most"."""

    what: str
    values: list[float]
    unit: str = "×"
    target: float | None = None
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        value = median(self.values)
        good = value >= self.target if self.at_least else value <= self.target
        return "ok" if good else "MISS"

    def __str__(self) -> str:
        low, mid, high = (_digits(f(self.values)) for f in (min, median, max))
        spread = f"{low}–{high}" if len(self.values) > 1 else ""
        target = "" if self.target is None else f"{'≥' if self.at_least else '≤'} {self.target:g}"
        return (
            f"{self.what:<64}{mid:>8} {self.unit:<3}{spread:>14}{target:>9}  {self.verdict}"
        ).rstrip()


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


class Bench:
    """A model, prompts, and the rows measured so far."""

    def __init__(self, name: str, rounds: int, quick: bool, *, quiet: bool):
        self.model = Model(name)
        self.rounds, self.quick, self.quiet = rounds, quick, quiet
        self.rows: list[Row] = []
        self.rng = np.random.default_rng(0)
        self._plain: Plain | None = None

    def add(
        self,
        what: str,
        values: list[float],
        *,
        unit: str = "×",
        target: float | None = None,
        at_least: bool = True,
    ) -> None:
        self.rows.append(Row(what, values, unit, target, at_least))
        if not self.quiet:
            print(self.rows[-1], flush=True)

    def compare(
        self,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        *,
        rounds: int | None = None,
        warm: bool = True,
    ) -> list[float]:
        """Seconds of theirs per second of ours, pair by pair; `warm`: after a turn not timed."""
        if warm:
            ours(), theirs()
        return [seconds(theirs) / seconds(ours) for _ in range(rounds or self.rounds)]

    def tokens(self, n: int, shift: int = 0) -> list[int]:
        """A prompt of n tokens; another shift is another prompt."""
        ids = self.model.tokenize(TEXT * (2 + n // 30), bos=False)
        return self.model.tokenize("", bos=True)[:1] + ids[shift : shift + n - 1]

    def direction(self) -> np.ndarray:
        """(n_embd,) float32"""
        return self.rng.normal(size=self.model.n_embd).astype(np.float32)

    def generate(
        self,
        prompt: Sequence[int],
        edits: Sequence[Edit] = (),
        captures: Sequence[Capture] = (),
    ) -> object:
        """mia's side of a decode: N_DECODE tokens after the prompt."""
        request = Request(
            prompt, edits, captures, logits=None, n_predict=N_DECODE, stop_at_eog=False
        )
        return self.model.run([request])

    def plain(
        self, tokens: Sequence[int], n_predict: int = 0, directions: np.ndarray | None = None
    ) -> list[int]:
        """See `Plain.decode`."""
        if self._plain is None:
            self._plain = Plain(self.model)
        return self._plain.decode(tokens, n_predict, directions)

    def megabytes_allowed(self) -> float:
        """The model's file, the key-value cache of the runs so far, and 300 MB."""
        m = self.model
        cells = max(s.context.n_ctx for s in m._engine.sessions.open.values())
        cache = cells * m.n_layer * 2 * m.n_head_kv * m.head_dim * 2  # keys and values, f16
        return (m.path.stat().st_size + cache) / MEGABYTE + 300


class Plain:
    """llama.cpp's decode and nothing else."""

    def __init__(self, model: Model, n_ctx: int = 512):
        params = ContextParams(
            n_ctx=n_ctx,
            n_ubatch=512,
            n_seq=1,
            flash=True,
            kv_type=model.kv_type,
            threads=model.threads,
            callback=False,
        )
        self.context = Context(model._llama, params)

    def decode(
        self,
        tokens: Sequence[int] | np.ndarray,
        n_predict: int = 0,
        directions: np.ndarray | None = None,
    ) -> list[int]:
        """The prompt, then greedily n_predict tokens, under llama.cpp's own control vector if
        `directions` (n_layer - 1, n_embd) are given."""
        context, out = self.context, list[int]()
        context.clear()
        context.set_control_vector(directions)
        ids, start = np.asarray(tokens, np.int32), 0
        while True:
            n = len(ids)
            positions = np.arange(start, start + n, dtype=np.int32)
            outputs = np.zeros(n, np.int8)
            outputs[-1] = 1
            context.decode(ids, positions, np.zeros(n, np.int32), outputs)
            start += n
            best = int(context.logits()[0].argmax())
            if len(out) == n_predict:
                return out
            out.append(best)
            if len(out) == n_predict:  # the last token need not be run
                return out
            ids = np.asarray([best], np.int32)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# A process's peak memory counts from what the process that forked it held, so that a small
# one has to fork. The child's own output goes nowhere.
LAUNCHER = """
import os, sys, time
null = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=null)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


def measure_process(argv: list[str]) -> tuple[float, float]:
    """Wall seconds and peak megabytes of a process of its own."""
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *argv]
    done = subprocess.run(launcher, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    wall, peak, code = done.stdout.split()
    if int(code) != 0:
        raise SystemExit(f"bench: exit status {int(code)} from: {' '.join(argv)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(wall), int(peak) * unit / MEGABYTE
