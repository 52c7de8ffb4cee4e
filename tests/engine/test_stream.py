"""Tokens as they come: `Model.run(on_token=)`, and a run that stays open, `Model.stream`."""

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import check_same
from tiny import Tiny

from mia.edits import Edit
from mia.engine import limits
from mia.engine.answers import Answer
from mia.engine.decode import Decoder
from mia.engine.generation import Generation
from mia.engine.stream import Stream, Ticket
from mia.engine.tracks import Tracks
from mia.errors import EngineError, RangeError, SiteError, UsageError
from mia.llama import Context
from mia.request import Capture, Request, Result, RowMetric, Sampling
from mia.vectors import Vector


def test_each_token_is_told_as_it_is_chosen(case: Tiny) -> None:
    prompts = [case.prompt(n, seed=n) for n in (5, 9, 5)]
    requests = [Request(p, n_predict=4 + i, stop_at_eog=False) for i, p in enumerate(prompts)]
    told: list[tuple[int, int]] = []
    results = case.model.run(requests, on_token=lambda i, token: told.append((i, token)))
    for i, result in enumerate(results):
        assert [t for j, t in told if j == i] == result.tokens
    assert len(told) == 4 + 5 + 6
    assert {i for i, _ in told[:3]} == {0, 1, 2}  # side by side, not one after the other


def test_a_recurrent_memory_tells_each_token_once(tiny: Callable[[str], Tiny]) -> None:
    """Its requests may start again when llama.cpp builds another graph."""
    t = tiny("mamba")
    told: list[int] = []
    request = Request(t.prompt(6), n_predict=5, stop_at_eog=False)
    result = t.model.run([request], on_token=lambda i, token: told.append(token))[0]
    assert told == result.tokens


def test_a_run_that_starts_again_tells_each_token_once(llama: Tiny) -> None:
    """One request's edits fail the joint run; the others run again without it."""
    wild = Edit("resid_post.0", "replace", llama.vector() * 1e16, tokens=-1, coeff=9)
    hiding = Edit("resid_post.1", "zero", tokens=-1)
    good = Request(llama.prompt(5), n_predict=6, stop_at_eog=False)
    bad = Request(llama.prompt(5), [wild, hiding], n_predict=6)
    told: list[tuple[int, int]] = []
    with pytest.raises(UsageError, match="overflow"):
        llama.model.run([good, bad], on_token=lambda i, token: told.append((i, token)))
    alone = llama.model.run([good])[0].tokens
    assert [t for i, t in told if i == 0] == alone


def test_what_is_told_may_end_the_run(llama: Tiny) -> None:
    class Enough(Exception):
        pass

    def stop(i: int, token: int) -> None:
        raise Enough

    request = Request(llama.prompt(5), n_predict=6)
    with pytest.raises(Enough):
        llama.model.run([request], on_token=stop)
    assert len(llama.model.run([request])[0].tokens) >= 1
    with pytest.raises(UsageError, match="in the middle of a run"):
        llama.model.run([request], on_token=lambda *_: llama.model.close())


def test_the_most_probable_tokens(llama: Tiny) -> None:
    prompt = llama.prompt(6)
    hot = Sampling(temperature=2.0, seed=5)
    request = Request(
        prompt, n_predict=4, sampling=hot, stop_at_eog=False, logprobs=True, top_logprobs=3
    )
    result = llama.model.run([request])[0]
    assert len(result.top_logprobs) == 4 == len(result.logprobs)
    for i in range(4):
        again = llama.model.run([Request([*prompt, *result.tokens[:i]])])[0]
        assert again.logits is not None
        order = again.logits[0].argsort()[::-1][:3].tolist()
        assert [t for t, _ in result.top_logprobs[i]] == order
        values = [p for _, p in result.top_logprobs[i]]
        assert values == sorted(values, reverse=True) and all(p < 0 for p in values)
    with pytest.raises(UsageError, match="top_logprobs -1 is negative"):
        Request(prompt, top_logprobs=-1)


