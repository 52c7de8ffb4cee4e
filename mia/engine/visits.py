"""What happens at the nodes of one decode: residuals of a twin put in, edits, captures.

The rows' edits and captures are gathered by graph node, so that each node is visited once, and an
edit that many rows share is one numpy operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from mia.arrays import Array, IntArray
from mia.edits import Edit, Operation, as_slice
from mia.engine import limits
from mia.engine.answers import Buffer
from mia.engine.batch import Span
from mia.engine.experts import check_router, edit_weights, weights_by_expert
from mia.engine.finite import check_edited, largest_edited
from mia.engine.graph import SiteNode
from mia.engine.jobs import Read
from mia.engine.patterns import Patterns
from mia.engine.segments import Row
from mia.engine.session import Session
from mia.llama import Change, host_array, read_array, rows_of
from mia.sites import ROUTERS, Site

#: what to do at a node, given its address
Action = Callable[[int], None]


class Visits:
    """What to do at which node in one decode: `actions`, by the node's index in the graph."""

    def __init__(
        self,
        session: Session,
        rows: Sequence[Row],
        output_index: IntArray,
        *,
        edits: Mapping[Edit, Site],
        buffers: Mapping[Read, Buffer],
        track_cells: bool,
    ):
        """`output_index`: for each row of the batch its place among the outputs; `track_cells`:
        whether attention patterns are edited or captured anywhere in this run."""
        self._session, self._edits, self._buffers = session, edits, buffers
        self._output_index = output_index
        self.rows = rows
        self.actions: dict[int, list[Action]] = {}
        #: indices of nodes that are only read, and stay as they are until the next decode
        self.later: set[int] = set()
        #: for nodes that are only read, and small: where a copy may go, (n_rows, width)
        self.copies: dict[int, Array] = {}
        #: for nodes that are only edited, in a simple way: how many numbers they have, and the changes
        self.changes: dict[int, tuple[int, list[Change]]] = {}
        self._captures: dict[int, list[_Capture]] = {}
        #: of those, where the graph stopped for us all the same
        self._visited: set[int] = set()
        self._targets: list[_Target] = []
        self._patterns = Patterns(session, rows) if track_cells else None

    def visit(self, index: int, addr: int) -> None:
        self._visited.add(index)
        for action in self.actions[index]:
            action(addr)

    @property
    def stops(self) -> dict[int, list[Action]]:
        """`actions` at the nodes at which the graph has to stop."""
        return {i: actions for i, actions in self.actions.items() if i not in self.later}

    def read_later(self) -> None:
        """Behind the decode: the captures at which the graph did not stop for us."""
        addrs = self._session.variants[0].addrs
        for index, rows in self.copies.items():
            if index not in self._visited:
                for capture in self._captures[index]:
                    capture.put(rows)
        for index in self.later:
            self.visit(index, addrs[index])
        self._visited.clear()

    def go_on(self, rows: Sequence[Row]) -> None:
        """The same again for the next token of every row, all of them generated: the same edits,
        and captures that go one row further."""
        self.rows = rows
        if self._patterns is not None:
            self._patterns.go_on(rows)
        for target in self._targets:
            target.shift()

    def put_residuals(self, first_block: int, spans: Sequence[Span]) -> None:
        """Writes what the twins had at the end of the block before `first_block`, in place of
        computing it. This runs before the edits that lie there."""
        site = Site("resid_post", first_block - 1)
        parts = [self._twin_residuals(span, site) for span in spans]
        residuals = np.concatenate(parts)  # (n_rows, n_embd)

        def write(addr: int) -> None:
            with rows_of(addr, write=True) as a:
                a[0, 0] = residuals

        self._on(self._session.site(site).index, write)

    def _twin_residuals(self, span: Span, site: Site) -> Array:
        twin = span.branch.segment.twin
        assert twin is not None
        first = span.rows[0].pos - twin.rows[0].pos
        return self._buffers[twin.saved].arrays[site][first : first + span.end - span.first]

    def gather(self) -> None:
        """Notes the edits and captures of all rows, edits first: captures see what they leave."""
        edits: dict[tuple[int, Edit], tuple[list[int], list[int]]] = {}
        reads: dict[Read, tuple[list[int], list[int]]] = {}
        for b, row in enumerate(self.rows):
            for rank, edit, value_row in row.edits:
                batch_rows, value_rows = edits.setdefault((rank, edit), ([], []))
                batch_rows.append(b)
                value_rows.append(value_row)
            for read, i in row.reads:
                batch_rows, buffer_rows = reads.setdefault(read, ([], []))
                batch_rows.append(b)
                buffer_rows.append(i)
        if self._patterns is not None:
            for index, action in self._patterns.cell_notes():
                self._on(index, action)
        for (_, edit), (batch_rows, value_rows) in sorted(edits.items(), key=lambda e: e[0][0]):
            self._add_edit(edit, np.asarray(batch_rows), np.asarray(value_rows))
        changed = set(self.actions)
        for read, (batch_rows, buffer_rows) in reads.items():
            self._add_read(self._buffers[read], np.asarray(batch_rows), _Target(buffer_rows))
        unchanged = self.actions.keys() - changed
        self.later = unchanged & self._session.variants[0].lasting
        self._make_copies(unchanged - self.later)
        self._make_changes(changed)

    def _make_changes(self, changed: set[int]) -> None:
        """What compiled code does in place of calling Python."""
        n_outputs = int(self._output_index[-1]) + 1
        for index in changed:
            changes: list[Change] = []
            for action in self.actions[index]:
                parts = action.changes() if isinstance(action, _Edit) else None
                if parts is None:
                    break
                changes += parts
            else:
                assert isinstance(action, _Edit)
                n_rows = n_outputs if action.node.outputs_only else len(self.rows)
                self.changes[index] = n_rows * prod(action.node.shape), changes

    def _make_copies(self, unchanged: set[int]) -> None:
        """Room for what compiled code copies in place of calling Python."""
        n_outputs = int(self._output_index[-1]) + 1
        for index in unchanged:
            actions = self.actions[index]
            captures = [a for a in actions if isinstance(a, _Capture) and a.node.layout != "chosen"]
            if len(captures) < len(actions):
                continue
            node = captures[0].node
            shape = n_outputs if node.outputs_only else len(self.rows), prod(node.shape)
            if 4 * prod(shape) <= limits.COPIED_BYTES:
                self.copies[index] = np.empty(shape, np.float32)
                self._captures[index] = captures

    def _on(self, index: int, action: Action) -> None:
        self.actions.setdefault(index, []).append(action)

    def _add_edit(self, edit: Edit, batch_rows: IntArray, value_rows: IntArray) -> None:
        site = self._edits[edit]
        node = self._session.site(site)
        if node.layout == "pattern":
            assert self._patterns is not None
            action: Action = partial(self._patterns.edit, edit, site, batch_rows)
        else:
            node_rows = self._output_index[batch_rows] if node.outputs_only else batch_rows
            if node.layout == "chosen":
                how = self._session, edit, site, node, node_rows, value_rows
                action = partial(_edit_weights, *how)
            else:
                action = _Edit(self._session, edit, site, node, node_rows, value_rows)
        self._on(node.index, action)

    def _add_read(self, buffer: Buffer, batch_rows: IntArray, target: _Target) -> None:
        self._targets.append(target)
        rows = as_slice(batch_rows)
        output_rows = as_slice(self._output_index[batch_rows])
        for site in buffer.read.sites:
            node = self._session.site(site)
            if node.layout == "pattern":
                assert self._patterns is not None
                action: Action = partial(self._capture_pattern, buffer, site, batch_rows, target)
            else:
                node_rows = output_rows if node.outputs_only else rows
                action = _Capture(self._session, buffer, site, node, node_rows, target)
            self._on(node.index, action)

    def _capture_pattern(
        self, buffer: Buffer, site: Site, batch_rows: IntArray, target: _Target, addr: int
    ) -> None:
        assert self._patterns is not None
        with rows_of(addr, write=False) as a:
            array = buffer.array(site, (a.shape[1], buffer.read.n_keys))
            for i, b in zip(target.rows, batch_rows, strict=True):
                line = self._patterns.line(site, a[0], int(b))
                array[i, :, : line.shape[-1]] = line


