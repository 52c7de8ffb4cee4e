"""The ledger: who holds which cells and sequences, and when they come back."""

import pytest

from mia.engine.cells import Branch, Ledger
from mia.engine.jobs import resolve
from mia.engine.plan import build
from mia.engine.segments import Segment
from mia.request import Request


class Cache:
    """A context's memory, as the ledger sees it: the calls, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def seq_cp(self, src: int, dst: int, end: int) -> None:
        self.calls.append((f"copy {end}", src, dst))

    def seq_rm(self, seq: int, start: int = 0) -> bool:
        self.calls.append(("remove", seq, start))
        return True


def _tops(*requests: Request) -> list[Segment]:
    jobs = [resolve(i, r, 3) for i, r in enumerate(requests)]
    return build(jobs, share=True, n_layer=3, n_ubatch=512, skip_blocks=False)


def _ledger(budget: int, n_sequences: int) -> tuple[Ledger, Cache]:
    cache = Cache()
    return Ledger(cache, budget=budget, n_sequences=n_sequences), cache


def _counts(ledger: Ledger) -> tuple[int, int]:
    return ledger.booked, len(ledger.free)


def _end(ledger: Ledger, branch: Branch) -> list[Segment]:
    return [over.segment for over in ledger.close(branch)]


def test_one_child_at_a_time_borrows_its_parent_s_sequence() -> None:
    (top,) = _tops(Request([5, 6, 7]), Request([5, 6, 8, 9]), Request([5, 6, 4]))
    first, second, third = top.children
    ledger, cache = _ledger(budget=6, n_sequences=2)
    assert top.path_cells == 4 and top.heir is second  # the longest
    trunk = ledger.admit(top, None)
    assert _counts(ledger) == (2, 1) and _end(ledger, trunk) == []
    a = ledger.admit(second, trunk)
    assert a.sequence == trunk.sequence and cache.calls == [] and trunk.lent
    b = ledger.admit(first, trunk)
    assert cache.calls == [("copy 2", 0, 1)] and b.sequence == 1
    assert _counts(ledger) == (5, 0) and not ledger.has_room(third, trunk)
    assert _end(ledger, a) == [second] and not trunk.lent
    assert cache.calls[1:] == [("remove", 0, 2)]  # cut back to the trunk's end
    assert _counts(ledger) == (3, 0) and ledger.has_room(third, trunk)
    c = ledger.admit(third, trunk)
    assert c.sequence == 0 and len(cache.calls) == 2
    assert _end(ledger, b) == [first]
    assert _counts(ledger) == (3, 1)
    assert _end(ledger, c) == [third, top]  # its parent's last
    assert _counts(ledger) == (0, 2)
    assert cache.calls[2:] == [("remove", 1, 0), ("remove", 0, 2), ("remove", 0, 0)]


def test_there_is_room_only_for_the_whole_path() -> None:
    """Who is let in can run to its end, whatever else waits."""
    one, two = _tops(Request([5, 6, 7]), Request([5, 6, 8, 9]), Request([3]))
    for budget, n_sequences, room in ((4, 1, True), (3, 2, False), (4, 0, False)):
        assert _ledger(budget, n_sequences)[0].has_room(one, None) == room
    ledger, _ = _ledger(budget=5, n_sequences=3)
    trunk = ledger.admit(one, None)
    assert ledger.has_room(two, None)
    ledger.admit(two, None)
    assert ledger.has_room(one.children[1], trunk)
    ledger.admit(one.children[1], trunk)  # five cells now
    assert not ledger.has_room(one.children[0], trunk)


def test_an_only_child_needs_no_sequence_of_its_own() -> None:
    (top,) = _tops(Request([5, 6]), Request([5, 6, 7]))
    ledger, cache = _ledger(budget=3, n_sequences=1)
    trunk = ledger.admit(top, None)
    (child,) = top.children
    assert ledger.has_room(child, trunk)
    assert ledger.admit(child, trunk).sequence == 0 and cache.calls == []


def test_one_generation_uses_the_reserve_and_others_need_cells_of_their_own() -> None:
    (top,) = _tops(*[Request([5, 6], n_predict=n) for n in (4, 3, 2)])
    ledger, _ = _ledger(budget=7, n_sequences=3)
    branch = ledger.admit(top, None)
    assert ledger.booked == 2 + 3  # the prompt, and the longest continuation
    first = ledger.lease(branch, 3)
    assert first is not None and first.uses_reserve and first.borrowed and ledger.booked == 5
    second = ledger.lease(branch, 2)
    assert second is not None and not second.uses_reserve and ledger.booked == 7
    assert ledger.lease(branch, 1) is None  # no cells
    ledger.end_lease(second)
    assert ledger.booked == 5
    third = ledger.lease(branch, 1)
    assert third is not None and ledger.booked == 6 and not third.borrowed
    ledger.end_lease(first)
    assert ledger.booked == 6 and _end(ledger, branch) == []  # the reserve stays to the end
    ledger.end_lease(third)
    assert ledger.booked == 2 and _end(ledger, branch) == [top]
    assert _counts(ledger) == (0, 3)


def test_a_generation_that_ends_at_once_takes_no_sequence() -> None:
    (top,) = _tops(Request([5, 6], n_predict=1), Request([5, 6], n_predict=3))
    ledger, cache = _ledger(budget=4, n_sequences=1)
    branch = ledger.admit(top, None)
    ledger.end_unstarted(branch)
    lease = ledger.lease(branch, 2)
    assert lease is not None and lease.sequence == 0 and cache.calls == []
    ledger.end_lease(lease)
    assert _end(ledger, branch) == [top] and _counts(ledger) == (0, 1)


def test_what_must_not_happen_is_asserted() -> None:
    one, two = _tops(Request([5, 6, 7]), Request([5, 6, 8]), Request([3, 4]))
    ledger, _ = _ledger(budget=3, n_sequences=2)
    ledger.admit(one, None)
    with pytest.raises(AssertionError, match="more cells are booked than the context has"):
        ledger.admit(two, None)
    ledger, _ = _ledger(budget=9, n_sequences=1)
    trunk = ledger.admit(one, None)
    ledger.admit(one.children[0], trunk)
    with pytest.raises(AssertionError, match="let in without a sequence"):
        ledger.admit(one.children[1], trunk)
