"""Damaged inputs for everything that reads bytes from outside.

    PYTHONPATH=scripts python -m reliability.readers 20000 --seed 0

A reader gets a good file whose bytes, or whose header or document, were changed at random. It may read
it, or refuse it by a `MiaError`. Anything else is a fault of mia.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mia.arrays import Array
from mia.datasets import choices, pairs, tasks
from mia.errors import MiaError
from mia.io import activations
from mia.io.files import file_sha256, read_utf8
from mia.methods import soft_vectors
from mia.models import registry
from mia.models.hub import cached_file
from mia.vectors import Vector, load as load_vector
from mia.vectors.expression import combine
from mia.vectors.report import inspect

#: bytes that parsers trip over
_PIECES = (
    b"", b"\0", b"\xff", b"\x80", b"\n", b"\r\n", b"\x1b]52;c;AAAA\x07", b'"', b"\\", b"{", b"}", b"[", b"]",
    b"[" * 4000, b'{"a":' * 3000, b"\\ud800", b"\\udc00\\ud800", b"NaN", b"1e999", b"-1", b"9" * 5000, b"null",
    b"true", b'"\\u0000"', b"\xef\xbb\xbf", b"\xe2\x80\xae", b"\xff" * 8, b"\0" * 8, b"\x01\0\0\0\0\0\0\x80", b"..",
    b"../" * 8, b"/", b"PK\x03\x04", b"'''", b'"""', b"{input}", b",", b":", b"=", b"(" * 3000, b"i8", b">f4", b"O",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A name, good files of it (suffix, bytes), and what reads a file and uses what it holds."""

    name: str
    good: list[tuple[str, bytes]]
    read: Callable[[Path], object]


