"""The command: `scripts/soak --help`."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import reliability
from mia.llama import library_info
from reliability.files import files
from reliability.inputs import inputs
from reliability.memory import memory
from reliability.part import Options, Part
from reliability.requests import repeat, requests
from reliability.serving import serving
from reliability.signals import signals
from reliability.threads import threads

#: what may be asked for, with how many are run by default
PARTS: dict[str, tuple[Callable[[Options], Part], int]] = {
    "requests": (requests, 100_000),
    "inputs": (inputs, 100_000),
    "files": (files, 3_000),
    "memory": (memory, 10_000),
    "signals": (signals, 60),
    "threads": (threads, 210),
    "serving": (serving, 10_000),
}


def main() -> None:
    args = arguments()
    if args.repeat is not None:
        parts = [repeat(args.repeat)]
    else:
        parts = [run(name, args) for name in args.parts or PARTS]
    print("| part | what | figure |\n|---|---|---|")
    for part in parts:
        print(part.table())
    n_faults = sum(len(part.faults) for part in parts)
    for part in parts:
        for fault in part.faults:
            print(f"\n{part.name}: {fault}")
    if args.json is not None:
        document = {"command": sys.argv[1:], "build": library_info()["llama_cpp_python"]}
        text = json.dumps({**document, "parts": [asdict(part) for part in parts]}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(bool(n_faults))


def run(name: str, args: argparse.Namespace) -> Part:
    """One part, with the time that it took among its figures."""
    function, n = PARTS[name]
    options = Options(
        n if args.n is None else args.n,
        seed=args.seed,
        models=args.models,
        faults=args.faults,
        minutes=args.minutes,
        workers=args.workers,
    )
    part = function(options)
    part.figures["time"] = time.strftime("%H:%M:%S", time.gmtime(options.seconds))
    return part


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=reliability.__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)} (all)")
    each = ", ".join(f"{name} {n:,}" for name, (_, n) in PARTS.items())
    add("-n", type=int, help=f"how many of each part ({each})")
    add("--seed", type=int, default=0, help="(0)")
    add("--minutes", type=float, metavar="M", help="each part begins nothing new after M minutes")
    add("--models", type=Path, metavar="DIR", help="more GGUF files for `requests`, F32 ones")
    add("--workers", type=int, default=2, help="child processes at a time (2)")
    add("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    add("--faults", type=Path, metavar="DIR", default=Path("soak-faults"), help="(soak-faults)")
    add("--repeat", type=Path, metavar="FILE", help="run a kept group of requests again")
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; there are {', '.join(PARTS)}")
    for name in ("n", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"{name} is {getattr(args, name)}; at least 1")
    return args


if __name__ == "__main__":
    main()
