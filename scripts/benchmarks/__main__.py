"""The command: `scripts/bench --help`."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import benchmarks
from benchmarks.engine import engine
from benchmarks.harness import Bench
from benchmarks.heads import heads
from benchmarks.large import large
from benchmarks.lens import lens
from benchmarks.processes import process
from benchmarks.products import products
from benchmarks.serving import serve
from benchmarks.shapes import MIXES, SHAPES
from benchmarks.steering import steer, steering
from benchmarks.sweeps import sweeps
from benchmarks.tasks import tasks
from mia.llama import library_info, probe

#: what may be asked for, in the order of the table
GROUPS: dict[str, Callable[[Bench], None]] = {
    "engine": engine,
    "heads": heads,
    "sweep": sweeps,
    "steer": steer,
    "steering": steering,
    "tasks": tasks,
    "lens": lens,
    "process": process,
    "serve": serve,
}
#: what is measured only if it is asked for by name: files of gigabytes, and no part of mia
APART = ("large", "products")


def main() -> None:
    if sys.argv[1:2] == ["peers"]:
        from benchmarks.peers.command import main as peers

        return peers(sys.argv[2:])
    args = arguments()
    bench = Bench(args.model, args.rounds, args.quick, quiet=args.json)
    conditions = conditions_of(bench)
    if not args.json:
        print_header(conditions)
    if args.what == "large":
        large(bench, args.folder, args.sizes.split(","), args.types.split(","))
    elif args.what == "products":
        products(bench, args.blas)
    else:
        for name in GROUPS if args.what == "all" else [args.what]:
            GROUPS[name](bench)
    if args.json:
        rows = [{**asdict(r), "median": median(r.values), "verdict": r.verdict} for r in bench.rows]
        print(json.dumps({**conditions, "rows": rows}, indent=1, ensure_ascii=False))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=benchmarks.__doc__,
        epilog="scripts/bench peers --help: mia beside other libraries",
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=[*GROUPS, "all", *APART],
        metavar=f"{{{','.join(GROUPS)},all,{','.join(APART)}}}",
        help="which measurements (all, without the last two)",
    )
    parser.add_argument("-m", "--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5, help="pairs that are timed (5)")
    parser.add_argument("--quick", action="store_true", help="scale the slow loop up from a ninth")
    parser.add_argument("--json", action="store_true", help="one JSON document, no table")
    large_files = parser.add_argument_group("large")
    large_files.add_argument(
        "--folder", type=Path, help="of large: where gigabytes of files are written"
    )
    large_files.add_argument("--sizes", default="1b,3b,8b,256k", help=f"of {', '.join(SHAPES)}")
    large_files.add_argument("--types", default="q8_0,q4_k_m", help=f"of {', '.join(MIXES)}")
    libraries = parser.add_argument_group("products")
    libraries.add_argument(
        "--blas",
        type=Path,
        action="append",
        default=[],
        help="a library with cblas_sgemm, as libmkl_rt.so",
    )
    args = parser.parse_args()
    for option, known in (("sizes", SHAPES), ("types", MIXES)):
        if unknown := set(getattr(args, option).split(",")) - known.keys():
            parser.error(f"--{option}: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; at least 1")
    if args.what == "large" and args.folder is None:
        parser.error("large writes gigabytes of files: --folder says where")
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
