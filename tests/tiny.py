"""A tiny random model with the oracle that says what it must give."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from oracle import Oracle

from mia.model import Model
from mia.request import Result
from mia.sites import Site

#: name -> (architecture, arguments of write_tiny)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "qwen2": ("qwen2", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-window": ("gemma2", {"window": 4}),
    "gpt2": ("gpt2", {}),
}
#: mixtures of experts
MIXTURES = ("mixtral", "qwen2moe", "dots1")


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its file, the model under test, and what computes the truth."""

    name: str
    path: Path
    model: Model

    @property
    def oracle(self) -> Oracle:
        return _oracle(self.path)

    def prompt(self, n: int = 14, seed: int = 1) -> list[int]:
        """n random token ids, none of them a control token."""
        return np.random.default_rng(seed).integers(3, self.model.n_vocab, n).tolist()

    def vector(self, site: str = "resid_post.0", seed: int = 2) -> np.ndarray:
        """A random row of a site: (width,) float32."""
        width = np.prod(self.model.topology.sites[Site(*_split(site))].shape)
        return np.random.default_rng(seed).standard_normal(int(width)).astype(np.float32)


def logits(result: Result) -> np.ndarray:
    """The logits that a request asked for: (n_positions, n_vocab)."""
    assert result.logits is not None
    return result.logits


@cache
def _oracle(path: Path) -> Oracle:
    return Oracle(path)


def _split(site: str) -> tuple[str, int | None]:
    name, _, layer = site.partition(".")
    return name, int(layer) if layer else None
