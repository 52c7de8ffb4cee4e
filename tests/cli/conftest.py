"""Commands run in an empty folder, on a tiny model, with a cache of their own."""

from pathlib import Path

import pytest
from tiny_gguf import write_tiny

from mia.io import files


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that commands use; it asks for a BOS. A module may have another."""
    return write_tiny(tmp_path_factory.mktemp("cli") / "tiny.gguf", "llama")


@pytest.fixture(scope="session")
def path_without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but it asks for no BOS."""
    return write_tiny(tmp_path_factory.mktemp("cli") / "tiny.gguf", "llama", add_bos=False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIA_MODEL", str(path))
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path