@dataclass
class Findings:
    """How many inputs each reader read and refused, and each foreign exception."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    foreign: list[tuple[str, str, bytes]] = field(default_factory=list)  # (reader, what, input)

    def __str__(self) -> str:
        lines = [
            f"{n:<14s} {self.read[n]:7d} read {self.refused[n]:7d} refused" for n in self.names
        ]
        total = sum(self.read.values()) + sum(self.refused.values()) + len(self.foreign)
        return "\n".join([*lines, f"{total} inputs, {len(self.foreign)} foreign exceptions"])

    @property
    def names(self) -> list[str]:
        return sorted({*self.read, *self.refused, *(name for name, *_ in self.foreign)})


def mutate_readers(n: int, seed: int, only: str = "") -> Findings:
    """Gives n damaged inputs to the readers in turn.

    Args:
        only: the name of one reader.
    """
    rng, findings = random.Random(seed), Findings()
    with tempfile.TemporaryDirectory() as place, _surroundings(Path(place)):
        folder = Path(place)
        chosen = [r for r in readers(folder) if only in ("", r.name)]
        for i in range(n):
            reader = chosen[i % len(chosen)]
            suffix, good = rng.choice(reader.good)
            data = damaged(good, suffix, rng)
            path = folder / f"damaged{suffix}"
            path.write_bytes(data)
            try:
                reader.read(path)
                findings.read[reader.name] += 1
            except MiaError:
                findings.refused[reader.name] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as err:  # a panic of Rust is no Exception
                where = traceback.extract_tb(err.__traceback__)[-1]
                what = f"{type(err).__name__} {where.filename.rpartition('/')[2]}:{where.lineno}: {err}"
                findings.foreign.append((reader.name, what[:200], data))
    return findings


# -- damage --------------------------------------------------------------------------------


def damaged(good: bytes, suffix: str, rng: random.Random) -> bytes:
    """A good file with a few changes: of its bytes, or of the header alone, so that the rest
    still fits."""
    if suffix == ".safetensors" and rng.random() < 0.7:
        n = struct.unpack("<Q", good[:8])[0]
        head = _changed(good[8 : 8 + n], rng)
        return struct.pack("<Q", len(head)) + head + good[8 + n :]
    if suffix == ".npy" and rng.random() < 0.7:
        n = struct.unpack("<H", good[8:10])[0]
        head = _changed(good[10 : 10 + n], rng)[:65535]
        return good[:8] + struct.pack("<H", len(head)) + head + good[10 + n :]
    if suffix == ".gguf" and rng.random() < 0.5:  # most of the header are numbers
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(4, min(len(data), 700) - 8)
            value = rng.choice((0, 1, 2, 8, 9, 255, 1 << 31, (1 << 32) - 1, rng.getrandbits(32)))
            data[at : at + 4] = struct.pack("<I", value)
        return bytes(data)
    return _changed(good, rng)


def _changed(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        match rng.randrange(14):
            case 0:
                data = data[:a] + bytes([rng.randrange(256)]) + data[a + 1 :]
            case 1:
                data = data[:a] + rng.choice(_PIECES) + data[a:]
            case 2:
                data = data[:a] + rng.choice(_PIECES) + data[min(b, a + 12) :]
            case 3:
                data = data[:a] + data[a + rng.choice((1, 1, 2, 8, 64)) :]
            case 4:
                data = data[:a]
            case 5 | 6 if data:
                i = rng.randrange(len(data))
                data = data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]
            case 7:
                data = data[:b] + data[a:][:20000]
            case _:
                data = _other_word(data, rng)
    return data


#: a word of JSON, TOML, CSV or a numpy header, and what can stand there instead
_WORD = re.compile(rb"\"(?:[^\"\\]|\\.)*\"|'[^']*'|-?\d+(?:\.\d+)?|true|null|False|\w+")
_WORDS = (
    b"0", b"-1", b"999999999999", b"9" * 30, b"1.5", b"1e400", b"NaN", b"true", b"null", b'"x"', b"'x'", b'""',
    b"[]", b"{}", b"[[1]]", b'{"a": {"b": 1}}', b'"{"', b'"\\ud800"', b'"\\u001b]52;c;AA\\u0007"', b'"../../x"', b'"F64"',
    b'"BF16"', b'"I64"', b'"BOOL"', b"'>c16'", b"'O'", b"'<M8'", b"'<f2'", b"'S8'", b"'?'", b"(3, 6, 1)", b"()", b"(0,)",
)  # fmt: skip


def _other_word(data: bytes, rng: random.Random) -> bytes:
    """One word becomes another: the whole stays well formed more often than by other changes."""
    words = list(_WORD.finditer(data, 0, 5000))
    if not words:
        return data
    word = rng.choice(words)
    return data[: word.start()] + rng.choice(_WORDS) + data[word.end() :]


# -- readers -------------------------------------------------------------------------------


def readers(folder: Path) -> list[Reader]:
    """Every reader, with good files made in `folder`."""
    rng = np.random.default_rng(0)

    def rows(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    v = Vector({i: rows(6) for i in (1, 2)}, metadata={"name": "a", "model": "m"})
    by_arithmetic = (2 * v - v.renamed("b")).with_metadata(items="0..5", data_sha256="x")
    made = {}
    for name, vector in (("plain", v), ("arithmetic", by_arithmetic)):
        for suffix in (".gguf", ".safetensors"):
            vector.save(folder / f"{name}{suffix}")
            made[name + suffix] = (suffix, (folder / f"{name}{suffix}").read_bytes())
    arrays = {
        "resid_post.0": rows(3, 6),
        "head_out.1": rows(3, 6),
    }
    facts = {"tokens": "[1, 2, 3]", "n_layer": "2", "n_embd": "6", "n_head": "2", "model": "m"}
    captured = []
    for held in (arrays, {"head_out.1": arrays["head_out.1"]}):
        activations.Activations(held, facts).save(folder / "a.safetensors")
        captured.append((".safetensors", (folder / "a.safetensors").read_bytes()))
    soft = soft_vectors.SoftVector(rows(1, 3, 6), np.ones((1, 3)), {"a": "b"})
    soft.save(folder / "s.safetensors")
    softened = (".safetensors", (folder / "s.safetensors").read_bytes())
    npy = [
        (".npy", _npy(rng.standard_normal((3, 6)).astype(t))) for t in ("<f4", "<f8", ">f2", "<i4")
    ]
    return [
        Reader("vector GGUF", [made["plain.gguf"], made["arithmetic.gguf"]], _use_vector),
        Reader("vector", [made["plain.safetensors"], made["arithmetic.safetensors"]], _use_vector),
        Reader("vector npy", npy, _use_vector),
        Reader("activations", captured, _use_activations),
        Reader("array", npy, _use_activations),
        Reader("soft vector", [softened], lambda p: soft_vectors.load(p).edits()),
        Reader("task", _TASKS, lambda p: _encoded(tasks.load(p).pairs)),
        Reader("pairs", _PAIRS, lambda p: _encoded(pairs.load_pairs(p))),
        Reader("lines", [(".txt", b"one\ntwo\n\nthree\n")], lambda p: pairs.load_pairs(p, p)),
        Reader("A/B questions", _CHOICES, lambda p: [i.choices() for i in choices.load_items(p)]),
        Reader("questions", _QUESTIONS, lambda p: _encoded(choices.load_questions(p))),
        Reader("models.toml", [(".toml", _TOML)], _use_models),
        Reader("prompt", [(".txt", "Q: naïve ☃\nA:".encode())], lambda p: _encoded(read_utf8(p))),
        Reader("expression", [(".txt", b"a - 0.5*(b + 'c')/2")], lambda p: _combine(p, v)),
        Reader("cache", [(".json", b'{"a 1 2": "f", "b": "0"}')], _use_cache),
    ]


_TASKS = [
    (".json", b'{"hot": "cold", "big": "small", "up": "down", "in": "out", "on": "off"}'),
    (".json", b'[{"input": "a", "output": "b"}, {"input": 1, "output": ["c", 2.5]}]'),
    (".jsonl", b'{"input": "a", "output": "b"}\n{"input": "\\u00e9", "output": ["c", "d"]}\n'),
]
_PAIRS = [
    (".csv", b'positive,negative,read_positive\n"a, b",c,1\nd,e,-1\n'),
    (".jsonl", b'{"positive": "a", "negative": "b", "read_negative": 2}\n'),
    (".json", b'[{"positive": "a", "negative": "b"}]'),
]
_AB = (
    b'[{"question": "Is it?\\n\\nChoices:\\n (A) yes\\n (B) no", "answer_matching_behavior": "(A)",'
    b' "answer_not_matching_behavior": "(B)"}]'
)
_CHOICES = [(".json", _AB)]
_QUESTIONS = [
    (".json", _AB),
    (".jsonl", b'{"question": "q", "correct_answers": ["a"], "incorrect_answers": ["b", "c"]}\n'),
]
_TOML = b"""[a]
repo = "owner/name"
file = "x.gguf"
revision = "main"
bos = true
ctx = 512
["b.c"]
path = "~/x.gguf"
bos_token = "<s>"
"""


def _npy(a: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, a)
    return out.getvalue()


def _encoded(value: object) -> None:
    """Uses every text that was read as a tokenizer would."""
    repr(value).encode()
    json.dumps(str(value), ensure_ascii=False).encode()


def _use_vector(path: Path) -> None:
    with np.errstate(over="ignore"):
        _use_directions(load_vector(path))


def _use_directions(v: Vector) -> None:
    assert all(isinstance(s.get("model", ""), str) for s in v.sources)
    shown = inspect(v)
    str(shown), shown.document(), shown.rows()
    v.cosine(v)


def _use_activations(path: Path) -> None:
    a = activations.load(path)
    a.tokens, a.sites, a.rows(), a.document(), repr(a)
    for name in a.arrays:
        a.at(name or "resid_post.0", -1)
        if name.startswith("head_out") and len(a.arrays) == 1:
            a.head(int(name.rpartition(".")[2]), 0)


def _use_models(path: Path) -> None:
    os.environ["MIA_MODELS"] = str(path)
    for spec in registry.registry().values():
        if spec.repo is not None and spec.file is not None:
            assert cached_file(spec.repo, spec.file, spec.revision) is None, "outside of the cache"


def _combine(path: Path, v: Vector) -> None:
    combine(read_utf8(path), lambda name: v)


def _use_cache(path: Path) -> None:
    store = Path(os.environ["XDG_CACHE_HOME"]) / "mia" / "hashes.json"
    store.parent.mkdir(exist_ok=True)
    store.write_bytes(path.read_bytes())
    assert len(file_sha256(path)) >= 1


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """Caches and working folder of its own; what lies around the hub's cache would be seen."""
    before, there = dict(os.environ), Path.cwd()
    os.environ.update(XDG_CACHE_HOME=str(folder), HF_HUB_CACHE=str(folder / "hub"))
    for depth in ("", "hub", "hub/models--owner--name/snapshots"):
        (folder / depth).mkdir(parents=True, exist_ok=True)
        (folder / depth / "x.gguf").write_bytes(b"GGUF")
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            yield
    finally:
        os.chdir(there)
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged inputs for every reader.")
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="One reader.")
    args = parser.parse_args()
    findings = mutate_readers(args.n, args.seed, args.only)
    print(findings)
    for what, count in Counter((name, what) for name, what, _ in findings.foreign).most_common(40):
        print(f"{count:5d}  {what[0]}: {what[1]!r}")
    sys.exit(bool(findings.foreign))


if __name__ == "__main__":
    main()
