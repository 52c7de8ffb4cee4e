"""Copies of models with their weights in another type, made once by llama.cpp's quantizer and kept.

A quantized type rounds the inputs of its matrix products to 8 bits, so that small effects drown. A copy
of the same weights as f16, bf16 or f32 does not. `mia.models.copy_store` says where copies lie, how they
are found again, and when they are removed.

Numbers beyond 65504 do not fit into f16. They are seen in the weights, as llama.cpp checks what it
converts, and in the activations of a short text that is run once; bf16 is taken then.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mia.errors import EngineError, FileError, ModelError, UsageError
from mia.io import files
from mia.llama.open_file import OpenFile
from mia.models.copy_store import (
    RESERVE,
    Copy,
    Hold,
    Record,
    copies,
    copies_folder,
    disk_of,
    forget,
    has_room,
    key_of,
    limit,
    lock,
    make_room,
    read,
    remove,
    turn,
)
from mia.notices import notice
from mia.progress import step

__all__ = [
    "TYPES",
    "Copy",
    "Weights",
    "bytes_as",
    "copies",
    "copies_folder",
    "forget",
    "has_room",
    "limit",
    "matrix_types",
    "remove",
    "weights_as",
]

#: types whose products take activations as they are, or rounded to the type itself
TYPES = ("f16", "bf16", "f32")
#: what is run to see whether activations stay within half precision
_TEXT = (
    'The capital of France is Paris. In 1994, she said: "I don\'t know"; def f(x): return x + 1\n'
)
_CANNOT_HOLD = "quantized data validation failed"


@dataclass(frozen=True)
class Weights:
    """The weights that are opened for a model.

    Attributes:
        path: of the file: a copy, or the model itself if it has this type.
        type: f16, bf16 or f32.
        note: what of the model's own weights is lost, or why it is not the type that was asked for.
        hold: keeps the copy from being removed; None for the model itself.
    """

    path: Path
    type: str
    note: str = ""
    hold: Hold | None = None


def weights_as(source: Path, as_type: str, *, name: str, threads: int) -> Weights:
    """A model's weights in another type: its own file if it has that type, else a copy, which is made if
    there is none.

    If numbers of the model do not fit into f16 (65504 at most), bf16 is taken; a notice says so, and it is
    remembered.

    Args:
        source: the model's file, the first part of a split one.
        as_type: f16, bf16 or f32.
        name: what messages call the model.

    Raises:
        UsageError: another type.
        FileError: there is no room for a copy, or it cannot be written.
        EngineError: llama.cpp refuses to convert the model.
    """
    check_type(as_type)
    types = matrix_types(source)
    if as_type in types and types <= {as_type, "f32"}:
        return Weights(source, as_type)
    folder = copies_folder()
    record = read(folder / f"{key_of(source, as_type)}.json")
    refused = "" if record is None else record.refused
    if not refused:
        try:
            return _copy(folder, source, as_type, name, threads)
        except _DoesNotFitError as err:
            refused = str(err)
            record = Record(name, str(source.absolute()), as_type, refused=refused)
            with contextlib.suppress(OSError, FileError):  # it will be tried again then
                files.write_json(
                    folder / f"{key_of(source, as_type)}.json", asdict(record), own=True
                )
    notice(f"{name} is opened as bf16: {refused}")
    taken = _copy(folder, source, "bf16", name, threads)
    return Weights(taken.path, "bf16", f"instead of f16: {refused}; {taken.note}", taken.hold)


def check_type(as_type: str) -> None:
    """Raises `UsageError` for a type that no copy can have."""
    if as_type not in TYPES:
        raise UsageError(f"unknown type {as_type!r}; known: {', '.join(TYPES)}")


def matrix_types(source: Path) -> set[str]:
    """The types of a file's matrices. Raises `ModelError` if it cannot be read."""
    from mia.llama import type_name

    return {type_name(t.type) for _, t in OpenFile(source).tensors() if prod(t.ne[1:]) > 1}


def bytes_as(source: Path, as_type: str) -> int:
    """How large a copy is at most."""
    from mia.llama import type_bytes

    size = {"f16": 2, "bf16": 2, "f32": 4}[as_type]
    total = 0
    tensors = OpenFile(source).tensors()
    for _, t in tensors:
        n = prod(t.ne)
        # what the quantizer leaves keeps its type
        total += max(n * size, type_bytes(t.type, n)) if prod(t.ne[1:]) > 1 else n * 4
    header = min((t.offset for part, t in tensors if part == 0), default=0)
    return total + header + 64 * len(tensors)  # padding


# -- finding and making one ---------------------------------------------------------------


class _DoesNotFitError(Exception):
    """Numbers of the model are beyond the range of a type."""


