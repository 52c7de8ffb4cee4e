"""A GGUF file taken apart, changed in one place, and put together again."""

import random
import struct
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Tensor:
    name: bytes
    ne: list[int]
    kind: int
    offset: int


@dataclass
class Gguf:
    """`values`: key -> (type, value); an array is (9, (type, list))."""

    values: dict[bytes, tuple[int, Any]]
    tensors: list[Tensor]
    data: bytes

    def bytes(self) -> bytes:
        out = struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.values))
        for key, (kind, value) in self.values.items():
            out += _text(key) + struct.pack("<I", kind) + _packed(kind, value)
        for t in self.tensors:
            out += _text(t.name) + struct.pack("<I", len(t.ne))
            out += struct.pack(f"<{len(t.ne)}QIQ", *(n % 2**64 for n in t.ne), t.kind, t.offset)
        return out + bytes(-len(out) % 32) + self.data


def read(path: Path) -> Gguf:
    raw, pos = path.read_bytes(), 24
    n_tensors, n_values = struct.unpack_from("<QQ", raw, 8)

    def take(form: str) -> Any:
        nonlocal pos
        (value,) = struct.unpack_from("<" + form, raw, pos)
        pos += struct.calcsize("<" + form)
        return value

    def text() -> bytes:
        nonlocal pos
        n = take("Q")
        pos += n
        return raw[pos - n : pos]

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            inner, n = take("I"), take("Q")
            return inner, [value(inner) for _ in range(n)]
        return take(_SIZES[kind])

    values: dict[bytes, tuple[int, Any]] = {}
    tensors: list[Tensor] = []
    for _ in range(n_values):
        key, kind = text(), take("I")
        values[key] = (kind, value(kind))
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        tensors.append(Tensor(name, [take("Q") for _ in range(n_dims)], take("I"), take("Q")))
    return Gguf(values, tensors, raw[pos + -pos % 32 :])


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _packed(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    if kind == _ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_packed(inner, i) for i in items)
    return struct.pack("<" + _SIZES[kind], value)


WHOLE = (0, 1, 2, 3, 7, 64, 65535, 2**31 - 1, 2**31, 2**32 - 1)
FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))
TEXTS = (b"", b"llama", b"nonsense", b"\xff\xfe", b"x" * 5000, b"{{ 1 / 0 }}")


def mutants(path: Path) -> Iterator[tuple[str, bytes]]:
    """(what was changed, the file) for one change each."""
    whole = read(path)
    for key, (kind, value) in whole.values.items():
        for changed in _values(kind, value):
            g = deepcopy(whole)
            g.values[key] = changed
            shown = repr(changed[1])
            yield f"{key.decode()} = {changed[0]}:{shown[:40]}", g.bytes()
        g = deepcopy(whole)
        del g.values[key]
        yield f"without {key.decode()}", g.bytes()
    for key, kind, value in _NEW:
        arch = whole.values[b"general.architecture"][1]
        g = deepcopy(whole)
        g.values[key.replace(b"ARCH", arch)] = (kind, value)
        yield f"with {key.decode()} = {value!r}", g.bytes()
    for i, t in enumerate(whole.tensors):
        for name, tensor in _tensors(t):
            g = deepcopy(whole)
            g.tensors[i] = tensor
            yield f"{t.name.decode()}: {name}", g.bytes()
        g = deepcopy(whole)
        del g.tensors[i]
        yield f"without {t.name.decode()}", g.bytes()


def _values(kind: int, value: Any) -> Iterator[tuple[int, Any]]:
    if kind == 4 or kind == 5:
        for v in WHOLE if kind == 4 else (0, -1, 1, 2**31 - 1, -(2**31)):
            yield kind, v
        yield 6, 1.0
        yield 10, 2**63
        yield 8, b"1"
        yield 9, (4, [1, 2, 3])
        yield 9, (4, [])
    elif kind == 6:
        for f in FLOATS:
            yield kind, f
        yield 4, 1
        yield 9, (6, [1.0])
    elif kind == 7:
        yield kind, 2
        yield 4, 7
    elif kind == 8:
        for t in TEXTS:
            yield kind, t
        yield 4, 7
        yield 9, (8, [b"a", b"a"])
    elif kind == 9:
        inner, items = value
        yield 9, (inner, [])
        yield 9, (inner, items[:1])
        yield 9, (inner, items[:-1])
        yield 9, (inner, [*items, items[-1]])
        yield 9, (inner, [items[5]] * len(items))
        yield 9, (inner, items[::-1])
        yield 9, (4, [1] * len(items))
        yield 4, 3
        if inner == 8:
            for t in (b"", b"\xff", b" ", b"x" * 3000, b"a\0b"):
                yield 9, (8, [*items[:7], t, *items[8:]])
            yield 9, (8, [b""] * len(items))
        else:
            for n in (-1, 99, -(2**31)) if inner == 5 else FLOATS:
                yield 9, (inner, [*items[:7], n, *items[8:]])


