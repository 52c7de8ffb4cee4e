"""A sweep's rows in a file: one JSON line for each cell, written as it is known.

At every moment the file is the beginning of the finished one, and perhaps half a line. Work that was
interrupted goes on at the end of the last whole chunk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mia.errors import FileError
from mia.io.files import check_writable, existing_file, write_json, write_whole
from mia.io.runs import reading
from mia.notices import notice
from mia.sweeps.axes import Grid
from mia.sweeps.cells import CellRow
from mia.sweeps.manifest import difference, manifest_path, read_manifest


class Lines:
    """Rows of a grid as lines, and lines as rows."""

    def __init__(self, grid: Grid):
        self._grid = grid

    def line(self, row: CellRow) -> bytes:
        values = {
            **self._where(row.run, row.cell),
            "value": row.value,
            "unchanged": row.unchanged,
            **({} if row.source is None else {"source": row.source}),
            **({} if row.null is None else {"null": row.null}),
            **({} if row.random is None else {"random": row.random}),
        }
        return json.dumps(values).encode() + b"\n"

    def row(self, line: bytes, run: int, cell: int) -> CellRow:
        """The row of a line, which must be that of this cell. Raises `ValueError`."""
        values = json.loads(line)
        where = self._where(run, cell)
        if not isinstance(values, dict) or any(values.get(k) != v for k, v in where.items()):
            raise ValueError("another cell")
        numbers = [values.get(k) for k in ("value", "unchanged", "source", "null", "random")]
        if any(not isinstance(x, float) for x in numbers[:2]):
            raise ValueError("no numbers")
        if any(not isinstance(x, (float, type(None))) for x in numbers):
            raise ValueError("no numbers")
        return CellRow(run, cell, *numbers)  # type: ignore[arg-type]

    def _where(self, run: int, cell: int) -> dict[str, Any]:
        return {"run": run, **self._grid.values(self._grid.cell(cell))}


def read_rows(
    path: str | Path, grid: Grid, cells: Iterable[tuple[int, int]]
) -> Iterator[tuple[CellRow, int]]:
    """The rows of a file, each with the byte at which it ends; half a line at the end is passed over.

    Args:
        cells: run and cell of each row that there may be, in order.

    Raises `FileError` for a line that is none of this sweep.
    """
    reading(path)
    lines, end = Lines(grid), 0
    expected = iter(cells)
    with existing_file(path).open("rb") as f:
        for i, line in enumerate(f):
            if not line.endswith(b"\n"):
                return
            try:
                row = lines.row(line, *next(expected))
            except StopIteration:
                raise FileError(f"{path} has more rows than its sweep has cells") from None
            except (ValueError, RecursionError) as err:
                raise FileError(f"{path}: line {i + 1} is not the row that comes there") from err
            end += len(line)
            yield row, end


class RowsFile:
    """A file of rows that is being written, by this process alone.

    Attributes:
        rows: those that were there already, of whole chunks.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Mapping[str, Any],
        grid: Grid,
        chunks: Sequence[Sequence[tuple[int, int]]],
        *,
        resume: bool = False,
    ):
        """Opens or makes the file.

        Args:
            chunks: run and cell of each row, chunk by chunk.
            resume: go on with what is there.

        Raises:
            FileError: it is there already, another process writes it, or it is of another sweep.
        """
        self.path = check_writable(path)
        self._lines = Lines(grid)
        self.rows: list[CellRow] = []
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            self._lock()
            if os.fstat(self._file).st_size == 0:
                write_json(manifest_path(path), manifest)
            elif not resume:
                raise FileError(f"{path} is there already: resume it, or remove it")
            else:
                self._go_on(manifest, grid, chunks)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        from mia.models.copy_store import lock

        if not lock(self._file, exclusive=True, wait=False):
            raise FileError(f"{self.path} is being written by another process")

    def _go_on(
        self,
        manifest: Mapping[str, Any],
        grid: Grid,
        chunks: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        old = read_manifest(self.path)
        if text := difference(old, manifest):
            raise FileError(f"{self.path} was made with other settings: {text}")
        if old["shard"] != manifest["shard"]:
            was, now = (_shard(m["shard"]) for m in (old, manifest))
            raise FileError(f"{self.path} is of {was}, not of {now}")
        if old.get("setup") != manifest.get("setup"):
            notice(f"{self.path} was begun on another machine or build: last digits may differ")
        ends = {0}
        for chunk in chunks:
            ends.add(max(ends) + len(chunk))
        whole = end = 0
        rows: list[CellRow] = []
        for row, at in read_rows(self.path, grid, (c for chunk in chunks for c in chunk)):
            rows.append(row)
            if len(rows) in ends:
                whole, end = len(rows), at
        self.rows = rows[:whole]
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    def write(self, row: CellRow) -> None:
        try:
            line = self._lines.line(row)
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as err:
            raise FileError(f"cannot write {self.path}: {err.strerror}") from err

    def keep(self) -> None:
        """Sees that what was written is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> RowsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shard(shard: Sequence[int] | None) -> str:
    return "the whole sweep" if shard is None else f"shard {shard[0]}/{shard[1]}"


# -- shards ------------------------------------------------------------------------------


def joined(
    paths: Sequence[str | Path], out: str | Path, more: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str | Path]]:
    """The manifest of a sweep's shards as one file, and the shards in the order of its cells.

    Args:
        more: what it says of how they were joined.

    Raises `FileError` if they are not all shards of one sweep.
    """
    for path in paths:
        if Path(path).resolve() in (Path(out).resolve(), manifest_path(out).resolve()):
            raise FileError(f"{out} is one of the shards; write another file")
    manifests = {path: read_manifest(path) for path in paths}
    ordered = _in_order(paths, [manifests[path] for path in paths])
    shards = [manifests[path] for path in ordered]
    whole = {k: v for k, v in shards[0].items() if k not in ("command", "run")}
    whole |= {"shard": None, "first": 0, "rows": sum(m["rows"] for m in shards), **more}
    whole["parts"] = [
        {"file": Path(path).name, **{k: m.get(k) for k in ("shard", "setup", "command")}}
        for path, m in zip(ordered, shards, strict=True)
    ]
    if any(m.get("setup") != shards[0].get("setup") for m in shards):
        notice("the shards were made on several machines or builds: last digits may differ")
    return whole, ordered


def write_joined(paths: Sequence[str | Path], out: str | Path, manifest: Mapping[str, Any]) -> None:
    """Writes files of rows one after the other into one. Raises `FileError`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as to:
            for path in paths:
                with Path(path).open("rb") as f:
                    shutil.copyfileobj(f, to)

    write_json(manifest_path(out), manifest)
    write_whole(out, write)


def _in_order(
    paths: Sequence[str | Path], manifests: Sequence[Mapping[str, Any]]
) -> list[str | Path]:
    by_shard: dict[int, str | Path] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        if text := difference(manifest, manifests[0]):
            raise FileError(f"{path} and {paths[0]} do not go together: {text}")
        if manifest["shard"] is None:
            raise FileError(f"{path} is no shard: it has the whole sweep")
        i, n = manifest["shard"]
        if n != manifests[0]["shard"][1]:
            raise FileError(
                f"{path} is one of {n} shards, {paths[0]} of {manifests[0]['shard'][1]}"
            )
        if i in by_shard:
            raise FileError(f"{path} and {by_shard[i]} are both shard {i}/{n}")
        by_shard[i] = path
    missing = [i for i in range(1, n + 1) if i not in by_shard]
    if missing:
        said = ", ".join(f"{i}/{n}" for i in missing[:8]) + (" …" if len(missing) > 8 else "")
        raise FileError(f"{len(missing)} of {n} shards are missing: {said}")
    return [by_shard[i] for i in sorted(by_shard)]
