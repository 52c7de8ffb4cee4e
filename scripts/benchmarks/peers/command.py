"""`scripts/bench peers`: prepares weights, inputs and environments, measures, and prints."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import benchmarks.peers
from benchmarks.harness import LAUNCHER, MEGABYTE
from benchmarks.peers import report
from benchmarks.peers.contestants import (
    GIVEN,
    LIBRARIES,
    ROOT,
    TYPES,
    Contestant,
    Running,
    chosen,
    environ,
    make_environment,
    of_library,
    of_mia,
)
from benchmarks.peers.growth import draw, grow
from benchmarks.peers.jobs import JOBS, PARTS, write_inputs
from benchmarks.peers.rounds import Table, measure
from benchmarks.peers.weights import export
from mia.llama import library_info, probe
from mia.llama.convert import FILE_TYPES, convert_file
from mia.model import Model

#: jobs that are measured as whole processes too, and the libraries that are fast enough for it
PROCESSES = {"lens": ("mia", "expert", "transformer-lens", "nnsight"), "heads": ("mia", "expert")}
#: what `--growth` draws, as pages name it
PICTURE = "img/growth.png"
#: contestants of the plots
GROWING = ("mia", "expert float32", "transformer-lens batched", "transformer-lens documented")


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.page:  # before minutes are spent
        report.put_into(args.page.read_text(), "")
    say = (lambda line: None) if args.quiet else _say
    model, contestants = prepare(args, say)
    reference = next(c for c in contestants if c.name == "expert float32")
    if args.growth:
        picture(args, model, contestants, say)
        return
    tables: list[Table] = []
    running: list[Running] = []
    started = time.monotonic()
    load = os.getloadavg()[0]
    try:
        versions: dict[str, str] = {}
        start(args, contestants, running)
        for c, process in zip(contestants, running, strict=True):
            for name, version in process.versions.items():
                # the libraries bring transformers of their own
                other = versions.get(name, version) != version
                versions[f"{name} ({c.library})" if other else name] = version
        want = next(r for r in running if r.contestant is reference)
        for name in args.jobs:
            inputs = write_inputs(model, name, args.folder, whole=args.whole)
            tables.append(
                measure(
                    JOBS[name],
                    inputs,
                    [r for r in running if r.contestant.library in args.shown],
                    want,
                    rounds=args.rounds,
                    folder=args.folder,
                    part=1 if args.whole else PARTS.get(name, 1),
                    progress=say,
                )
            )
    finally:
        for r in running:
            r.close()
    processes = []
    if args.processes:
        processes = whole_processes(args, contestants, say)
    conditions = {
        "model": model.name,
        "machine": probe.processor_name(),
        "cores": os.cpu_count(),
        "instructions": instructions(),
        "rounds": args.rounds,
        "load": load,
        "minutes": (time.monotonic() - started) / 60,
        "versions": versions,
    }
    if args.json:
        print(json.dumps(report.document(conditions, tables, processes), indent=1))
        return
    text = report.markdown(conditions, tables, processes)
    print(text)
    if args.page:
        if (args.page.parent / PICTURE).exists():
            text += f"\n\n![How CPU time grows with the work]({PICTURE})"
        args.page.write_text(report.put_into(args.page.read_text(), text))


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench peers",
        description=benchmarks.peers.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The first run makes environments of its own for torch, transformers and the "
        "libraries (.venv-bench-*): it needs network and 4 GB. Prints Markdown.",
    )
    parser.add_argument("-m", "--model", default="smollm2", help="a llama (smollm2)")
    parser.add_argument("--jobs", help=f"some of {','.join(JOBS)} (all)")
    parser.add_argument("--libraries", help=f"some of {','.join(LIBRARIES)} (all)")
    parser.add_argument(
        "--types", default="given,f16,f32", help=f"of mia's weights: some of {','.join(TYPES)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that are timed (5)")
    parser.add_argument(
        "--whole", action="store_true", help="the whole of the sweeps, not a part scaled up"
    )
    parser.add_argument("--no-processes", dest="processes", action="store_false")
    parser.add_argument(
        "--growth", type=Path, metavar="PNG", help="draws how time grows instead of the table"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document, no Markdown")
    parser.add_argument(
        "--page", type=Path, help="also puts the tables into a page, between its two marks"
    )
    parser.add_argument("--quiet", action="store_true", help="says nothing on stderr meanwhile")
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / ".bench-peers",
        help="where copies of the weights go, 1.5 GB (.bench-peers)",
    )
    parser.add_argument(
        "--environments", type=Path, default=ROOT, help="the folder of .venv-bench-*"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; at least 1")
    args.jobs = chosen(args.jobs, list(JOBS), "job")
    args.libraries = chosen(args.libraries, list(LIBRARIES), "library")
    args.types = chosen(args.types, TYPES, "type")
    args.shown = ["mia", "llama.cpp", *args.libraries]
    return args


def prepare(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Model, list[Contestant]]:
    """Weights in every form, environments, and who takes part: the expert always, as the others
    are compared with him."""
    model = Model(args.model, threads=1)
    hf = args.folder / "hf"
    facts = hf / "model.sha256"
    if not facts.exists() or facts.read_text() != model.file_hash:
        say(f"writing {model.name}'s weights for transformers into {hf}")
        for old in args.folder.glob("*.gguf"):  # of another model
            old.unlink()
        export(model, hf)
        facts.write_text(model.file_hash)
    files: dict[str, Path | str] = {}
    shown = {}
    for kind in args.types:
        if kind == GIVEN:
            files[kind], shown[kind] = args.model, f"{file_type(model)} (given)"
            continue
        files[kind], shown[kind] = args.folder / f"{kind}.gguf", kind.upper()
        if not (args.folder / f"{kind}.gguf").exists():
            say(f"converting {model.name} to {kind}")
            partial = args.folder / "partial.gguf"
            convert_file(model.path, partial, kind, os.cpu_count() or 1)
            partial.rename(args.folder / f"{kind}.gguf")
    contestants = of_mia(files, shown)
    for library in list(dict.fromkeys(["expert", *args.libraries])):
        make_environment(args.environments, LIBRARIES[library][0])
        contestants += of_library(library, hf, args.environments)
    return model, contestants


def file_type(model: Model) -> str:
    """What the file says: Q4_1."""
    kind = model.metadata.get("general.file_type", "")
    names = {str(number): name for name, number in FILE_TYPES.items()}
    return names.get(kind, f"type {kind}").upper()


def whole_processes(
    args: argparse.Namespace, contestants: Sequence[Contestant], say: Callable[[str], None]
) -> list[report.Process]:
    """Jobs as processes of their own, in turns: two rounds, one of the libraries."""
    out: dict[tuple[str, str], report.Process] = {}
    for job in (j for j in PROCESSES if j in args.jobs):
        for k in range(min(args.rounds, 2)):
            for c in contestants:
                if c.library not in PROCESSES[job] or c.library not in args.shown:
                    continue
                if c.is_library and (k or "batched" in c.name):
                    continue
                argv = [*c.argv, "--once", job, str(args.folder / f"{job}.npz")]
                wall, cpu, megabytes = measure_process(argv)
                p = out.setdefault((job, c.name), report.Process(job, c.name, [], [], []))
                p.wall.append(wall)
                p.cpu.append(cpu)
                p.megabytes.append(megabytes)
                say(f"process {job}: {c.name}: {wall:.2f} s, {megabytes:.0f} MB")
    return list(out.values())


def measure_process(argv: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak megabytes of a contestant's process."""
    launcher = LAUNCHER.replace(
        "usage.ru_maxrss,", "usage.ru_utime + usage.ru_stime, usage.ru_maxrss,"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", launcher, *argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environ(),
        text=True,
        check=True,
    )
    wall, cpu, peak, code = done.stdout.split()
    if int(code):
        raise SystemExit(f"bench peers: exit status {code} from: {' '.join(argv)}\n{done.stderr}")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(wall), float(cpu), int(peak) * unit / MEGABYTE


def start(
    args: argparse.Namespace, contestants: Sequence[Contestant], running: list[Running]
) -> None:
    """Starts processes and appends them to `running`, also the ones before a failure."""
    for c in contestants:
        running.append(Running(c, args.folder / f"{c.name.replace(' ', '-')}.log"))
    for process in running:
        process.wait()


def picture(
    args: argparse.Namespace,
    model: Model,
    contestants: Sequence[Contestant],
    say: Callable[[str], None],
) -> None:
    running: list[Running] = []
    try:
        some = [c for c in contestants if c.library in args.shown and c.name.startswith(GROWING)]
        start(args, some, running)
        measured: dict[str, Any] = grow(model, running, args.folder, say)
    finally:
        for r in running:
            r.close()
    draw(measured, args.growth)
    if args.json:
        print(json.dumps(measured, indent=1))


def instructions() -> str:
    """The widest of the processor's instructions that matter, as llama.cpp was built with them."""
    features = str(library_info()["features"])
    known = ("AMX_INT8", "AVX512_BF16", "AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "NEON")
    return next((f for f in known if f"{f} = 1" in features), "no AVX2") + (
        "" if "AMX_INT8 = 1" in features else ", no AMX"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
