"""Who takes part: mia at each type, plain llama.cpp, the expert, and the libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zlib import crc32

#: of the repository
ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
#: an environment -> its files of requirements, the second without what they ask for themselves
ENVIRONMENTS = {
    "expert": ("expert.txt", "expert-no-deps.txt"),
    "transformer-lens": ("transformer-lens.txt",),
    "nnsight": ("nnsight.txt",),
}
#: what `--libraries` knows -> environment, ways of using it
LIBRARIES = {
    "expert": ("expert", ("float32", "bfloat16")),
    "transformer-lens": ("transformer-lens", ("documented", "batched")),
    "nnsight": ("nnsight", ("documented", "batched")),
    "steering-vectors": ("expert", ("documented", "batched")),
    "repeng": ("expert", ("documented",)),
}
#: `--types`: the given file, and copies of its weights
GIVEN = "given"
TYPES = (GIVEN, "q8_0", "f16", "bf16", "f32")
#: environment variables that hold a library to one thread
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)


@dataclass(frozen=True)
class Contestant:
    """A process that does jobs.

    Attributes:
        name: as the table has it.
        library: mia, llama.cpp, or one of `LIBRARIES`.
        argv: what starts it.
        type: of mia's weights; "" for others.
        exact: it computes in float32.
    """

    name: str
    library: str
    argv: list[str]
    type: str = ""
    exact: bool = True

    @property
    def is_library(self) -> bool:
        """Not mia, llama.cpp or the expert."""
        return self.library not in ("mia", "llama.cpp", "expert")


def of_mia(files: dict[str, Path | str], shown: dict[str, str]) -> list[Contestant]:
    """mia at each type, and llama.cpp alone.

    Args:
        files: type -> file, or a model's name.
        shown: type -> what tables call it.
    """
    out = []
    for library, way in (("mia", "mia"), ("llama.cpp", "plain")):
        for kind, file in files.items():
            if library == "llama.cpp" and kind not in (GIVEN, "f16"):
                continue  # the bench of the engine has it beside mia
            argv = [sys.executable, "-m", "benchmarks.peers.run_mia", str(file), way]
            exact = kind == "f32"
            out.append(Contestant(f"{library} {shown[kind]}", library, argv, kind, exact))
    return out


def of_library(library: str, folder: Path, environments: Path) -> list[Contestant]:
    """A library in each way of using it. `folder`: the model for transformers."""
    environment, ways = LIBRARIES[library]
    module = "benchmarks.peers.run_" + library.replace("-", "_")
    out = []
    for way in ways:
        argv = [str(python_of(environments, environment)), "-m", module, str(folder)]
        argv += [way] if len(ways) > 1 else []
        name = f"{library} {way}" if len(ways) > 1 else library
        out.append(Contestant(name, library, argv, exact=way != "bfloat16"))
    return out


# -- environments ---------------------------------------------------------------------------


def python_of(environments: Path, name: str) -> Path:
    return environments / f".venv-bench-{name}" / "bin" / "python"


def make_environment(environments: Path, name: str) -> None:
    """Installs an environment's requirements, unless they are there. Needs network.

    Raises `SystemExit` with pip's last line."""
    files = [HERE / f for f in ENVIRONMENTS[name]]
    key = str(crc32(b"".join(f.read_bytes() for f in files)))
    python = python_of(environments, name)
    stamp = python.parents[1] / "bench-setup"
    if python.exists() and stamp.exists() and stamp.read_text() == key:
        return
    print(f"Installing {name} into {python.parents[1]}: network and minutes", file=sys.stderr)
    steps = [[sys.executable, "-m", "venv", str(python.parents[1])]]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for k, file in enumerate(files):
        steps.append([*pip, *(["--no-deps"] if k else []), "--requirement", str(file)])
    for step in steps:
        done = subprocess.run(step, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise SystemExit(f"bench peers: {name} cannot be installed: {lines[-1]}")
    stamp.write_text(key)


# -- processes ------------------------------------------------------------------------------


def environ() -> dict[str, str]:
    """Of a contestant: one thread, this folder's modules, no downloads."""
    paths = os.pathsep.join((str(ROOT / "scripts"), str(ROOT)))
    return {
        **os.environ,
        **ONE_THREAD,
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Running:
    """A contestant's process, asked over pipes. It starts at once, and answers from `wait` on."""

    def __init__(self, contestant: Contestant, log: Path):
        self.contestant, self._path = contestant, log
        self.versions: dict[str, str] = {}
        self.jobs: list[str] = []
        self._log: IO[str] = log.open("w")
        self._process = subprocess.Popen(
            contestant.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environ(),
            text=True,
        )

    def wait(self) -> Running:
        """Until the process can do jobs. Raises `SystemExit` naming its log if it ends before."""
        ready = self._answer()
        if "ready" not in ready:
            raise SystemExit(
                f"bench peers: {self.contestant.name} does not start ({ready['error']}); "
                f"see {self._path}"
            )
        self.versions, self.jobs = ready["ready"], ready["jobs"]
        return self

    def ask(self, job: str, inputs: Path, out: Path | None = None) -> dict[str, Any]:
        """{"cpu", "wall", "scale"} of a job done once, or {"error"}."""
        assert self._process.stdin is not None
        question = {"job": job, "inputs": str(inputs), "out": None if out is None else str(out)}
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": "the process has ended"}
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process has ended"}
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def chosen(given: str | None, known: Sequence[str], what: str) -> list[str]:
    """Names separated by commas, in their order; all of them for None.

    Raises `SystemExit` naming the known ones."""
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise SystemExit(f"bench peers: unknown {what} {name!r}; known: {', '.join(known)}")
    return [name for name in known if name in names]