# -- a run that stays open --------------------------------------------------------------------


class Watch:
    """The cache as it should be, beside the real one: which sequences each cell belongs to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: Stream):
        self.stream = stream
        self.cells: dict[Context, list[tuple[int, set[int]]]] = {}
        self.rows = 0
        for name in ("decode", "seq_cp", "seq_rm", "seq_load", "clear"):
            monkeypatch.setattr(Context, name, self._spy(name, getattr(Context, name)))

    def _spy(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(context: Context, *args: Any, **options: Any) -> Any:
            done = plain(context, *args, **options)
            if name != "decode" or done:
                getattr(self, name)(context, *args, **options)
            return done

        return call

    def decode(self, context: Context, _: Any, positions: Any, seqs: Any, outputs: Any) -> None:
        cells = self.cells.setdefault(context, [])
        for pos, seq in zip(positions, seqs, strict=True):
            assert sorted(p for p, s in cells if seq in s) == list(range(pos))
            cells.append((pos, {seq}))
        self.rows += len(positions)

    def seq_cp(self, context: Context, src: int, dst: int, end: int) -> None:
        assert not any(dst in s for _, s in self.cells[context])
        for pos, s in self.cells[context]:
            if src in s and pos < end:
                s.add(dst)

    def seq_rm(self, context: Context, seq: int, start: int = 0) -> None:
        for pos, s in self.cells.get(context, []):
            if pos >= start:
                s.discard(seq)
        self.cells[context] = [c for c in self.cells.get(context, []) if c[1]]

    def seq_load(self, context: Context, seq: int, data: Any) -> None:
        assert not any(seq in s for _, s in self.cells[context])
        end = context.lib.L.llama_memory_seq_pos_max(context.memory, seq)
        self.cells[context] += [(pos, {seq}) for pos in range(end + 1)]

    def clear(self, context: Context, data: bool = False) -> None:
        self.cells[context] = []

    def check(self) -> None:
        """The ledgers know every cell and sequence."""
        for lane in self.stream._lanes.values():
            cells, tracks = self.cells.get(lane.context, []), lane.tracks
            assert len(cells) == tracks.used
            assert tracks.used + tracks.promised <= tracks.budget
            sequences = [t.sequence for t in (*tracks.live, *tracks.kept)]
            assert sorted([*sequences, *tracks.free]) == list(range(len(sequences + tracks.free)))
            for track in (*tracks.live, *tracks.kept):
                held = sorted(pos for pos, s in cells if track.sequence in s)
                assert held == list(range(len(track.rows)))


def _run_to_end(stream: Stream, watch: Watch | None = None) -> None:
    for _ in range(2000):
        if not stream.is_busy:
            return
        stream.step()
        if watch is not None:
            watch.check()
    raise AssertionError("a stream that does not end")


def _same(ticket: Ticket, alone: Result) -> None:
    assert ticket.is_over and ticket.error is None
    check_same(ticket.result, alone)


def _eight(t: Tiny) -> list[Request]:
    """Eight clients with vectors, ablations, captures and seeds of their own."""
    requests = []
    for i in range(8):
        edits = []
        if i % 2:
            edits.append(Edit("resid_post.1", "add", t.vector(seed=i), coeff=0.5 * i))
        if i in (2, 3, 6):
            edits.append(Edit("head_out.1", "zero", heads=[i % 2]))
        if i in (4, 7):
            edits.append(Edit("attn_out.2", "scale", coeff=0.3, tokens=-1))
        captures = [Capture("resid_post", tokens=-1, generated=True)] if i % 3 == 0 else []
        requests.append(
            Request(
                t.prompt(6 + i, seed=i % 3),
                edits,
                captures,
                logits="all" if i == 5 else None,
                n_predict=5 + i,
                sampling=Sampling(temperature=1.0, seed=i) if i % 2 else Sampling(),
                stop_at_eog=False,
                logprobs=True,
            )
        )
    return requests


@pytest.mark.parametrize("between", [0, 1, 3])
def test_eight_at_once_are_as_alone(
    case: Tiny, monkeypatch: pytest.MonkeyPatch, between: int
) -> None:
    """`between`: steps before the next one joins."""
    requests = _eight(case)
    alone = [case.model.run([r])[0] for r in requests]
    with case.model.stream() as stream:
        watch = Watch(monkeypatch, stream)
        tickets = []
        for request in requests:
            tickets.append(stream.add(request))
            for _ in range(between):
                stream.step()
                watch.check()
        _run_to_end(stream, watch)
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)
        usage = stream.usage()
        assert (usage.cells, usage.sequences, usage.running, usage.waiting) == (0, 0, 0, 0)


def test_they_run_side_by_side(llama: Tiny, decoded: list[int]) -> None:
    with llama.model.stream() as stream:
        for i in range(8):
            prompt = llama.prompt(5, seed=i)
            stream.add(Request(prompt, logits=None, n_predict=6, stop_at_eog=False))
        _run_to_end(stream)
    assert decoded[-6:] == [40, 8, 8, 8, 8, 8]


def test_each_step_tells_of_every_token_once(llama: Tiny) -> None:
    with llama.model.stream() as stream:
        tickets = [
            stream.add(Request(llama.prompt(n, seed=n), n_predict=n, stop_at_eog=False))
            for n in (4, 7, 5)
        ]
        told: dict[int, list[int]] = {i: [] for i in range(3)}
        while stream.is_busy:
            for ticket in stream.step():
                told[tickets.index(ticket)].append(ticket.tokens[-1])
        assert [told[i] for i in range(3)] == [t.tokens for t in tickets]


def test_who_is_cancelled_frees_its_cells_at_once(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [llama.prompt(12, seed=i) for i in range(3)]
    requests = [Request(p, n_predict=20, stop_at_eog=False) for p in prompts]
    want = llama.model.run([requests[1]])[0]
    with llama.model.stream(n_requests=2) as stream:
        watch = Watch(monkeypatch, stream)
        first, second, third = (stream.add(r) for r in requests)
        for _ in range(4):
            stream.step()
        assert stream.usage().running == 2 and stream.usage().waiting == 1
        before = stream.usage().cells
        stream.cancel(first)
        stream.cancel(third)  # it waits
        watch.check()
        assert first.is_over and first.cancelled and first.error is None
        assert before - stream.usage().cells == 12 + 19
        assert stream.usage().waiting == 0
        _run_to_end(stream, watch)
        _same(second, want)
        assert not third.tokens
        stream.cancel(second)  # it is over: nothing happens
        assert not second.cancelled


def test_the_next_turn_finds_its_prefix(llama: Tiny, decoded: list[int]) -> None:
    steer = [Edit("resid_post.1", "add", llama.vector())]
    for edits in ([], steer):
        prompt = llama.prompt(30, seed=len(edits))
        with llama.model.stream() as stream:
            turn = Request(prompt, edits, logits=None, n_predict=6, stop_at_eog=False)
            first = stream.add(turn)
            _run_to_end(stream)
            decoded.clear()
            more = [*prompt, *first.tokens, *llama.prompt(4, seed=9)]
            request = Request(more, edits, logits=None, n_predict=3, stop_at_eog=False)
            second = stream.add(request)
            _run_to_end(stream)
            # the last token was chosen, not decoded
            assert decoded == [1 + 4, 1, 1]
            _same(second, llama.model.run([request])[0])
            other = Request(more, [*edits, *steer], logits=None, n_predict=3, stop_at_eog=False)
            decoded.clear()
            third = stream.add(other)
            _run_to_end(stream)
            assert decoded[0] == len(more)  # other edits: other keys and values
            _same(third, llama.model.run([other])[0])


def test_a_prefix_that_is_read_is_decoded_again(llama: Tiny, decoded: list[int]) -> None:
    prompt = llama.prompt(20)
    request = Request(prompt, captures=[Capture("q.1", tokens=[8])], logits=[12, -1])
    with llama.model.stream() as stream:
        stream.add(Request(prompt, logits=None, n_predict=2))
        _run_to_end(stream)
        decoded.clear()
        ticket = stream.add(request)
        _run_to_end(stream)
        assert decoded == [12]
        _same(ticket, llama.model.run([request])[0])


def test_who_begins_alike_waits_for_the_prefix(llama: Tiny, decoded: list[int]) -> None:
    stem = llama.prompt(40)
    requests = [
        Request([*stem, 5 + i], logits=None, n_predict=3, stop_at_eog=False) for i in range(4)
    ]
    with llama.model.stream() as stream:
        tickets = [stream.add(r) for r in requests]
        _run_to_end(stream)
        assert sum(decoded) == 40 + 4 * 3
    for ticket, request in zip(tickets, requests, strict=True):
        _same(ticket, llama.model.run([request])[0])


def test_more_than_fits_waits_its_turn(case: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        Request(case.prompt(8 + 3 * i, seed=i), n_predict=6, stop_at_eog=False) for i in range(7)
    ]
    alone = [case.model.run([r])[0] for r in requests]
    with case.model.stream(cells=40, n_requests=3) as stream:
        watch = Watch(monkeypatch, stream)
        tickets = [stream.add(r) for r in requests]
        _run_to_end(stream, watch)
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)
        with pytest.raises(RangeError, match="longer than the 40 cells of the stream"):
            stream.add(Request(case.prompt(30), n_predict=12))


saving = pytest.mark.skipif(
    "MIA_TEST_RPC" in os.environ, reason="what lies on a device is not copied out of it"
)


@saving
@pytest.mark.parametrize("flash", [True, False])
def test_what_leaves_the_cache_is_saved(
    flash: bool, llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    """Conversations of which the cache keeps a part: each finds its prefix at its next turn."""
    t = reopen(llama, flash=flash)
    monkeypatch.setattr(limits, "STREAM_KEPT_CELLS", 70)
    steered = [Edit("resid_post.1", "add", t.vector(), coeff=0.5)]
    talks = [(t.prompt(30 + i, seed=i), steered if i % 2 else []) for i in range(6)]
    with t.model.stream(cells=800) as stream:
        watch = Watch(monkeypatch, stream)

        def turn(i: int, prompt: list[int]) -> Ticket:
            ask = Request(prompt, talks[i][1], logits=None, n_predict=6, stop_at_eog=False)
            ticket = stream.add(ask)
            _run_to_end(stream, watch)
            _same(ticket, t.model.run([ask])[0])
            return ticket

        first = [turn(i, prompt) for i, (prompt, _) in enumerate(talks)]
        (lane,) = stream._lanes.values()
        assert stream.usage().kept_cells <= 70 and len(lane.tracks.saved) == 5
        for i in (1, 0, 5, 2, 4):
            more = [*talks[i][0], *first[i].tokens, *t.prompt(5, seed=9)]
            decoded.clear()
            turn(i, more)
            # the last token was chosen, not decoded; then it runs alone
            assert decoded[0] == 1 + 5, i
        # a part of what was saved: all of it stays for its own next turn
        saved = max(lane.tracks.saved, key=lambda s: len(s.keys))
        ids = [token for token, _ in saved.tokens]
        decoded.clear()
        other = Request([*ids[:20], 7], saved.tokens[0][1] and steered, n_predict=1)
        ticket = stream.add(other)
        _run_to_end(stream, watch)
        assert decoded[0] == 1 and saved in lane.tracks.saved
        _same(ticket, t.model.run([other])[0])


@saving
def test_what_is_saved_has_a_limit(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama, flash=True)
    monkeypatch.setattr(limits, "STREAM_KEPT_CELLS", 0)
    with t.model.stream(cells=200) as stream:
        for i in range(8):
            stream.add(Request(t.prompt(30, seed=i), logits=None, n_predict=2, stop_at_eog=False))
            _run_to_end(stream, None)
            assert stream.usage().kept_cells == 0 and stream.usage().saved <= 100
        assert stream.usage().saved == 3 * 31


def test_attention_patterns_have_a_lane_of_their_own(llama: Tiny, reopen: Any) -> None:
    t = reopen(llama, flash=True)
    prompt = llama.prompt(9)
    block = [Edit("attn_scores.1", _without_first, tokens=slice(4, None), generated=True)]
    requests = [
        Request(prompt, n_predict=5, stop_at_eog=False),
        Request(prompt, block, n_predict=5, stop_at_eog=False),
        Request(prompt, [], [Capture("attn_pattern.1", generated=True)], n_predict=4),
    ]
    alone = [t.model.run([r])[0] for r in requests]
    with t.model.stream() as stream:
        tickets = [stream.add(r) for r in requests]
        _run_to_end(stream)
        assert {flash for flash, _ in stream._lanes} == {True, False}
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)
        # its cells are known, so the prefix serves another one
        again = stream.add(requests[1])
        _run_to_end(stream)
        _same(again, alone[1])


def _without_first(rows: Any) -> Any:
    rows[:, 0] = -np.inf
    return rows


def test_a_failing_request_harms_nobody(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    good = _eight(llama)[:4]
    alone = [llama.model.run([r])[0] for r in good]
    wild = Edit("resid_post.0", "add", llama.vector() * 1e16, coeff=90)
    for isolated in (True, False):
        if not isolated:
            monkeypatch.setattr("mia.engine.stream.is_tame", lambda *_: True)
        with llama.model.stream() as stream:
            tickets = [stream.add(good[0])]
            stream.step()
            stream.step()
            tickets += [stream.add(r) for r in good[1:3]]
            bad = stream.add(Request(llama.prompt(5), [wild], n_predict=4))
            tickets.append(stream.add(good[3]))
            _run_to_end(stream)
            assert isinstance(bad.error, UsageError) and "overflow" in str(bad.error)
            for ticket, result in zip(tickets, alone, strict=True):
                _same(ticket, result)
            assert stream.usage().cells == stream.usage().sequences == 0
            assert {lone for _, lone in stream._lanes} == ({True, False} if isolated else {False})


def test_one_that_fails_while_it_generates(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone is decoded again, in the middle of what they write."""
    monkeypatch.setattr("mia.engine.stream.is_tame", lambda *_: True)
    calls = []

    def breaks(rows: Any) -> Any:
        calls.append(len(rows))
        return rows * np.nan if len(calls) > 3 else rows

    good = _eight(llama)[:3]
    alone = [llama.model.run([r])[0] for r in good]
    with llama.model.stream() as stream:
        watch = Watch(monkeypatch, stream)
        bad = stream.add(Request(llama.prompt(5), [Edit("resid_post.1", breaks)], n_predict=20))
        tickets = [stream.add(r) for r in good]
        _run_to_end(stream, watch)
        assert isinstance(bad.error, UsageError) and len(bad.tokens) > 1
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)


