"""From requests to segments: what is decoded once, and what each segment will need.

A segment that forks keeps its cells in the KV cache while its children run as sequences that
share them; one of them goes on in the same batch. segments.py has the terms; resume.py leaves
blocks out that are known already.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mia.engine import limits
from mia.engine.jobs import Job, sites_of_edits
from mia.engine.needs import Needs
from mia.engine.resume import Ends, add_twins, link
from mia.engine.segments import Output, Row, Segment, walk
from mia.sites import Site


def build(
    jobs: Sequence[Job],
    *,
    share: bool,
    n_layer: int,
    n_ubatch: int,
    skip_blocks: bool,
    has_window: bool = False,
    output_sites: Collection[Site] = (),
) -> list[Segment]:
    """The segments without a parent, in the order of the requests.

    Args:
        share: False keeps every request apart (memories that cannot share prefixes).
        skip_blocks: whether segments may start at a later block than the first.
        has_window: whether a sequence cannot be cut back to an earlier fork (see `Ledger`).
        output_sites: sites whose node has rows for outputs only.
    """
    rows = _Rows(output_sites)
    tops: list[Row] = []
    for job in jobs:
        if not share:
            rows.forget_prefixes()
        path = rows.insert(job)
        if not share:
            tops.append(path[0])
    twins = []
    if share:
        if skip_blocks:
            sites = sites_of_edits(jobs)
            twins = add_twins(rows.ends, sites, n_layer=n_layer, n_ubatch=n_ubatch)
        tops = list(rows.root.children.values())
    segments = [_segment(top, rows.ends) for top in tops]
    link(segments, twins)
    needs = Needs(sites_of_edits(jobs), n_layer)
    for segment in segments:
        _set_needs(segment, needs, has_window)
    return segments


class _Rows:
    """The trie of rows, built request by request."""

    def __init__(self, output_sites: Collection[Site]):
        self.root = Row(-1, -1, (), None)
        self.ends: Ends = {}
        self._output_sites = frozenset(output_sites)
        #: tokens of a prompt -> the rows of its unedited beginning, as far as there are any
        self._unedited: dict[tuple[int, ...], list[Row]] = {}

    def forget_prefixes(self) -> None:
        self.root, self._unedited = Row(-1, -1, (), None), {}

    def insert(self, job: Job) -> list[Row]:
        """The job's rows, new or shared, with what it reads of them noted."""
        path = self._path(job)
        note(job, path, self._output_sites)
        self.ends.setdefault(path[-1], []).append(job)
        return path

    def _path(self, job: Job) -> list[Row]:
        """The unedited beginning of a prompt is looked up as a whole: requests are many."""
        edited_from = min(job.edits_at, default=len(job.tokens))
        known = self._unedited.setdefault(job.tokens, [])
        path = known[:edited_from]
        row = path[-1] if path else self.root
        for p in range(len(path), len(job.tokens)):
            key = (job.tokens[p], job.edits_at.get(p, ()))
            child = row.children.get(key)
            if child is None:
                child = row.children[key] = Row(key[0], p, key[1], row)
            row = child
            path.append(row)
        if edited_from > len(known):
            known.extend(path[len(known) : edited_from])
        return path


def note(job: Job, path: Sequence[Row], output_sites: Collection[Site]) -> None:
    """Notes at the rows of a job's prompt what is read of them, and which must be outputs."""
    for p, edits in job.edits_at.items():
        if any(job.edits[e.rank][1] in output_sites for e in edits):
            _want(path[p], Output.STATES)
    for read in job.reads:
        states = any(site in output_sites for site in read.sites)
        for i, p in enumerate(read.positions):
            path[p].reads.append((read, i))
            if states:
                _want(path[p], Output.STATES)
    for i, p in enumerate(job.logit_positions):
        path[p].logits.append((job, i))
        _want(path[p], Output.LOGITS)
    if job.generates:
        _want(path[-1], Output.LOGITS)


def _want(row: Row, output: Output) -> None:
    if output.value > row.output.value:
        row.output = output


def _segment(row: Row, ends: Ends) -> Segment:
    """The tree of segments under a row; without recursion, for prompts are long."""
    top = Segment([row], None)
    stack = [top]
    while stack:
        segment = stack.pop()
        row = segment.rows[-1]
        while len(row.children) == 1 and row not in ends:
            row = next(iter(row.children.values()))
            segment.rows.append(row)
        segment.jobs = ends.get(row, [])
        segment.children = [Segment([child], segment) for child in row.children.values()]
        stack.extend(segment.children)
    return top


def _set_needs(top: Segment, needs: Needs, has_window: bool) -> None:
    segments = list(walk([top]))
    for segment in reversed(segments):
        segment.n_blocks = max(needs.of(segment), *(c.n_blocks for c in segment.children), 0)
        below = max((c.path_cells for c in segment.children), default=0)
        segment.generation_cells = max(
            (job.request.n_predict - 1 for job in segment.generating), default=0
        )
        segment.path_cells = len(segment.rows) + max(below, segment.generation_cells)
        if has_window:
            segment.sequences = sequences_needed(segment.children, len(segment.generating))
        segment.heir = _heir(segment.children)
    for segment in segments:
        if segment.parent is None or segment.parent.heir is not segment:
            _set_states_apart(list(segment.line))


def sequences_needed(children: Sequence[Segment], n_generating: int) -> int:
    """For models with a sliding window. A segment keeps a sequence to copy from until its last child
    takes it over. Children that need more sequences run later, so it takes 2^n segments before n
    sequences are too few; but each token where others leave a twin takes one more."""
    forks = sorted([c.sequences for c in children] + [1] * n_generating)
    if len(forks) < 2:
        return max(forks, default=1)
    if any(c.twin for c in children):  # these cannot run before their twin
        return 1 + forks[-1]
    return max(forks[-1], 1 + forks[-2])


def _heir(children: Sequence[Segment]) -> Segment | None:
    """The child that goes on in its parent's batch: others may wait for it if it is unedited, and
    if it is long, the others run side by side without it."""
    whole = [c for c in children if c.twin is None]
    return max(whole, key=lambda c: (not c.rows[0].edits, c.path_cells), default=None)


def _set_states_apart(line: Sequence[Segment]) -> None:
    n_states = sum(row.output is Output.STATES for segment in line for row in segment.rows)
    for segment in line:
        segment.states_apart = n_states >= limits.STATES_APART
