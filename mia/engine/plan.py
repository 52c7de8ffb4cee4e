"""From requests to shared work: what is decoded once, and in which order.

Each token of each request is a `Row`. Rows of two requests are the same row where
everything before and at them is the same: tokens and edits. So the requests form a
tree; chains of it without a fork are `Segment`s, and each segment is decoded once.
A segment that forks keeps its cells in the KV cache while its children run as
sequences that share them.

Where an edit (and every capture) lies at layer a or above, the blocks below compute
what the unedited twin of the segment has computed already. If enough segments have
the same twin it is decoded first, its residuals are kept, and the others start at
block a: `Segment.resume`. Two things make this exact: nothing else reads the keys and
values that the skipped blocks would have stored (the segment is a leaf and generates
nothing), and its rows are decoded in one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mia.edits import Edit, resolve_tokens
from mia.request import Capture, Request, Result
from mia.sites import BY_KEY, Site, parse, parse_many

Array = npt.NDArray[np.float32]
#: (place in the request's list of edits, id of the edit, which row of its value)
EditKey = tuple[int, int, int]

#: a twin is decoded where at least so many segments can start from it
_MIN_RESUMED = 3


class Buffer:
    """Where the rows of one capture go. Arrays are made when a site's width is known."""

    def __init__(self, sites: Sequence[Site], n_rows: int, n_keys: int):
        self.sites, self.n_rows, self.n_keys = list(sites), n_rows, n_keys
        self.arrays: dict[Site, Array] = {}

    def array(self, site: Site, shape: tuple[int, ...]) -> Array:
        found = self.arrays.get(site)
        if found is None:
            found = self.arrays[site] = np.zeros((self.n_rows, *shape), np.float32)
        return found


class Row:
    """One token at one position, after one history."""

    __slots__ = ("captures", "cells", "children", "edits", "logits", "parent", "pos", "token")

    def __init__(self, token: int, pos: int, edits: tuple[EditKey, ...], parent: Row | None):
        self.token, self.pos, self.edits, self.parent = token, pos, edits, parent
        self.children: dict[tuple[int, tuple[EditKey, ...]], Row] = {}
        self.captures: list[tuple[Buffer, int]] = []
        self.logits: list[tuple[Job, int]] = []
        self.cells: dict[int, int] = {}

    def path_cells(self, group: int) -> npt.NDArray[np.intp]:
        """The KV cells of positions 0 … pos, in order of position."""
        out = np.empty(self.pos + 1, np.intp)
        row: Row | None = self
        while row is not None and row.pos >= 0:
            out[row.pos] = row.cells[group]
            row = row.parent
        return out


class Job:
    """A request with its sites and token indices resolved, and its result in the making."""

    def __init__(self, index: int, request: Request, n_layer: int):
        self.index, self.request, self.result = index, request, Result()
        self.tokens = tuple(int(t) for t in request.tokens)
        n = len(self.tokens)
        self.edits = [(e, parse(e.site, n_layer)) for e in request.edits]
        self.n_total = n + max(request.n_predict - 1, 0)
        self.at: dict[int, tuple[EditKey, ...]] = {}
        for rank, (edit, _) in enumerate(self.edits):
            for pick, p in enumerate(edit.positions(n)):
                self.at[p] = (*self.at.get(p, ()), (rank, id(edit), pick))
        self.on_generated: tuple[EditKey, ...] = tuple(
            (rank, id(e), 0) for rank, (e, _) in enumerate(self.edits) if e.on_generated
        )
        self.buffers: list[tuple[Buffer, list[int], Capture]] = []
        for capture in request.captures:
            at = resolve_tokens(capture.tokens, n)
            extra = max(request.n_predict - 1, 0) if capture.generated else 0
            sites = parse_many(capture.sites, n_layer)
            n_keys = n + extra
            self.buffers.append((Buffer(sites, len(at) + extra, n_keys), at, capture))
        self.logit_positions = _logit_positions(request, n)
        self.logit_rows: Array | None = None
        self.logits_left = len(self.logit_positions)
        self.last: Row | None = None

    @property
    def sites(self) -> set[Site]:
        return {s for _, s in self.edits} | {s for b, _, _ in self.buffers for s in b.sites}

    def finish(self) -> None:
        """Moves the captures into the result, cut to the tokens that there were."""
        n, fed = len(self.tokens), max(len(self.result.tokens) - 1, 0)
        for buffer, at, capture in self.buffers:
            rows = len(at) + (fed if capture.generated else 0)
            keys = n + (fed if capture.generated else 0)
            for site in buffer.sites:
                a = buffer.arrays[site][:rows]
                self.result.captures[site] = a[..., :keys] if site.name in BY_KEY else a


