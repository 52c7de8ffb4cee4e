"""What happens at the nodes of one decode: known residuals put back, edits, captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from mia.edits import Edit, as_slice
from mia.engine.graph import SiteNode
from mia.engine.plan import Buffer, Row, Segment
from mia.engine.session import Session
from mia.errors import EngineError, UsageError
from mia.llama.ggml import describe, host_array, read_array, rows_of
from mia.sites import Site

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]


class Visits:
    """What to do at which node in one decode."""

    def __init__(
        self,
        session: Session,
        edits: Mapping[int, tuple[Edit, Site]],
        rows: Sequence[Row],
        out_index: Index,
        track_cells: bool,
    ):
        """`out_index`: for each row of the batch its place among the outputs."""
        self.session, self.edits, self.rows = session, edits, rows
        self.out_index, self.track_cells = out_index, track_cells
        self.actions: dict[int, list[Callable[[int], None]]] = {}
        self._targets: list[_Target] = []

    def visit(self, index: int, addr: int) -> None:
        for action in self.actions[index]:
            action(addr)

    def go_on(self, rows: Sequence[Row]) -> None:
        """The same again for the next token of every row, all of them generated: the same edits,
        and captures that go one row further."""
        self.rows = rows
        for target in self._targets:
            target.shift()

    def _on(self, index: int, action: Callable[[int], None]) -> None:
        self.actions.setdefault(index, []).append(action)

    def resume(self, layer: int, batch: Sequence[tuple[Segment, int, int]]) -> None:
        """Writes what the twins had at the end of block layer-1, in place of computing it."""
        site = Site("resid_post", layer - 1)
        parts = [_twin_rows(seg, site)[a:b] for seg, a, b in batch]
        values = np.concatenate(parts)  # (n_rows, n_embd)

        def write(addr: int) -> None:
            with rows_of(addr, write=True) as a:
                a[0, 0] = values

        self._on(self.session.site(site).index, write)

    def gather(self) -> None:
        edits: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        captures: dict[int, tuple[Buffer, list[int], list[int]]] = {}
        for b, row in enumerate(self.rows):
            for rank, edit_id, pick in row.edits:
                which, picks = edits.setdefault((rank, edit_id), ([], []))
                which.append(b)
                picks.append(pick)
            for buffer, i in row.captures:
                _, which, dests = captures.setdefault(id(buffer), (buffer, [], []))
                which.append(b)
                dests.append(i)
        if self.track_cells:
            self._track_cells()
        for (_, edit_id), (which, picks) in sorted(edits.items(), key=lambda item: item[0][0]):
            edit, site = self.edits[edit_id]
            self._add_edit(edit, site, np.asarray(which), np.asarray(picks))
        for buffer, which, dests in captures.values():
            self._add_captures(buffer, np.asarray(which), _Target(dests))

    def _add_edit(self, edit: Edit, site: Site, which: Index, picks: Index) -> None:
        at = self.session.site(site)
        if at.layout == "pattern":
            act: Callable[[int], None] = partial(self._edit_pattern, edit, site, which)
        else:
            act = partial(
                _edit, edit, site, at, self.out_index[which] if at.outputs_only else which, picks
            )
        self._on(at.index, act)

    def _edit_pattern(self, edit: Edit, site: Site, which: Index, addr: int) -> None:
        with rows_of(addr, write=True) as a:
            for b, line in self._pattern(site, a[0], which):
                edit.apply(line, np.zeros(1, np.intp), np.zeros(1, np.intp))
                if site.name == "attn_scores":
                    self._check_scores(site, b, line[0])
                else:
                    _check_finite(line, site)
                self._put_pattern(site, a[0], b, line[0])

    def _add_captures(self, buffer: Buffer, which: Index, target: _Target) -> None:
        self._targets.append(target)
        every = as_slice(which)
        ends = as_slice(self.out_index[which])
        for site in buffer.sites:
            at = self.session.site(site)
            if at.layout == "pattern":
                act = partial(self._capture_pattern, buffer, site, which, target)
            else:
                act = partial(
                    _capture, buffer, site, at, ends if at.outputs_only else every, target
                )
            self._on(at.index, act)

    def _capture_pattern(
        self, buffer: Buffer, site: Site, which: Index, target: _Target, addr: int
    ) -> None:
        with rows_of(addr, write=False) as a:
            dest = buffer.array(site, (a.shape[1], buffer.n_keys))
            for (_, line), d in zip(self._pattern(site, a[0], which), target.rows, strict=True):
                dest[d, :, : line.shape[-1]] = line[0]

    # -- attention patterns: cells of the cache <-> positions of a sequence ---------

    def _track_cells(self) -> None:
        groups: dict[int, int] = {}
        for index, cells in self.session.topology.cell_inputs.values():
            if cells not in groups:
                groups[cells] = len(groups)
                self._on(index, self._note_cells(groups[cells]))
        self._groups = {
            layer: groups[cells] for layer, (_, cells) in self.session.topology.cell_inputs.items()
        }

    def _note_cells(self, group: int) -> Callable[[int], None]:
        def note(addr: int) -> None:
            source = next(s for s in describe(addr).src if describe(s).type == "i64")
            with rows_of(source, write=False) as cells:
                for row, cell in zip(self.rows, cells.ravel().tolist(), strict=False):
                    row.cells[group] = cell

        return note

    def _pattern(self, site: Site, a: Array, which: Index) -> Iterator[tuple[int, Array]]:
        """For each row its pattern by position: (1, n_head, n_keys), a copy."""
        assert site.layer is not None
        scale = np.float32(self.session.site(site).scale)
        for b in which:
            cells = self.rows[b].path_cells(self._groups[site.layer])
            line = a[:, b][:, cells][None] * scale
            if site.name == "attn_pattern":
                line[..., _overwritten(cells)] = 0
            yield int(b), line

    def _put_pattern(self, site: Site, a: Array, b: int, line: Array) -> None:
        assert site.layer is not None
        cells = self.rows[b].path_cells(self._groups[site.layer])
        a[:, b, cells] = line / np.float32(self.session.site(site).scale)

    def _check_scores(self, site: Site, b: int, line: Array) -> None:
        """Scores (n_head, n_keys) may be -inf, which is a key not looked at; but each head must
        have a key left that the mask lets it see, or the softmax has nothing to share out."""
        if np.isnan(line).any() or np.isposinf(line).any():
            raise UsageError(f"an edit at {site} makes numbers that are not finite")
        assert site.layer is not None
        session, row = self.session, self.rows[b]
        softmax = session.site(Site("attn_pattern", site.layer)).index
        with rows_of(describe(session.variants[0].addrs[softmax]).src[1], write=False) as mask:
            seen = np.isfinite(mask[0, 0, b, row.path_cells(self._groups[site.layer])])  # (n_keys,)
        blind = np.flatnonzero(~np.isfinite(line[:, seen]).any(1))
        if len(blind):
            raise UsageError(
                f"query {row.pos} has no key left to look at in layer {site.layer}, head {blind[0]}; "
                "leave it one"
            )


def _overwritten(cells: Index) -> list[int]:
    """Positions whose cell a later position of the sequence has taken over, as llama.cpp does with
    what a sliding window has left behind: nothing of them is attended to."""
    latest = {cell: pos for pos, cell in enumerate(cells.tolist())}
    if len(latest) == len(cells):
        return []
    return [pos for pos, cell in enumerate(cells.tolist()) if latest[cell] != pos]


class _Target:
    """Rows of a buffer, as indices and, where they follow each other, as a slice."""

    def __init__(self, rows: Sequence[int]):
        self.rows: Index = np.asarray(rows, np.intp)
        self.at = as_slice(self.rows)

    def shift(self) -> None:
        self.rows = self.rows + 1
        self.at = as_slice(self.rows)


def _edit(edit: Edit, site: Site, at: SiteNode, which: Index, picks: Index, addr: int) -> None:
    with rows_of(addr, write=True) as a:
        rows = _shaped(a, at, edit.heads is not None)
        edit.apply(rows, which, picks)
        _check_finite(rows[as_slice(which)], site)


def _capture(
    buffer: Buffer, site: Site, at: SiteNode, source: Index | slice, target: _Target, addr: int
) -> None:
    a = host_array(addr)
    if a is None:
        a = read_array(addr)
    rows = _shaped(a, at, False)
    buffer.array(site, rows.shape[1:])[target.at] = rows[source]


def _shaped(a: npt.NDArray[np.float32], at: SiteNode, by_head: bool) -> Array:
    """A node's array (4 axes) as (n_rows, width), or (n_rows, n_head, head_dim); never a copy."""
    rows = a[0] if at.layout == "heads" else a[0, 0]
    out = rows.reshape(rows.shape[0], *at.shape) if by_head else rows.reshape(rows.shape[0], -1)
    if not np.may_share_memory(out, a):
        raise EngineError("a site's tensor has an unexpected layout")
    return out


def _check_finite(edited: Array, site: Site) -> None:
    """What is not finite would stay in the cache, and spoil other sequences there: masked
    cells are read too, and zero times NaN is NaN. After the logits nothing is cached."""
    if site.name != "logits" and not np.isfinite(edited).all():
        raise UsageError(f"an edit at {site} makes numbers that are not finite")


def _twin_rows(seg: Segment, site: Site) -> Array:
    assert seg.twin is not None and seg.twin.saved is not None
    return seg.twin.saved.arrays[site]
