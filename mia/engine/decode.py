"""One decode: tells the tracer what to do at which node, and runs llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mia.arrays import Array, IntArray
from mia.edits import Edit
from mia.engine.answers import Buffer
from mia.engine.batch import Batch
from mia.engine.finite import check_logits
from mia.engine.generation import Generation
from mia.engine.jobs import Read
from mia.engine.needs import not_read
from mia.engine.session import Session, Variant
from mia.engine.visits import Visits
from mia.errors import EngineError
from mia.sites import BY_KEY, Site

#: decodes of one batch, or runs of one request, before we give up on a graph that is new each time
ATTEMPTS = 4


class Restart(Exception):
    """The graph was not a known one, and the memory cannot be cut back: run the request again."""


def always_new_graph() -> EngineError:
    return EngineError("llama.cpp builds another graph each time; mia cannot follow it")


class Decoder:
    """The decodes of one run."""

    def __init__(
        self, session: Session, edits: Mapping[Edit, Site], buffers: Mapping[Read, Buffer]
    ):
        self._session, self._context = session, session.context
        self._edits, self._buffers = edits, buffers
        #: for each row of the batch, its place among the outputs
        self._output_index: IntArray = np.empty(0, np.intp)
        #: of the coming decode
        self._visits: Visits | None = None
        #: what the tracer expects as long as the same generations go on, at the same graph
        self._standing: tuple[Visits, Sequence[Generation], Variant] | None = None
        self.refresh()

    def refresh(self) -> None:
        """To be called when other edits or buffers are in use than before."""
        edits = self._edits
        sites = [*edits.values(), *(s for read in self._buffers for s in read.sites)]
        self._track_cells = any(site.name in BY_KEY for site in sites)
        self._changed = bool(edits)
        self._logits_edited = any(site.name == "logits" for site in edits.values())
        self._standing = None

    def decode(self, batch: Batch) -> None:
        """Decodes a batch, edits and captures included.

        llama.cpp may build a graph that is not known yet. Then nothing was computed: the graph is
        learned, the rows are taken out of the cache, and the batch is decoded again.
        """
        tokens, positions = [r.token for r in batch.rows], [r.pos for r in batch.rows]
        outputs = batch.outputs
        self._output_index = np.cumsum(outputs, dtype=np.intp) - 1
        for _ in range(ATTEMPTS):
            if self._context.tracer is not None:
                self._session.turn_to(any(outputs))
                self._expect(batch)
            if self._context.decode(tokens, positions, batch.sequences, outputs):
                if self._visits is not None:
                    self._visits.read_later()
                return
            self._standing = None
            self._session.learn(len(tokens))
            self._take_out(batch.sequences, positions)
        raise always_new_graph()

    def logits(self, b: int) -> Array:
        """The logits (n_vocab,) of row b of the batch, valid until the next decode."""
        row: Array = self._context.logits()[self._output_index[b]]
        kv_type = self._context.params.kv_type
        check_logits(row, changed=self._changed, edited=self._logits_edited, kv_type=kv_type)
        return row

    def _take_out(self, sequences: Sequence[int], positions: Sequence[int]) -> None:
        first = dict(zip(reversed(sequences), reversed(positions), strict=True))
        for sequence, position in first.items():
            if not self._context.seq_rm(sequence, position):
                raise Restart

    def _expect(self, batch: Batch) -> None:
        """Tells the tracer which nodes to visit in the coming decode, and which need not run."""
        assert self._context.tracer is not None
        variant = self._session.variants[0]
        standing, self._standing = self._standing, None
        if batch.generations and standing is not None:
            visits, generations, last_variant = standing
            if last_variant is variant and generations == batch.generations:
                visits.go_on(batch.rows)  # the tracer expects it still
                self._visits = visits
                self._standing = standing
                return
        visits = Visits(
            self._session,
            batch.rows,
            self._output_index,
            edits=self._edits,
            buffers=self._buffers,
            track_cells=self._track_cells,
        )
        skip: list[int] = []
        if batch.first_block:
            visits.put_residuals(batch.first_block, batch.spans)
            skip += variant.topology.skippable_below(batch.first_block)
        visits.gather()
        skip += not_read(batch, variant.topology, visits.actions)
        self._context.tracer.expect(variant.addrs, visits.stops, skip, visits.visit)
        self._context.tracer.copy(visits.copies)
        self._context.tracer.change(visits.changes)
        self._visits = visits
        if batch.generations:
            self._standing = visits, batch.generations, variant
