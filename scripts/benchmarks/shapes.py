"""Model files with the shapes of large models and random weights, for measurements of time and memory.

A file has the types of tensors that llama.cpp's quantizer gives such a model, and a vocabulary of
its size: smollm2's tokens and merges, filled up with tokens that no text has. The weights are
blocks of random bytes under scales that make them normal in size, so that a file is written as
fast as the disk takes it; logits are finite and some units wide.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mia.llama.gguf_file import TOKENS, Header, read_header
from mia.llama.gguf_write import RawTensor, Value, write_gguf
from mia.models import registry

#: ggml's number, numbers and bytes of a block, and the float16 fields (offset: value) under which random
#: bytes are weights around 0 with a standard deviation of 1/16
_TYPES: dict[str, tuple[int, int, int, dict[int, float]]] = {
    "q8_0": (8, 32, 34, {0: 0.00084}),
    "q4_k": (12, 256, 144, {0: 0.000245, 2: 0.00184}),
    "q6_k": (14, 256, 210, {208: 0.000046}),
}
_WIDTH = 1 / 16
#: bytes of random blocks that tensors are cut from
_CHUNK = 32 << 20


@dataclass(frozen=True)
class Shape:
    """The sizes of one model; `tied`: the token table unembeds too."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    head_dim: int
    tied: bool


SHAPES = {
    "1b": Shape(16, 2048, 32, 8, 8192, 128_256, 64, tied=True),  # Llama 3.2 1B
    "3b": Shape(28, 3072, 24, 8, 8192, 128_256, 128, tied=True),  # Llama 3.2 3B
    "8b": Shape(32, 4096, 32, 8, 14_336, 128_256, 128, tied=False),  # Llama 3.1 8B
    # the vocabulary and width of Gemma 2 2B, four of its blocks
    "256k": Shape(4, 2304, 8, 4, 9216, 256_000, 256, tied=True),
}
#: kinds of tokens (`enum llama_token_type` of llama.h)
_NORMAL, _CONTROL = 1, 3
#: what the quantizer calls them -> general.file_type
MIXES = {"q8_0": 7, "q4_k_m": 15}


def model_file(folder: Path, size: str, mix: str) -> Path:
    """The file of a size and a mix of types, written if it is not there."""
    path = folder / f"random-{size}-{mix}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_random(path, SHAPES[size], mix)
    return path


