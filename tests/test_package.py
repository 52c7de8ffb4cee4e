"""What pip builds from this folder: data, types and the compiled callback, and no version twice."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mia

ROOT = Path(mia.__file__).parents[1]
# what pip needs, without the builds and environments that lie beside it
SOURCES = ("mia", "pyproject.toml", "README.md", "LICENSE")


def test_the_version_has_one_home() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text and not re.search(r"^version = \"", text, re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+", mia.__version__)


def _wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel of the source distribution of a copy of this folder."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            built = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=built)
        else:
            shutil.copy(ROOT / name, source / name)

    def python(*words: str) -> None:
        command = [sys.executable, *words]
        variables = {**os.environ, **environment}
        done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    backend = "from setuptools import build_meta; build_meta.build_sdist('..')"
    python("-c", backend)
    (archive,) = folder.glob("*.tar.gz")
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check", "wheel")
    python(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", "..", f"../{archive.name}")
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_has_the_data_and_the_compiled_callback(tmp_path: Path, compiler: bool) -> None:
    if compiler and not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    environment = {} if compiler else {"CC": "/bin/false"}
    with _wheel(tmp_path, **environment) as wheel:
        names = set(wheel.namelist())
    package = ROOT / "mia"
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    kept = [p for p in files if p.suffix == ".py" or p.parent.is_relative_to(package / "data")]
    expected = {p.relative_to(ROOT).as_posix() for p in [*kept, package / "py.typed"]}
    compiled = {n for n in names if n.endswith((".so", ".pyd"))}
    metadata = {n for n in names if n.startswith(f"mia-{mia.__version__}.dist-info/")}
    assert names - compiled - metadata == expected
    assert f"mia-{mia.__version__}.dist-info/licenses/LICENSE" in metadata
    assert [n.partition(".")[0] for n in compiled] == ["mia/llama/_watch"] * compiler