_NEW: list[tuple[bytes, int, Any]] = [
    (b"ARCH.expert_count", 4, 3),
    (b"ARCH.expert_count", 4, 65535),
    (b"ARCH.expert_used_count", 4, 3),
    (b"ARCH.expert_group_count", 4, 3),
    (b"ARCH.nextn_predict_layers", 4, 1),
    (b"ARCH.nextn_predict_layers", 4, 99),
    (b"ARCH.rope.scaling.type", 8, b"nonsense"),
    (b"ARCH.rope.scaling.type", 8, b"yarn"),
    (b"ARCH.rope.scaling.factor", 6, 0.0),
    (b"ARCH.rope.scaling.factor", 6, float("nan")),
    (b"ARCH.rope.scaling.original_context_length", 4, 0),
    (b"ARCH.rope.dimension_count", 4, 0),
    (b"ARCH.rope.dimension_count_swa", 4, 7),
    (b"ARCH.rope.dimension_sections", 9, (5, [1, 2, 3, 4])),
    (b"ARCH.attention.key_length", 4, 0),
    (b"ARCH.attention.key_length", 4, 7),
    (b"ARCH.attention.value_length", 4, 0),
    (b"ARCH.attention.value_length", 4, 4),
    (b"ARCH.attention.key_length_swa", 4, 4),
    (b"ARCH.attention.sliding_window", 4, 0),
    (b"ARCH.attention.sliding_window", 4, 2**32 - 1),
    (b"ARCH.attention.sliding_window_pattern", 4, 0),
    (b"ARCH.attention.scale", 6, float("nan")),
    (b"ARCH.attention.max_alibi_bias", 6, 8.0),
    (b"ARCH.attention.causal", 7, 0),
    (b"ARCH.pooling_type", 4, 99),
    (b"ARCH.logit_scale", 6, float("nan")),
    (b"ARCH.vocab_size", 4, 0),
    (b"ARCH.feed_forward_length", 9, (4, [1, 2, 3])),
    (b"split.count", 2, 3),
    (b"split.no", 2, 1),
    (b"general.alignment", 4, 0),
    (b"general.alignment", 4, 3),
    (b"general.alignment", 4, 2**31),
    (b"tokenizer.ggml.bos_token_id", 4, 2**32 - 1),
    (b"tokenizer.ggml.eos_token_id", 4, 2**31),
    (b"tokenizer.ggml.eot_token_id", 4, 2**31 - 1),
    (b"tokenizer.ggml.padding_token_id", 4, 10**6),
    (b"tokenizer.ggml.add_eos_token", 7, 1),
    (b"tokenizer.ggml.add_sep_token", 7, 1),
    (b"tokenizer.ggml.precompiled_charsmap", 9, (0, [1, 2, 3])),
    *[
        (b"tokenizer.ggml.model", 8, name)
        for name in (b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"plamo2", b"no_vocab", b"none")
    ],
]


def _tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    for d in range(len(t.ne)):
        for n in (0, 1, t.ne[d] - 1, t.ne[d] + 1, 2 * t.ne[d], 2**31, 2**62, 2**63, 2**64 - 1):
            yield f"ne[{d}] = {n}", Tensor(t.name, [*t.ne[:d], n, *t.ne[d + 1 :]], t.kind, t.offset)
    yield "ne reversed", Tensor(t.name, t.ne[::-1], t.kind, t.offset)
    yield "no ne", Tensor(t.name, [], t.kind, t.offset)
    yield "ne + 1", Tensor(t.name, [*t.ne, 1], t.kind, t.offset)
    yield "ne + 0", Tensor(t.name, [*t.ne, 0], t.kind, t.offset)
    for kind in (*range(45), 99, 2**31, 2**32 - 1):
        if kind != t.kind:
            yield f"type {kind}", Tensor(t.name, t.ne, kind, t.offset)
    for offset in (t.offset + 1, t.offset + 32, 0, 2**32, 2**63, 2**64 - 32):
        yield f"offset {offset}", Tensor(t.name, t.ne, t.kind, offset)
    for name in (b"", b"x", b"blk.0.attn_norm.weight", b"x" * 63, b"x" * 64, b"\xff", b"blk.99.x"):
        yield f"named {name!r}", Tensor(name, t.ne, t.kind, t.offset)


def flipped(path: Path, n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`n` times the file with one to four bytes of its header changed, mostly outside the vocabulary."""
    rng, whole = random.Random(seed), path.read_bytes()
    header = len(whole) - len(read(path).data)
    for _ in range(n):
        raw, places = bytearray(whole), []
        for _ in range(rng.choice((1, 1, 2, 4))):
            first = rng.randrange(8, min(1500, header))
            place = rng.choice((first, rng.randrange(max(8, header - 3000), header)))
            raw[place] = rng.choice((0, 1, 127, 128, 255, raw[place] ^ 1 << rng.randrange(8)))
            places.append(place)
        yield f"bytes {places}", bytes(raw)