def _logit_positions(request: Request, n: int) -> list[int]:
    if request.logits is None:
        return []
    if isinstance(request.logits, str):
        return [n - 1] if request.logits == "last" else list(range(n))
    return resolve_tokens(request.logits, n)


@dataclass(eq=False)
class Segment:
    """A chain of rows without a fork."""

    rows: list[Row]
    parent: Segment | None
    children: list[Segment] = field(default_factory=list)
    #: requests that end with this segment's last row
    jobs: list[Job] = field(default_factory=list)
    #: cells that the deepest path through it needs, its own included
    need: int = 0
    #: cells kept free for what its requests generate, one request at a time
    growth: int = 0
    #: sequences without which the tree under it cannot be run to its end
    seqs: int = 1
    #: first block to run; 0 for all
    resume: int = 0
    twin: Segment | None = None
    waiting: list[Segment] = field(default_factory=list)
    saved: Buffer | None = None
    readers: int = 0
    # the state of a run
    seq: int = -1
    done_rows: int = 0
    #: children and generations that have no sequence yet, and those that are not done
    unstarted: int = 0
    unfinished: int = 0
    generations: int = 0
    growth_free: bool = True
    #: rows that are outputs only for what is read at the end of the last block
    mute_rows: int = 0

    def drop_saved(self) -> None:
        """Lets go of the saved residuals when the last segment that starts from them has run."""
        self.readers -= 1
        if not self.readers and self.saved is not None:
            self.saved.arrays.clear()


def first_block(site: Site, n_layer: int) -> int:
    """The first block that must run for an edit or capture at `site` to be right."""
    if site.layer is None:
        return 0 if site.name == "embed" else n_layer - 1
    after = site.name == "resid_post"
    return min(site.layer + after, n_layer - 1)


def build(
    jobs: Iterable[Job], *, share: bool, resume: bool, n_layer: int, n_batch: int
) -> list[Segment]:
    """The segments without a parent, in the order of the requests.

    Args:
        share: False keeps every request apart (memories that cannot share prefixes).
        resume: whether blocks may be skipped.
    """
    roots: list[Row] = []
    root = Row(-1, -1, (), None)
    clean: dict[tuple[int, ...], list[Row]] = {}
    ends: dict[int, list[Job]] = {}
    first_layers: dict[int, int] = {}
    for job in jobs:
        if not share:
            root, clean = Row(-1, -1, (), None), {}
        path = _insert(root, job, clean)
        _attach(job, path, ends)
        if share:
            _note_layers(job, path, n_layer, first_layers)
        else:
            roots.append(path[0])
    if share:
        roots = list(root.children.values())
    segments = [_segment(r, ends) for r in roots]
    if resume and share:
        _plan_resume(segments, first_layers, n_layer, n_batch)
    for s in segments:
        _set_need(s)
    return segments


def _insert(root: Row, job: Job, clean: dict[tuple[int, ...], list[Row]]) -> list[Row]:
    """Finds or makes the job's rows. The unedited beginning of a prompt is looked up whole."""
    edited_from = min(job.at, default=len(job.tokens))
    known = clean.setdefault(job.tokens, [])
    path = known[:edited_from]
    node = path[-1] if path else root
    for p in range(len(path), len(job.tokens)):
        key = (job.tokens[p], job.at.get(p, ()))
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = Row(key[0], p, key[1], node)
        node = child
        path.append(node)
    if edited_from > len(known):
        known.extend(path[len(known) : edited_from])
    return path


def _attach(job: Job, path: list[Row], ends: dict[int, list[Job]]) -> None:
    for buffer, at, _ in job.buffers:
        for i, p in enumerate(at):
            path[p].captures.append((buffer, i))
    for i, p in enumerate(job.logit_positions):
        path[p].logits.append((job, i))
    job.last = path[-1]
    ends.setdefault(id(path[-1]), []).append(job)


