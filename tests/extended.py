"""A copy of the package with lines added to one file, as a contributor would add them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mia


def run_extended(folder: Path, file: str, after: str, lines: str, script: str, *args: str) -> str:
    """What a script prints that runs on the extended copy; the script must end well.

    Args:
        file: of the package; `lines` go behind the only line of it that is `after`.
    """
    package = folder / "mia"
    shutil.copytree(
        Path(mia.__file__).parent, package, ignore=shutil.ignore_patterns("data", "__pycache__")
    )
    source = (package / file).read_text()
    assert source.count(f"\n{after}\n") == 1
    (package / file).write_text(source.replace(f"\n{after}\n", f"\n{after}\n{lines}\n"))
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
