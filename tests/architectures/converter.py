"""llama.cpp's converter, from the source release of the llama-cpp-python that is installed here."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

NAME = "llama-cpp-python"
_PARTS = ("conversion", "gguf-py")


def converter(folder: Path) -> Path:
    """A folder with the converter's `conversion` and `gguf-py`, fetched where it is not there yet.

    Args:
        folder: for all versions; each gets a folder of its own.
    """
    target = folder / f"converter-{version(NAME)}"
    if not (target / _PARTS[-1]).is_dir():
        with tempfile.TemporaryDirectory() as downloads:
            _unpack(_download(Path(downloads)), target)
    return target


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    wish = ["--no-binary", NAME, "--no-deps", f"{NAME}=={version(NAME)}"]
    subprocess.run([*pip, *wish, "--dest", str(folder)], check=True, stdin=subprocess.DEVNULL)
    return next(folder.glob("*.tar.gz"))


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            # <release>/vendor/llama.cpp/<part>/…
            parts = PurePosixPath(member.name).parts
            if member.isfile() and parts[1:3] == ("vendor", "llama.cpp") and parts[3] in _PARTS:
                file = target.joinpath(*parts[3:])
                source = tar.extractfile(member)
                assert source is not None and ".." not in parts
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(source.read())