class _Target:
    """Rows of a buffer, as indices and, if they follow each other, as a slice."""

    def __init__(self, rows: Sequence[int]):
        self.rows: IntArray = np.asarray(rows, np.intp)
        self.index = as_slice(self.rows)

    def shift(self) -> None:
        self.rows = self.rows + 1
        self.index = as_slice(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class _Capture:
    """Rows of a node that go into an array."""

    session: Session
    buffer: Buffer
    site: Site
    node: SiteNode
    rows: IntArray | slice
    target: _Target

    def __call__(self, addr: int) -> None:
        if self.node.layout == "chosen":
            self.put(weights_by_expert(self.session, self.node, addr))
            return
        a = host_array(addr)
        self.put(_shaped(read_array(addr) if a is None else a, self.node, False))

    def put(self, rows: Array) -> None:
        """`rows`: all that the node has, (n_rows, width)."""
        self.buffer.array(self.site, rows.shape[1:])[self.target.index] = rows[self.rows]


@dataclass(frozen=True, slots=True, eq=False)
class _Edit:
    """Rows of a node that an edit changes."""

    session: Session
    edit: Edit
    site: Site
    node: SiteNode
    rows: IntArray
    value_rows: IntArray

    def __call__(self, addr: int) -> None:
        edit, site = self.edit, self.site
        with rows_of(addr, write=True) as a:
            rows = _shaped(a, self.node, edit.heads is not None)
            edit.apply(rows, self.rows, self.value_rows)
            if site.name in ROUTERS:
                check_router(self.session, site, rows[as_slice(self.rows)])
            else:
                check_edited(rows[as_slice(self.rows)], site)
            if not np.may_share_memory(rows, a):  # heads that do not lie side by side
                a[0] = rows.reshape(a.shape[1:])

    def changes(self) -> list[Change] | None:
        """The same as changes that compiled code makes, to the last bit; None if it cannot."""
        edit, site, width = self.edit, self.site, prod(self.node.shape)
        largest = largest_edited(site)
        if largest is None or edit.dims is not None:
            return None
        parts = [(0, width)]
        if edit.heads is not None:
            _, size = self.node.shape
            parts = [(int(head) * size, size) for head in np.atleast_1d(edit.heads)]
        out: list[Change] = []
        values: dict[int, tuple[Operation, Array] | None] = {}
        for row, value_row in zip(self.rows.tolist(), self.value_rows.tolist(), strict=True):
            if value_row not in values:
                values[value_row] = edit.as_arithmetic(sum(n for _, n in parts), value_row)
            if (found := values[value_row]) is None:
                return None
            operation, value = found
            start = row * width
            for i, (first, n) in enumerate(parts):
                part = value[i * n : (i + 1) * n]
                out.append(Change(operation, start + first, part, start, width, largest))
        return out


def _edit_weights(
    session: Session,
    edit: Edit,
    site: Site,
    node: SiteNode,
    node_rows: IntArray,
    value_rows: IntArray,
    addr: int,
) -> None:
    def change(rows: Array) -> None:
        edit.apply(rows, node_rows, value_rows)
        check_edited(rows[as_slice(node_rows)], site)

    edit_weights(session, node, addr, change)


def _shaped(a: Array, node: SiteNode, by_head: bool) -> Array:
    """A node's array (4 axes) as (n_rows, width), or (n_rows, n_head, head_dim); a copy where its
    heads do not lie side by side."""
    rows = a[0] if node.layout == "heads" else a[0, 0]
    shape = node.shape if by_head else (-1,)
    return rows.reshape(rows.shape[0], *shape)
