"""Commands run in an empty folder, on a tiny model, with a cache of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
from one_prompt import PROMPT
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.io import files
from mia.model import Model
from mia.vectors import Vector


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


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    """The truth about the model of a module."""
    return Oracle(path)


@pytest.fixture(scope="module")
def tokens(path: Path) -> list[int]:
    """`one_prompt.PROMPT` as that model reads it."""
    with Model(path, threads=1) as m:
        return m.tokenize(PROMPT)


@pytest.fixture
def vector_files(folder: Path) -> None:
    """v.gguf, a vector of layers 1 and 2; pairs.jsonl, contrast pairs; ab.json, A/B questions."""
    rng = np.random.default_rng(0)
    directions = {i: rng.standard_normal(48).astype(np.float32) for i in (1, 2)}
    Vector(directions, metadata={"name": "v", "architecture": "llama"}).save("v.gguf")
    Path("pairs.jsonl").write_text(
        '{"positive": "The cat sat", "negative": "The dog sat"}\n'
        '{"positive": "sky is blue", "negative": "sky is red"}\n'
    )
    ab = [
        {
            "question": f"{q}\n\nChoices:\n (A) yes\n (B) no and no",
            "answer_matching_behavior": "(A)" if i % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
        }
        for i, q in enumerate(["cat is red?", "sky is blue?", "Paris in Rome?", "the dog?"])
    ]
    Path("ab.json").write_text(json.dumps(ab))
