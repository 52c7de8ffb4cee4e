"""Measures what mia promises about speed and memory, as ratios within one run.

Two ways to do the same work take turns (A B A B …), each pair gives a ratio, and the table
shows the median with the least and the most. Ratios survive another machine; seconds and
megabytes do not, and are shown as figures of this one.

The plain llama.cpp that mia is held against is a decode loop without callback, plan or
captures: what `llama_decode` alone takes, with an argmax per generated token.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_heads import heads
from bench_steer import steering
from bench_tasks import tasks

from mia.edits import Edit
from mia.llama import ggml, probe
from mia.model import Model
from mia.request import Capture, Request
from mia.sites import Site

TEXT = (
    "The quick brown fox jumps over the lazy dog, and then the man said to the woman that he "
    "would not come back to the old house on the hill, because it was far too dark in there. "
)
N_PROMPT, N_PREFILL, N_DECODE = 38, 256, 64
MEGABYTE = 1 << 20


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
        good = median(self.values) >= self.target
        return "ok" if good == self.at_least or median(self.values) == self.target else "MISS"

    def __str__(self) -> str:
        low, mid, high = (f(self.values) for f in (min, median, max))
        spread = f"{low:.3g}–{high:.3g}" if len(self.values) > 1 else ""
        target = "" if self.target is None else f"{'≥' if self.at_least else '≤'} {self.target:g}"
        return (
            f"{self.what:<64}{mid:>8.3g} {self.unit:<3}{spread:>14}{target:>9}  {self.verdict}"
        ).rstrip()


class Bench:
    """A model, the prompts, and the rows found so far."""

    def __init__(self, name: str, rounds: int, quick: bool, quiet: bool):
        self.model = Model(name)
        self.rounds, self.quick, self.quiet = rounds, quick, quiet
        self.rows: list[Row] = []
        self.rng = np.random.default_rng(0)
        self._plain: ggml.Context | None = None

    def add(self, what: str, values: list[float], **more: Any) -> None:
        self.rows.append(Row(what, values, **more))
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
        return [_seconds(theirs) / _seconds(ours) for _ in range(rounds or self.rounds)]

    def tokens(self, n: int, shift: int = 0) -> list[int]:
        """A prompt of n tokens; another shift is another prompt."""
        ids = self.model.tokenize(TEXT * (2 + n // 30), bos=False)
        return self.model.tokenize("", bos=True)[:1] + ids[shift : shift + n - 1]

    def direction(self) -> np.ndarray:
        return self.rng.normal(size=self.model.n_embd).astype(np.float32)

    def plain(
        self, tokens: Sequence[int], n_predict: int = 0, directions: np.ndarray | None = None
    ) -> list[int]:
        """llama.cpp's decode and nothing else: the prompt, then greedily n_predict tokens, under
        its own control vector where `directions` (n_layer - 1, n_embd) are given."""
        if self._plain is None:
            params = ggml.ContextParams(
                n_ctx=512,
                n_ubatch=512,
                n_seq=1,
                flash=True,
                kv_type=self.model.kv_type,
                threads=self.model.threads,
                callback=False,
            )
            self._plain = ggml.Context(self.model._llama, params)
        context, out = self._plain, list[int]()
        context.clear()
        context.set_control_vector(directions)
        ids, start = np.asarray(tokens, np.int32), 0
        while True:
            n = len(ids)
            at = np.arange(start, start + n, dtype=np.int32)
            wanted = np.zeros(n, np.int8)
            wanted[-1] = 1
            context.decode(ids, at, np.zeros(n, np.int32), wanted)
            start += n
            best = int(context.logits()[0].argmax())
            if len(out) == n_predict:
                return out
            out.append(best)
            if len(out) == n_predict:  # the last token need not be run
                return out
            ids = np.asarray([best], np.int32)


# ---------------------------------------------------------------------------
# what is measured


def head_requests(bench: Bench, tokens: Sequence[int]) -> list[Request]:
    """Each head of each layer replaced by a random vector at the last token; what is wanted
    of each run is the logit of one token."""
    m = bench.model
    return [
        Request(
            tokens,
            edits=[
                Edit(
                    Site("head_out", layer),
                    "replace",
                    bench.rng.normal(size=m.head_dim).astype(np.float32),
                    tokens=-1,
                    heads=[head],
                )
            ],
            metric=lambda logits: float(logits[0, 11]),
        )
        for layer in range(m.n_layer)
        for head in range(m.n_head)
    ]


def engine(bench: Bench) -> None:
    m = bench.model
    requests = head_requests(bench, bench.tokens(N_PROMPT))
    step = 9 if bench.quick else 1
    part = requests[::step]
    scale = len(requests) / len(part)
    m.run(requests[:step])
    ratios = bench.compare(
        lambda: m.run(requests),
        lambda: [m.run([r]) for r in part],
        rounds=min(bench.rounds, 3),
        warm=False,
    )
    bench.add(
        f"{len(requests)} head replacements, one run / one by one"
        + (f" ({len(part)} scaled up)" if step > 1 else ""),
        [scale * r for r in ratios],
        target=25,
    )

    prompt, short = bench.tokens(N_PREFILL), bench.tokens(4)
    read = [Capture("resid_post", generated=True)]
    ratios = bench.compare(
        lambda: m.run([Request(prompt, captures=read, logits=None)]), lambda: bench.plain(prompt)
    )
    bench.add(f"prefill of {N_PREFILL}, every resid_post captured / llama.cpp", ratios, target=0.95)
    ratios = bench.compare(
        lambda: m.run([generating(short, captures=read)]), lambda: bench.plain(short, N_DECODE)
    )
    bench.add(f"decode of {N_DECODE}, every resid_post captured / llama.cpp", ratios, target=0.90)

    seconds, megabytes = _measured([sys.executable, __file__, "_sweep", "-m", m.name])
    bench.add("5 prompts × every head, this machine, whole process", [seconds], unit="s")
    cells = max(s.context.n_ctx for s in m._sessions.values())
    cache = cells * m.n_layer * 2 * m.n_head_kv * m.head_dim * 2  # keys and values, f16
    allowed = (m.path.stat().st_size + cache) / MEGABYTE + 300
    bench.add(
        "5 prompts × every head, this machine, peak memory",
        [megabytes],
        unit="MB",
        target=round(allowed),
        at_least=False,
    )


def steer(bench: Bench) -> None:
    m = bench.model
    prompt, short = bench.tokens(N_PREFILL), bench.tokens(4)

    def against_plain(
        what: str, edits: Sequence[Edit], target: float, vector: np.ndarray | None = None
    ) -> None:
        ratios = bench.compare(
            lambda: m.run([generating(short, edits=edits)]),
            lambda: bench.plain(short, N_DECODE, vector),
            rounds=5 * bench.rounds,  # half a second each, and only hundredths apart
        )
        bench.add(f"decode of {N_DECODE}, {what} / llama.cpp", ratios, target=target)

    against_plain("nothing changed", [], 0.98)
    vectors = [
        Edit(Site("resid_post", i), "add", self_scaled(bench.direction()))
        for i in range(1, m.n_layer)
    ]
    against_plain("steered at every layer by a vector", vectors, 0.98)
    same = np.stack([np.asarray(e.value) for e in vectors])
    against_plain("the same vector in both", vectors, 0.98, same)
    ratios = bench.compare(
        lambda: m.run([Request(prompt, edits=vectors)]), lambda: bench.plain(prompt)
    )
    bench.add(f"prefill of {N_PREFILL}, steered at every layer / llama.cpp", ratios, target=0.98)
    middle = Site("resid_post", m.n_layer // 2)
    against_plain(
        "a direction projected out at one layer",
        [Edit(middle, "project_out", bench.direction())],
        0.90,
    )


def lens(bench: Bench) -> None:
    m, tokens = bench.model, bench.tokens(35)
    reader = m.lens
    (matrix,) = (
        m.weights.matrix(n) for n in ("output.weight", "token_embd.weight") if n in m.weights
    )
    n_rows = m.n_layer * len(tokens)
    scores = np.empty((n_rows, m.n_vocab), np.float32)
    read = [Capture("resid_post")]

    def full() -> object:
        captures = m.run([Request(tokens, captures=read, logits=None)])[0].captures
        return reader.read(np.concatenate(list(captures.values())), 5)

    rows = bench.rng.normal(size=(n_rows, m.n_embd)).astype(np.float32)

    def forward_and_gemm() -> object:
        bench.plain(tokens)
        return np.matmul(rows, matrix.T, out=scores)

    ratios = [1 / r for r in bench.compare(full, forward_and_gemm)]
    what = f"lens on {m.n_layer} layers × {len(tokens)} tokens, time / (forward + float32 GEMM)"
    bench.add(what, ratios, target=1.5, at_least=False)


BARE = """
import sys, llama_cpp as L
quiet = L.llama_log_callback(lambda *_: None)
L.llama_log_set(quiet, None)
L.llama_backend_init()
model = L.llama_model_load_from_file(sys.argv[1].encode(), L.llama_model_default_params())
L.llama_init_from_model(model, L.llama_context_default_params())
"""


def process(bench: Bench) -> None:
    mia, python = str(Path(sys.executable).with_name("mia")), sys.executable
    bench.model.tokenize("x")  # the file is in the page cache
    prompt = "Q: What is the capital of France?\nA: The capital of France is"
    argv = [mia, "logit-lens", "l_out", "-m", bench.model.name, "-p", prompt]
    ours, bare, imports, helps = [], [], [], []
    for i in range(bench.rounds + 1):
        found = (
            _measured(argv),
            _measured([python, "-c", BARE, str(bench.model.path)]),
            _measured([python, "-c", "import mia"]),
            _measured([mia, "--help"]),
        )
        if i:
            for kept, one in zip((ours, bare, imports, helps), found, strict=True):
                kept.append(one)
    at_most = {"at_least": False}
    bench.add(
        "mia logit-lens l_out, whole process", [s for s, _ in ours], unit="s", target=1, **at_most
    )
    bench.add("  a bare process that loads the model, beside", [s for s, _ in bare], unit="s")
    bench.add(
        "mia logit-lens l_out, peak memory", [b for _, b in ours], unit="MB", target=350, **at_most
    )
    bench.add("  a bare process that loads the model, beside", [b for _, b in bare], unit="MB")
    bench.add("import mia", [s for s, _ in imports], unit="s", target=0.3, **at_most)
    bench.add("mia --help", [s for s, _ in helps], unit="s", target=0.3, **at_most)


GROUPS = {
    "engine": engine,
    "heads": heads,
    "steer": steer,
    "steering": steering,
    "tasks": tasks,
    "lens": lens,
    "process": process,
}


# ---------------------------------------------------------------------------
# helpers


def generating(tokens: Sequence[int], **more: Any) -> Request:
    return Request(tokens, logits=None, n_predict=N_DECODE, stop_at_eog=False, **more)


def self_scaled(v: np.ndarray) -> np.ndarray:
    return np.asarray(v / np.linalg.norm(v), np.float32)


def _seconds(work: Callable[[], object]) -> float:
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


def _measured(argv: list[str]) -> tuple[float, float]:
    """Wall seconds and peak megabytes of a process of its own."""
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *argv]
    done = subprocess.run(launcher, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    seconds, peak, code = done.stdout.split()
    if int(code) != 0:
        raise SystemExit(f"bench: exit status {int(code)} from: {' '.join(argv)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(seconds), int(peak) * unit / MEGABYTE


def sweep(name: str) -> None:
    """A process of its own, so that its peak memory is its own: 5 prompts × every head."""
    bench = Bench(name, 1, False, True)
    prompts = [bench.tokens(N_PROMPT, shift) for shift in range(5)]
    bench.model.run([r for tokens in prompts for r in head_requests(bench, tokens)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=[*GROUPS, "all", "_sweep"],
        metavar=f"{{{','.join(GROUPS)},all}}",
        help="which measurements (all)",
    )
    parser.add_argument("-m", "--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5, help="pairs that are timed (5)")
    parser.add_argument("--quick", action="store_true", help="scale the slow loop up from a ninth")
    parser.add_argument("--json", action="store_true", help="one JSON document, no table")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; at least 1")
    if args.what == "_sweep":
        return sweep(args.model)
    bench = Bench(args.model, args.rounds, args.quick, args.json)
    info = ggml.library_info()
    where = {
        "model": bench.model.name,
        "machine": probe._processor(),
        "threads": bench.model.threads,
        "llama_cpp_python": info["llama_cpp_python"],
        "features": info["features"],
        "rounds": args.rounds,
    }
    if not args.json:
        shown = "{model} on {machine}, {threads} threads, llama-cpp-python {llama_cpp_python}"
        print(shown.format(**where))
        busy, cores = os.getloadavg()[0], os.cpu_count() or 1
        if busy > 0.3 * cores:
            print(f"noisy: other programs keep {busy:.1f} of {cores} cores busy")
        print(f"{'':<64}{'median':>8}    {'min–max':>14}{'target':>9}")
    for name in GROUPS if args.what == "all" else [args.what]:
        GROUPS[name](bench)
    if args.json:
        rows = [{**asdict(r), "median": median(r.values), "verdict": r.verdict} for r in bench.rows]
        print(json.dumps({**where, "rows": rows}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
