"""Work in a child process: what may crash, hang, or cannot be interrupted.

The child is Python on a module of this package. It ends with this process, writes no core dump, and
tells nothing on a terminal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: its exit status, negative for a signal; None if it was stopped after `seconds`.
        out, err: what it printed.
    """

    code: int | None
    out: str
    err: str
    seconds: float | None

    @property
    def death(self) -> str:
        """What killed it: a signal's name, an exit status, or how long it gave no answer."""
        if self.code is None:
            return f"no answer in {self.seconds:.0f} s"
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"exit status {self.code}"


def python(module: str, *arguments: str) -> list[str]:
    """The command of a child, which imports what this process would."""
    path = [str(Path(p).absolute()) for p in sys.path]
    code = f"import runpy, sys; sys.path[:] = {path!r}; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code, *arguments]


def run(command: Sequence[str], *, seconds: float | None = None, cwd: str | None = None) -> Outcome:
    """Runs a command to its end, or for so many seconds. On Ctrl-C it is stopped.

    Args:
        cwd: its working folder, by default the root: relative paths do not reach it.

    Raises:
        OSError: it cannot be started.
    """
    import subprocess  # here: most runs of mia need none of it

    # no debugger for a backtrace; and the working folder may have a file named like a module
    env = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONSAFEPATH": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command,
        cwd=cwd or os.sep,
        env=env,
        stdin=quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return Outcome(None, out, err, seconds)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return Outcome(process.returncode, out, err, seconds)


def prepare() -> None:
    """What a child does first: a crash of it is no news, and it ends with its parent."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
