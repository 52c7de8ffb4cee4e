"""The command: `scripts/bench --help`."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from statistics import median

import benchmarks
from benchmarks.engine import engine
from benchmarks.harness import Bench
from benchmarks.heads import heads
from benchmarks.lens import lens
from benchmarks.processes import process
from benchmarks.steering import steer, steering
from benchmarks.tasks import tasks
from mia.llama import library_info, probe

#: what may be asked for, in the order of the table
GROUPS: dict[str, Callable[[Bench], None]] = {
    "engine": engine,
    "heads": heads,
    "steer": steer,
    "steering": steering,
    "tasks": tasks,
    "lens": lens,
    "process": process,
}


def main() -> None:
    args = arguments()
    bench = Bench(args.model, args.rounds, args.quick, quiet=args.json)
    conditions = conditions_of(bench)
    if not args.json:
        print_header(conditions)
    for name in GROUPS if args.what == "all" else [args.what]:
        GROUPS[name](bench)
    if args.json:
        rows = [{**asdict(r), "median": median(r.values), "verdict": r.verdict} for r in bench.rows]
        print(json.dumps({**conditions, "rows": rows}, indent=1, ensure_ascii=False))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=benchmarks.__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=[*GROUPS, "all"],
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
    return args


def conditions_of(bench: Bench) -> dict[str, object]:
    """The model, the machine and the build: what the figures hold for."""
    info = library_info()
    return {
        "model": bench.model.name,
        "machine": probe.processor_name(),
        "threads": bench.model.threads,
        "llama_cpp_python": info["llama_cpp_python"],
        "features": info["features"],
        "rounds": bench.rounds,
    }


def print_header(conditions: dict[str, object]) -> None:
    line = "{model} on {machine}, {threads} threads, llama-cpp-python {llama_cpp_python}"
    print(line.format(**conditions))
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 0.3 * cores:
        print(f"noisy: other programs keep {busy:.1f} of {cores} cores busy")
    print(f"{'':<64}{'median':>8}    {'min–max':>14}{'target':>9}")


if __name__ == "__main__":
    main()