def _note_layers(job: Job, path: list[Row], n_layer: int, first: dict[int, int]) -> None:
    """For each row, the first block that any edit or capture of it needs."""
    for edit_key_row in path:
        for rank, _, _ in edit_key_row.edits:
            layer = first_block(job.edits[rank][1], n_layer)
            first[id(edit_key_row)] = min(first.get(id(edit_key_row), n_layer), layer)
    for buffer, at, _ in job.buffers:
        layer = min((first_block(s, n_layer) for s in buffer.sites), default=n_layer)
        for p in at:
            first[id(path[p])] = min(first.get(id(path[p]), n_layer), layer)


def _segment(row: Row, ends: dict[int, list[Job]]) -> Segment:
    """The tree of segments under a row; without recursion, prompts are long."""
    top = Segment([row], None)
    stack = [top]
    while stack:
        seg = stack.pop()
        row = seg.rows[-1]
        while len(row.children) == 1 and id(row) not in ends:
            row = next(iter(row.children.values()))
            seg.rows.append(row)
        seg.jobs = ends.get(id(row), [])
        seg.children = [Segment([child], seg) for child in row.children.values()]
        stack.extend(seg.children)
    return top


def _walk(segments: Iterable[Segment]) -> list[Segment]:
    out, stack = [], list(segments)
    while stack:
        seg = stack.pop()
        out.append(seg)
        stack.extend(seg.children)
    return out


def _plan_resume(
    segments: list[Segment], first: dict[int, int], n_layer: int, n_batch: int
) -> None:
    groups: dict[tuple[int, tuple[int, ...]], list[Segment]] = {}
    for seg in _walk(segments):
        if seg.children or len(seg.rows) > n_batch:
            continue
        if any(job.request.n_predict for job in seg.jobs) or not seg.rows[0].edits:
            continue
        layer = min(first.get(id(r), n_layer - 1) for r in seg.rows)
        if layer > 0:
            seg.resume = layer
            groups.setdefault(_twin_key(seg), []).append(seg)
    clean = {_twin_key(s): s for s in _walk(segments) if not any(r.edits for r in s.rows)}
    groups = {k: g for k, g in groups.items() if len(g) >= _MIN_RESUMED or k in clean}
    kept = {id(s) for g in groups.values() for s in g}
    for seg in _walk(segments):
        if id(seg) not in kept:
            seg.resume = 0
    layers = sorted({s.resume for g in groups.values() for s in g})
    for key, group in groups.items():
        twin = clean.get(key) or _make_twin(group[0], segments)
        twin.saved = Buffer([Site("resid_post", a - 1) for a in layers], len(twin.rows), 0)
        for i, row in enumerate(twin.rows):
            row.captures.append((twin.saved, i))
        for seg in group:
            seg.twin = twin
        twin.waiting, twin.readers = group, len(group)


def _twin_key(seg: Segment) -> tuple[int, tuple[int, ...]]:
    """Equal for segments that differ in their edits alone: the parent, and the tokens."""
    return id(seg.parent), tuple(r.token for r in seg.rows)


def _make_twin(seg: Segment, segments: list[Segment]) -> Segment:
    rows: list[Row] = []
    parent: Row | None = seg.rows[0].parent
    for r in seg.rows:
        rows.append(Row(r.token, r.pos, (), parent))
        parent = rows[-1]
    twin = Segment(rows, seg.parent)
    (segments if seg.parent is None else seg.parent.children).append(twin)
    return twin


def _set_need(top: Segment) -> None:
    for seg in reversed(_walk([top])):
        below = max((c.need for c in seg.children), default=0)
        seg.growth = max(
            (j.request.n_predict - 1 for j in seg.jobs if j.request.n_predict), default=0
        )
        seg.need = len(seg.rows) + max(below, seg.growth)
        seg.generations = sum(1 for j in seg.jobs if j.request.n_predict)
        seg.unstarted = seg.unfinished = len(seg.children) + seg.generations
        seg.seqs = _sequences(seg)


def _sequences(seg: Segment) -> int:
    """The segment keeps a sequence to copy from until its last child takes it. Children that
    need more come later, so that it takes 2^n segments before n sequences are too few."""
    forks = sorted([c.seqs for c in seg.children] + [1] * seg.generations)
    if len(forks) < 2:
        return max(forks, default=1)
    if any(c.twin for c in seg.children):  # these cannot come before their twin
        return 1 + forks[-1]
    return max(forks[-1], 1 + forks[-2])


def edit_table(jobs: Iterable[Job]) -> dict[int, tuple[Edit, Site]]:
    """id of an edit -> the edit and its site."""
    return {id(e): (e, s) for job in jobs for e, s in job.edits}