def _copy(folder: Path, source: Path, kind: str, name: str, threads: int) -> Weights:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(3):  # what was found or made may be removed before it is held
            if taken := _taken(folder, source, kind):
                return taken
            with turn(folder, name):
                if taken := _taken(folder, source, kind):  # made while this process waited
                    return taken
                _make(folder, source, kind, name, threads)
    except OSError as err:
        raise FileError(
            f"a copy of {name} cannot be kept in {folder}: {err.strerror or err}"
        ) from err
    raise FileError(f"a copy of {name} is removed from {folder} whenever it is made")


def _taken(folder: Path, source: Path, kind: str) -> Weights | None:
    """The copy that there is, held; None if there is none, or it is not whole."""
    path = folder / f"{key_of(source, kind)}.gguf"
    record = read(path.with_suffix(".json"))
    if record is None or record.refused:
        return None
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return None
    hold = Hold(file)
    lock(file, exclusive=False, wait=True)
    stat = os.fstat(file)
    with contextlib.suppress(OSError):
        if os.path.samestat(stat, path.stat()) and (stat.st_size, stat.st_mtime_ns) == (
            record.bytes,
            record.mtime_ns,
        ):
            os.utime(path.with_suffix(".json"))
            return Weights(path, kind, _note(record), hold)
    hold.close()
    return None


def _note(record: Record) -> str:
    """What is lost, as results say it."""
    notes = []
    if record.rounded:
        notes.append(f"weights of {' and '.join(record.rounded)} are rounded to {record.type}")
    if record.left:
        notes.append(f"some stay {' and '.join(record.left)}")
    return "; ".join(notes)


def _make(folder: Path, source: Path, kind: str, name: str, threads: int) -> None:
    key = key_of(source, kind)
    path, what = folder / f"{key}.gguf", f"a copy of {name} as {kind}"
    for old in copies():  # of what had this name before
        if not old.current and (old.source, old.type) == (source.absolute(), kind):
            remove(old)
    make_room(folder, bytes_as(source, kind), what)

    def write(temporary: Path) -> None:
        _convert(source, temporary, kind, threads, what)
        if kind == "f16" and (problem := _overflow(temporary, threads)):
            raise _DoesNotFitError(problem)
        if key_of(source, kind) != key:
            raise ModelError(f"{source} was changed while it was copied; try again")
        _to_disk(temporary)
        stat = temporary.stat()
        record = Record(
            name,
            str(source.absolute()),
            kind,
            _rounded(source, temporary, kind),
            sorted(matrix_types(temporary) - {kind, "f32"}),
            stat.st_size,
            stat.st_mtime_ns,
        )
        # first, as a copy without it would be found by nobody
        files.write_json(path.with_suffix(".json"), asdict(record), own=True)

    with step(f"making {what}, once"):
        files.write_whole(path, write, own=True)
    size = path.stat().st_size / 1e6
    notice(f"made {what} ({size:.0f} MB), which is kept: mia models cache")


def _convert(source: Path, target: Path, kind: str, threads: int, what: str) -> None:
    from mia.llama import convert_file

    try:
        convert_file(source, target, kind, threads)
    except EngineError as err:
        if kind == "f16" and _CANNOT_HOLD in str(err):
            raise _DoesNotFitError("it has weights beyond 65504, the largest of f16") from err
        if disk_of(target.parent).free < RESERVE:
            raise FileError(
                f"{what} cannot be written: the disk of {target.parent} is full"
            ) from err
        raise


def _rounded(source: Path, copy: Path, kind: str) -> list[str]:
    """The types of tensors that were converted, unless that is exact."""
    from mia.llama import type_name

    if kind == "f32":
        return []
    own, now = ({t.name: t.type for _, t in OpenFile(p).tensors()} for p in (source, copy))
    return sorted({type_name(own[n]) for n in own if now.get(n, own[n]) != own[n]})


def _overflow(path: Path, threads: int) -> str:
    """Why an f16 copy cannot be used, or "" if a short text runs."""
    from mia.llama import Context, ContextParams, LlamaModel
    from mia.llama.probe import extra_buffers_safe

    model = LlamaModel(path, extra_bufts=extra_buffers_safe())
    try:
        ids = _trial_tokens(model)
        params = ContextParams(
            n_ctx=256, n_ubatch=64, n_seq=1, flash=False, kv_type="f32", threads=threads,
            callback=False,
        )  # fmt: skip
        context = Context(model, params)
        try:
            n = len(ids)
            context.decode(ids, list(range(n)), [0] * n, [True] * n)
            finite = bool(np.isfinite(context.logits()).all())
        finally:
            context.close()
    finally:
        model.close()
    return "" if finite else "activations go beyond 65504, the largest of f16"


def _trial_tokens(model: Any) -> list[int]:
    ids = model.tokenize(_TEXT, special=False) if model.has_vocab else []
    bos = model.special("bos") if model.has_vocab else -1
    if len(ids) < 4:
        ids = [i % model.n_vocab for i in range(5, 17)]
    return [*([bos] if bos >= 0 else []), *ids][:64]


def _to_disk(path: Path) -> None:
    """After a power cut a file may have its name and size, but not its bytes."""
    with path.open("rb+") as f:
        os.fsync(f.fileno())