def write_random(path: Path, shape: Shape, mix: str) -> None:
    """Writes a model of random weights. `mix`: a key of `MIXES`."""
    blocks = _Blocks(np.random.default_rng(0))
    tensors: dict[str, np.ndarray | RawTensor] = {}
    for name, (n_out, n_in, gain) in _matrices(shape).items():
        kind = "q8_0" if mix == "q8_0" else _mixed_type(name, shape)
        tensors[name] = blocks.tensor(kind, n_out, n_in, gain / math.sqrt(n_in))
    for i in range(shape.n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{norm}.weight"] = np.ones(shape.n_embd, np.float32)
    tensors["output_norm.weight"] = np.ones(shape.n_embd, np.float32)
    write_gguf(path, {**_hyperparameters(shape, MIXES[mix]), **_vocabulary(shape.n_vocab)}, tensors)


def _matrices(shape: Shape) -> dict[str, tuple[int, int, float]]:
    """Name -> (n_out, n_in, how much larger than its input the output is)."""
    q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    embd, ff = shape.n_embd, shape.n_ff
    out = {"token_embd.weight": (shape.n_vocab, embd, 3.0)}
    for i in range(shape.n_layer):
        out |= {
            f"blk.{i}.attn_q.weight": (q, embd, 1.6),
            f"blk.{i}.attn_k.weight": (kv, embd, 1.6),
            f"blk.{i}.attn_v.weight": (kv, embd, 1.0),
            f"blk.{i}.attn_output.weight": (embd, q, 1.0),
            f"blk.{i}.ffn_gate.weight": (ff, embd, 1.0),
            f"blk.{i}.ffn_up.weight": (ff, embd, 1.0),
            f"blk.{i}.ffn_down.weight": (embd, ff, 1.0),
        }
    if not shape.tied:
        out["output.weight"] = (shape.n_vocab, embd, 3.0)
    return out


def _mixed_type(name: str, shape: Shape) -> str:
    """Q4_K_M: six bits for the unembedding, and for values and MLP outputs of half the blocks."""
    if name == "output.weight" or (name == "token_embd.weight" and shape.tied):
        return "q6_k"
    if not name.endswith(("attn_v.weight", "ffn_down.weight")):
        return "q4_k"
    n, i = shape.n_layer, int(name.split(".")[1])
    more = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    return "q6_k" if more else "q4_k"


class _Blocks:
    """Tensors that are cut from one run of random blocks of each type and scale, begun at another
    block each time."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._chunks: dict[tuple[str, float], np.ndarray] = {}

    def tensor(self, kind: str, n_out: int, n_in: int, width: float) -> RawTensor:
        """Weights (n_out, n_in) with a standard deviation of `width`."""
        number, n_values, n_bytes, _ = _TYPES[kind]
        chunk = self._chunk(kind, width).reshape(-1).data
        left, parts = n_out * n_in // n_values * n_bytes, []
        while left:
            start = int(self._rng.integers(len(chunk) // n_bytes)) * n_bytes
            parts.append(chunk[start : start + left])
            left -= len(parts[-1])
        return RawTensor(number, (n_out, n_in), parts)

    def _chunk(self, kind: str, width: float) -> np.ndarray:
        if (kind, width) not in self._chunks:
            _, _, n_bytes, halves = _TYPES[kind]
            blocks = self._rng.integers(0, 256, (_CHUNK // n_bytes, n_bytes), dtype=np.uint8)
            for offset, value in halves.items():
                half = struct.pack("<e", value * width / _WIDTH)
                blocks[:, offset : offset + 2] = np.frombuffer(half, np.uint8)
            self._chunks[kind, width] = blocks
        return self._chunks[kind, width]


def _hyperparameters(shape: Shape, file_type: int) -> dict[str, Value]:
    return {
        "general.architecture": "llama",
        "general.name": "random",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "llama.vocab_size": shape.n_vocab,
        "llama.context_length": 131_072,
        "llama.embedding_length": shape.n_embd,
        "llama.feed_forward_length": shape.n_ff,
        "llama.block_count": shape.n_layer,
        "llama.attention.head_count": shape.n_head,
        "llama.attention.head_count_kv": shape.n_head_kv,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": 500_000.0,
    }


def _vocabulary(n_vocab: int) -> dict[str, Value]:
    """smollm2's vocabulary with as many tokens, and twice as many merges as Llama 3 has to tokens."""
    tokens, merges = _smollm2_vocabulary()
    fill = [f"zq{i:06d}" for i in range(n_vocab - len(tokens))]  # no merge leads to one
    kinds = [_CONTROL if t.startswith("<|") else _NORMAL for t in tokens]
    n_merges = 2 * n_vocab - len(merges)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        TOKENS: [*tokens, *fill],
        "tokenizer.ggml.token_type": np.asarray([*kinds, *[_NORMAL] * len(fill)], np.int32),
        "tokenizer.ggml.merges": [*merges, *(f"zq{i:06d} zq{i + 1:06d}" for i in range(n_merges))],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def _smollm2_vocabulary() -> tuple[list[str], list[str]]:
    """The tokens and merges of smollm2's file."""
    path = registry.resolve("smollm2").path
    assert path is not None
    headers: list[Header] = []
    with path.open("rb") as file:
        read_header(file.fileno(), path, check=headers.append)
        values = headers[0].values
        array, merges = values["tokenizer.ggml.merges"], []
        file.seek(array.start)
        for _ in range(array.count):
            (length,) = struct.unpack("<Q", file.read(8))
            merges.append(file.read(length).decode())
    return [t.decode() for t in values[TOKENS]], merges
