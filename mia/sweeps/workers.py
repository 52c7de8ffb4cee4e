"""Chunks of a sweep on the workers of a dask cluster, each of which keeps the model open.

A chunk on a worker is the same planned run as here, so the numbers are the same. What a worker had in hand when
it died is done by another: the scheduler sees to that. The model must be on each worker under the same path or
name, and the versions the same.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import EngineError, UsageError
from mia.sweeps.cells import CellRow
from mia.sweeps.work import Chunk, Task, Work

if TYPE_CHECKING:
    from mia.model import Model

#: seconds to wait for the scheduler
_TIMEOUT = 10


@dataclass(frozen=True)
class Opened:
    """What a worker needs to open the same model.

    Attributes:
        key: of the sweep: another task is another work on the same model.
        lora: file, scale and hash of each adapter.
    """

    key: str
    path: str
    name: str
    sha256: str
    versions: tuple[tuple[str, str], ...]
    ctx: int
    kv_type: str
    as_type: str | None
    bos: bool
    flash: bool
    lora: tuple[tuple[str, float, str], ...]

    @classmethod
    def of(cls, model: Model, key: str) -> Opened:
        from mia.io.provenance import versions

        return cls(
            key,
            str(model.path.resolve()),
            model.name,
            model.facts.sha256,
            tuple(sorted(versions().items())),
            model.n_ctx,
            model.kv_type,
            None if model.copy is None else model.copy.type,
            model.adds_bos,
            model.fuses,
            tuple((str(a.path.resolve()), a.scale, a.sha256()) for a in model.adapters),
        )

    def open(self) -> Model:
        """Raises `MiaError` where the model is another one here."""
        from mia.io.provenance import versions
        from mia.model import Model

        here = tuple(sorted(versions().items()))
        if here != self.versions:
            raise UsageError(f"the worker has {dict(here)}, not {dict(self.versions)}")
        source = self.path if Path(self.path).is_file() else self.name
        model = Model(
            source,
            ctx=self.ctx,
            kv_type=self.kv_type,
            as_type=self.as_type,
            bos=self.bos,
            flash=self.flash,
            lora={file: scale for file, scale, _ in self.lora},
        )
        others = [source] if model.facts.sha256 != self.sha256 else []
        for adapter, (file, _, sha256) in zip(model.adapters, self.lora, strict=True):
            others += [file] if adapter.sha256() != sha256 else []
        if others:
            model.close()
            raise UsageError(f"{others[0]} is another file on the worker")
        return model


#: in a worker: the sweep that it works on
_turn = threading.Lock()
_open: tuple[Opened, Work] | None = None


def run_chunk(opened: Opened, task: Task, chunk: Chunk) -> list[CellRow]:
    """What a worker does: the rows of one chunk."""
    global _open
    with _turn:
        if _open is None or _open[0] != opened:
            if _open is not None:
                _open[1].model.close()
                _open = None
            _open = opened, Work(opened.open(), task)
        rows: list[CellRow] = []
        _open[1].run(chunk, rows.append)
        return rows


def results(work: Work, chunks: Sequence[Chunk], address: str) -> Iterator[list[CellRow]]:
    """The rows of each chunk, in order, from the workers of a scheduler.

    Raises:
        UsageError: dask is not installed, or the model has standing edits.
        EngineError: there is no scheduler, or a chunk ends worker after worker.
        MiaError: what a worker raised.
    """
    try:
        from distributed import Client, as_completed
        from distributed.scheduler import KilledWorker
    except ImportError as err:
        raise UsageError('workers need dask: pip install "mia[dask]"') from err
    if work.model.standing_edits:
        raise UsageError(
            "a model with standing edits cannot be swept on workers, whose models have none"
        )
    from secrets import token_hex

    opened = Opened.of(work.model, token_hex(8))
    try:
        client = Client(address, timeout=_TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as err:
        raise EngineError(f"there is no dask scheduler at {address}: {err}") from err
    with contextlib.closing(client):
        futures: dict[Any, int] = {
            client.submit(run_chunk, opened, work.task, chunk, pure=False): i
            for i, chunk in enumerate(chunks)
        }
        waiting: dict[int, list[CellRow]] = {}
        n = 0
        try:
            for future, rows in as_completed(list(futures), loop=client.loop, with_results=True):
                waiting[futures.pop(future)] = [CellRow(*row) for row in rows]
                future.release()
                while n in waiting:
                    yield waiting.pop(n)
                    n += 1
        except KilledWorker as err:
            raise EngineError(f"a chunk of the sweep ends one worker after another: {err}") from err
