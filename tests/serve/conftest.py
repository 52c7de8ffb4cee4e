"""A tiny model with a chat template, served."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_tiny

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from serving import TEMPLATE, Client, serving

from mia.model import Model
from mia.vectors import Vector


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("serve") / "served.gguf"
    with Model(write_tiny(path, "llama", chat_template=TEMPLATE), threads=1, ctx=2048) as m:
        yield m


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """A folder of vectors: warm, cold, and what is none."""
    folder = tmp_path_factory.mktemp("vectors")
    for i, name in enumerate(("warm", "cold")):
        rng = np.random.default_rng(i)
        vector = Vector({k: rng.standard_normal(model.n_embd).astype(np.float32) for k in (1, 2)})
        vector.save(folder / f"{name}.safetensors")
    (folder / "broken.gguf").write_bytes(b"GGUF, but not really")
    (folder / "secret.txt").write_text("not for clients")
    return folder


@pytest.fixture(scope="package")
def client(model: Model, folder: Path) -> Iterator[Client]:
    with serving(model, vectors=folder) as client:
        yield client