class _Failing(RowMetric):
    """A metric that fails at the second row."""

    def row(self, i: int, logits: Any) -> int:
        if i:
            raise ValueError("a fault of the metric")
        return i


def _failing(rows: Any) -> Any:
    raise ValueError("a fault of the function")


@pytest.mark.parametrize("fault", ["metric", "function"])
def test_a_fault_of_one_request_s_own_code_ends_it_alone(llama: Tiny, fault: str) -> None:
    """Not in silence, with half of its numbers."""
    prompt, others = llama.prompt(12, seed=3), _eight(llama)[:3]
    alone = [llama.model.run([r])[0] for r in others]
    bad = Request(prompt, logits="all", metric=_Failing(), n_predict=3)
    if fault == "function":
        bad = Request(prompt, [Edit("resid_post.0", _failing)], n_predict=3)
    with llama.model.stream() as stream:
        failed, *tickets = [stream.add(r) for r in [bad, *others]]
        _run_to_end(stream)
        assert isinstance(failed.error, EngineError) and "a fault of the" in str(failed.error)
        assert isinstance(failed.error.__cause__, ValueError) and not failed.tokens
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)


def test_an_interrupt_loses_nothing(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _eight(llama)
    alone = [llama.model.run([r])[0] for r in requests]
    with llama.model.stream() as stream:
        tickets = [stream.add(r) for r in requests]
        for _ in range(4):
            stream.step()
        plain = Context.decode

        def interrupted(context: Context, *args: Any) -> bool:
            plain(context, *args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Context, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.step()
        _run_to_end(stream)
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)


@pytest.mark.parametrize(
    "where",
    [
        (Generation, "choose"),
        (Generation, "next_row"),
        (Answer, "put_logits"),
        (Answer, "finish"),
        (Tracks, "add"),
        (Tracks, "open"),
        (Tracks, "close"),
        (Decoder, "logits"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_between_a_decode_and_its_reading(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], after: bool
) -> None:
    """A real one, again and again: each token comes once, and nothing that was asked for is missing."""
    requests = _eight(llama)
    alone = [llama.model.run([r])[0] for r in requests]
    plain, n_calls = getattr(*where), 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls in (2, 7, 20, 50, 90) and not after:
            signal.raise_signal(signal.SIGINT)
        done = plain(*args, **options)
        if n_calls in (2, 7, 20, 50, 90) and after:
            signal.raise_signal(signal.SIGINT)
        return done

    told: dict[Ticket, int] = {}
    with llama.model.stream(n_requests=3) as stream:
        tickets = [stream.add(r) for r in requests]
        n_interrupts = 0
        with monkeypatch.context() as patch:
            patch.setattr(*where, interrupted)
            while stream.is_busy:
                try:
                    for ticket in stream.step():
                        told[ticket] = len(ticket.tokens)
                except KeyboardInterrupt:
                    n_interrupts += 1
        assert n_interrupts
        for ticket in stream._changed:  # of an interrupted last step
            told[ticket] = len(ticket.tokens)
        for lane in stream._lanes.values():
            for ticket in lane._changed:
                told[ticket] = len(ticket.tokens)
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)
            assert told[ticket] == len(result.tokens)


def test_a_recurrent_memory_runs_one_at_a_time(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("mamba")
    requests = [Request(t.prompt(4 + i, seed=i), n_predict=4, stop_at_eog=False) for i in range(3)]
    alone = [t.model.run([r])[0] for r in requests]
    with t.model.stream() as stream:
        tickets = [stream.add(r) for r in requests]
        _run_to_end(stream)
        for ticket, result in zip(tickets, alone, strict=True):
            _same(ticket, result)


def test_what_does_not_fit_is_refused_at_once(llama: Tiny) -> None:
    with llama.model.stream() as stream:
        with pytest.raises(SiteError):
            stream.add(Request([5], captures=[Capture("router.0")]))
        with pytest.raises(RangeError, match="out of range"):
            stream.add(Request([10**6]))
        with pytest.raises(UsageError, match="one Request at a time"):
            stream.add([Request([5])])  # type: ignore[arg-type]
        assert not stream.is_busy
    with pytest.raises(UsageError, match="the stream is closed"):
        stream.add(Request([5]))
    with pytest.raises(UsageError, match="runs 1 to 240 requests"):
        llama.model.stream(n_requests=1000)


def test_other_runs_go_on_beside_it(llama: Tiny, reopen: Any) -> None:
    t = reopen(llama)
    request = _eight(t)[3]
    alone = t.model.run([request])[0]
    stream = t.model.stream()
    ticket = stream.add(request)
    while stream.is_busy:
        stream.step()
        check_same(t.model.run([request])[0], alone)
    _same(ticket, alone)
    late = stream.add(request)
    t.model.close()
    assert late.cancelled
    with pytest.raises(UsageError, match="closed"):
        stream.step()


def test_steered_models_steer_their_streams(llama: Tiny) -> None:
    vector = Vector({1: llama.vector()})
    request = Request(llama.prompt(5), n_predict=5, stop_at_eog=False)
    with llama.model.stream() as stream:
        with llama.model.steered(vector):
            alone = llama.model.run([request])[0]
            ticket = stream.add(request)
        _run_to_end(stream)
        assert ticket.tokens == alone.tokens


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_joins_and_leaves(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    t = tiny(["llama", "gemma2-window", "gpt2"][seed % 3])
    stems = [t.prompt(int(rng.integers(5, 30)), seed=s) for s in range(3)]
    edits = [Edit("resid_post.1", "add", t.vector(seed=i)) for i in range(2)]
    cells = int(rng.integers(60, 200))
    with t.model.stream(cells=cells, n_requests=int(rng.integers(1, 6))) as stream:
        watch = Watch(monkeypatch, stream)
        tickets: list[Ticket] = []
        for _ in range(60):
            if rng.random() < 0.4:
                stem = stems[rng.integers(3)]
                if tickets and rng.random() < 0.3:
                    before = tickets[rng.integers(len(tickets))]
                    stem = [*before.request.tokens, *before.tokens]
                tokens = [*stem, *t.prompt(int(rng.integers(1, 5)), seed=int(rng.integers(99)))]
                chosen = [edits[i] for i in range(2) if rng.random() < 0.3]
                captures = [Capture("l_out-1", -1)] if rng.random() < 0.2 else []
                request = Request(
                    tokens[: cells // 2],
                    chosen,
                    captures,
                    logits=None,
                    n_predict=int(rng.integers(0, 8)),
                    stop_at_eog=False,
                )
                tickets.append(stream.add(request))
            elif tickets and rng.random() < 0.1:
                stream.cancel(tickets[rng.integers(len(tickets))])
            stream.step()
            watch.check()
        _run_to_end(stream, watch)
        for ticket in tickets:
            if not ticket.cancelled:
                _same(ticket, t.model.run([ticket.request])[0])
        assert stream.usage().cells == stream.usage().sequences == 0


def test_text_comes_in_whole_characters(case: Tiny) -> None:
    """Together it is the text of the result, whatever bytes the tokens are."""
    for seed in range(6):
        hot = Sampling(temperature=2.0, seed=seed)
        parts: list[str] = []
        written = case.model.generate(case.prompt(5), 24, sampling=hot, on_text=parts.append)
        assert (
            "".join(parts)
            == written.text
            == case.model.generate(case.prompt(5), 24, sampling=hot).text
        )
        assert all(parts) and (len(parts) > 3 or len(written.tokens) < 6)


@pytest.mark.parametrize("in_one_lane", [True, False])
def test_long_prompts_come_in_parts_while_others_generate(
    llama: Tiny, decoded: list[int], in_one_lane: bool
) -> None:
    """Also in the lane of requests that read attention patterns, where there are two."""
    captures = () if in_one_lane else [Capture("attn_pattern.1", [-1])]
    long = Request(llama.prompt(200), captures=captures, logits=None)
    with llama.model.stream() as stream:
        first = stream.add(Request(llama.prompt(5), n_predict=30, stop_at_eog=False))
        stream.step()
        decoded.clear()
        second = stream.add(long)
        _run_to_end(stream)
        assert max(decoded) == limits.STREAM_ROWS and len(first.tokens) == 30
        _same(second, llama.model.run([long])[0])
        decoded.clear()
        stream.add(Request(llama.prompt(200, seed=5), logits=None))
        _run_to_end(stream)
        assert decoded == [200]  # nobody waits
