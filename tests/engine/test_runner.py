"""The schedule: whatever the requests, each runs to its end within the cells and sequences there are."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from reference import check, check_same
from tiny import Tiny

from mia.edits import Edit
from mia.engine import limits
from mia.engine.batch import best_rows
from mia.engine.run import Engine
from mia.engine.runner import Runner
from mia.errors import EngineError
from mia.llama import Context, Tracer
from mia.request import Capture, Request, Sampling, TokenLogits


class Shadow:
    """Each cache as it should be, beside the real one: which sequences each cell belongs to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.cells: dict[Context, list[tuple[int, set[int]]]] = {}
        self.runners: list[Runner] = []
        self.most = 0
        self.outputs: list[int] = []
        for name in ("decode", "seq_cp", "seq_rm", "clear"):
            monkeypatch.setattr(Context, name, self._spy(name, getattr(Context, name)))
        init = Runner.__init__

        def spy_init(runner: Runner, *args: Any, **options: Any) -> None:
            init(runner, *args, **options)
            self.runners.append(runner)

        monkeypatch.setattr(Runner, "__init__", spy_init)

    def _spy(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(context: Context, *args: Any, **options: Any) -> Any:
            getattr(self, name)(context, *args, **options)
            return plain(context, *args, **options)

        return call

    def decode(self, context: Context, _: Any, positions: Any, seqs: Any, outputs: Any) -> None:
        cells = self.cells.setdefault(context, [])
        for pos, seq in zip(positions, seqs, strict=True):
            assert sorted(p for p, s in cells if seq in s) == list(range(pos))
            cells.append((pos, {seq}))
        self.most = max(self.most, len(cells))
        self.outputs.append(sum(outputs))
        if self.runners and self.runners[-1].context is context:
            ledger = self.runners[-1].ledger
            assert len(cells) <= ledger.booked <= ledger.budget

    def seq_cp(self, context: Context, src: int, dst: int, end: int) -> None:
        assert not any(dst in s for _, s in self.cells[context])
        for pos, s in self.cells[context]:
            if src in s and pos < end:
                s.add(dst)

    def seq_rm(self, context: Context, seq: int, start: int = 0) -> None:
        for pos, s in self.cells[context]:
            if pos >= start:
                s.discard(seq)
        self.cells[context] = [c for c in self.cells[context] if c[1]]

    def clear(self, context: Context, data: bool = False) -> None:
        self.cells[context] = []

    def check_all_given_back(self) -> None:
        for one in self.runners:
            assert one.ledger.booked == 0
            assert sorted(one.ledger.free) == list(range(one.ledger.n_sequences))
            assert not one.generating and not one.waiting
        assert not any(self.cells.values())


@pytest.fixture
def shadow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shadow]:
    """Watches the cache, and that a run gives back all it took."""
    found = Shadow(monkeypatch)
    yield found
    found.check_all_given_back()


def _tokens(rng: np.random.Generator, n: int) -> list[int]:
    return rng.integers(3, 320, n).tolist()


def _run_checked(t: Tiny, requests: list[Request], every: int = 1) -> None:
    results = t.model.run(requests)
    for request, result in list(zip(requests, results, strict=True))[::every]:
        check(result, request, t.oracle)


def test_more_requests_than_sequences(llama: Tiny, shadow: Shadow, decoded: list[int]) -> None:
    prefix = llama.prompt(4)
    requests = [Request([*prefix, 3 + i]) for i in range(300)]
    _run_checked(llama, requests, every=23)
    assert sum(decoded) == 304
    assert len(decoded) <= 4


def test_more_tokens_than_cells(
    llama: Tiny, shadow: Shadow, reopen: Any, small_cache: None
) -> None:
    t = reopen(llama)
    requests = [Request(t.prompt(n, seed=n)) for n in range(30, 2, -1)]
    _run_checked(t, requests, every=5)
    assert shadow.runners[0].ledger.budget == 31 and shadow.most <= 31


def test_many_samples_of_one_prompt(llama: Tiny, shadow: Shadow, decoded: list[int]) -> None:
    prompt = llama.prompt(6)
    requests = [
        Request(
            prompt,
            logits=None,
            n_predict=4,
            sampling=Sampling(temperature=1, seed=i),
            stop_at_eog=False,
        )
        for i in range(280)
    ]
    results = llama.model.run(requests)
    assert sum(decoded) == 6 + 280 * 3
    assert max(decoded) > 200  # side by side
    assert len({tuple(r.tokens) for r in results}) > 200
    for i in range(0, 280, 40):
        check(results[i], requests[i], llama.oracle)
        check_same(results[i], llama.model.run([requests[i]])[0])


def test_requests_with_and_without_continuation(llama: Tiny, shadow: Shadow) -> None:
    prompt, v = llama.prompt(), llama.vector()
    edit = Edit("resid_post.1", "add", v, generated=True, tokens=-1)
    requests: list[Request] = []
    for n in (14, 9, 14, 5):
        for n_predict in (0, 1, 7, 2):
            edits = [edit] if len(requests) % 3 else []
            captures = [Capture("l_out-1", generated=bool(len(requests) % 2))]
            requests.append(Request(prompt[:n], edits, captures, n_predict=n_predict))
    _run_checked(llama, requests)


def test_a_branch_waits_for_cells_that_another_holds(
    llama: Tiny, shadow: Shadow, reopen: Any, small_cache: None
) -> None:
    """The first prefix has the longer ends; the second is let in while they do not fit."""
    t, rng = reopen(llama), np.random.default_rng(0)
    first, second = _tokens(rng, 6), _tokens(rng, 6)
    ends = [
        first + _tokens(rng, 40),
        first + _tokens(rng, 40),
        second + _tokens(rng, 6),
        [*second, 5],
    ]
    _run_checked(t, [Request(e) for e in ends])


def test_what_is_longer_waits_for_what_is_generated(
    llama: Tiny, shadow: Shadow, reopen: Any, small_cache: None
) -> None:
    t, prompt = reopen(llama), llama.prompt(40)
    requests = [Request(prompt[:20], n_predict=20, stop_at_eog=False), Request(prompt)]
    _run_checked(t, requests)


def test_forks_of_forks_of_many_prompts(llama: Tiny, shadow: Shadow) -> None:
    """Each prompt would keep a sequence for itself, and none would be left for their ends."""
    requests = [Request([a, b, c]) for a in range(3, 270) for b in (5, 6) for c in (7, 8)]
    _run_checked(llama, requests, every=97)


def test_a_chain_of_more_forks_than_sequences(llama: Tiny, shadow: Shadow, reopen: Any) -> None:
    t, prompt = reopen(llama, ctx=400), llama.prompt(270)
    requests = [Request(prompt[:n]) for n in range(1, 271)]
    results = t.model.run(requests)
    want = t.model.run([Request(prompt, logits="all")])[0].logits
    got = np.concatenate([r.logits for r in results])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    each = t.model.run([Request(prompt[:n], n_predict=1) for n in range(1, 271)])
    assert [r.tokens for r in each] == [[i] for i in want.argmax(1)]
    v = t.vector()
    edits = [Edit("resid_post.0", "add", v, tokens=i, generated=False) for i in range(0, 270, 2)]
    combs = [Request(prompt[: 2 * n + 3], edits[: n + 1]) for n in range(130)]
    check(t.model.run(combs)[-1], combs[-1], t.oracle)


@pytest.mark.parametrize("n", [255, 256, 257, 300])
def test_a_chain_of_more_twins_than_sequences(
    llama: Tiny, shadow: Shadow, reopen: Any, n: int
) -> None:
    """Every prefix has an unedited twin that three late edits start from: a sequence at each."""
    t, prompt = reopen(llama, ctx=400), llama.prompt(n)
    edits = [Edit("resid_post.1", "add", t.vector(seed=i), tokens=-1) for i in range(3)]
    requests = [Request(prompt[:k], [e]) for k in range(1, n + 1) for e in edits]
    requests += [Request(prompt[:k]) for k in range(1, n + 1)]
    results = t.model.run(requests)
    want = t.model.run([Request(prompt, logits="all")])[0].logits
    got = np.concatenate([r.logits for r in results[3 * n :]])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    for i in (0, 1, 3 * (n - 2), 3 * n - 1):
        check(results[i], requests[i], t.oracle)
    assert len(shadow.outputs) < 2 * n  # of 4 n: they run side by side all the same


@pytest.mark.parametrize("n_sequences", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_fewer_sequences_than_the_forks_need(
    tiny: Callable[[str], Tiny],
    reopen: Any,
    shadow: Shadow,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    n_sequences: int,
) -> None:
    """One is enough for any tree of segments; what cannot run side by side waits."""
    of = tiny(["llama", "gemma2-window", "gpt2"][seed % 3])
    requests = _random_requests(of, np.random.default_rng(seed))
    binary = [of.prompt(1) + [5 + (i >> b & 1) for b in range(5)] for i in range(32)]
    requests += [Request(p, n_predict=2) for p in binary]
    alone = [of.model.run([r])[0] for r in requests]
    monkeypatch.setattr(limits, "MAX_SEQUENCES", n_sequences)
    monkeypatch.setattr(limits, "KV_BYTES", 0)
    t = reopen(of)
    done: list[tuple[int, int]] = []
    together = t.model.run(requests, progress=lambda i, n: done.append((i, n)))
    assert done == [(i + 1, len(requests)) for i in range(len(requests))]
    for request, a, b in zip(requests, alone, together, strict=True):
        check_same(a, b)
        check(b, request, t.oracle)


def test_no_more_logits_at_a_time_than_memory_allows(
    llama: Tiny, shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large vocabulary makes few outputs for one decode, of prompts and of continuations."""
    monkeypatch.setattr(limits, "LOGITS_BYTES", 9 * 4 * llama.model.n_vocab)
    requests = [Request(llama.prompt(n, seed=n), logits="all") for n in (5, 20, 3, 8)]
    requests += [Request(llama.prompt(4, seed=s), n_predict=4) for s in range(20)]
    _run_checked(llama, requests)
    assert max(shadow.outputs) == 9


def test_when_nothing_fits_it_says_so(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    monkeypatch.setattr(Engine, "budget", lambda *_: 5)
    with pytest.raises(EngineError, match="a request needs more than the 5 cells"):
        t.model.run([Request(t.prompt(6))])
    monkeypatch.undo()
    _run_checked(t, [Request(t.prompt(6))])


# -- at random --------------------------------------------------------------------------------


def _random_requests(t: Tiny, rng: np.random.Generator) -> list[Request]:
    """A small forest: prompts that share beginnings, edits that are shared or not, all options."""
    stems = [_tokens(rng, int(rng.integers(1, 9))) for _ in range(2)]
    sites = [
        "resid_post.0",
        "head_out.1",
        "resid_pre.2",
        "v.0",
        "mlp_out.2",
        "resid_post.2",
        "embed",
    ]
    pool = [_random_edit(t, rng, str(rng.choice(sites))) for _ in range(4)]
    requests = []
    for _ in range(rng.integers(1, 14)):
        stem = stems[rng.integers(2)]
        tokens = (
            stem[: rng.integers(1, len(stem) + 1)] + rng.integers(3, 6, rng.integers(4)).tolist()
        )
        edits = [pool[i] for i in rng.permutation(4)[: rng.choice([0, 0, 1, 1, 2])]]
        if rng.random() < 0.2:
            edits.append(_random_edit(t, rng, str(rng.choice(sites))))
        captures = []
        if rng.random() < 0.5:
            where = rng.choice(["l_out", "q.1", "attn_pattern.1", "logits", "final_norm"])
            last = [None, -1][rng.integers(2)]
            captures.append(Capture(str(where), last, generated=bool(rng.random() < 0.5)))
        hot = Sampling(temperature=1.0, seed=int(rng.integers(100)))
        logits = [None, "last", "all", [0, -1]][rng.integers(4)]
        metric: Any = None
        if logits is not None:
            summed, few = (lambda x: x.sum(0)), TokenLogits(rng.integers(3, 320, 2).tolist())
            metric = [None, None, None, summed, few][rng.integers(5)]
        requests.append(
            Request(
                tokens,
                edits,
                captures,
                logits=logits,
                metric=metric,
                n_predict=int(rng.choice([0, 0, 0, 1, 2, 6])),
                sampling=hot if rng.random() < 0.3 else Sampling(),
                stop_at_eog=False,
            )
        )
    return requests


def _random_edit(t: Tiny, rng: np.random.Generator, site: str) -> Edit:
    tokens = [None, 0, -1, slice(-2, None), slice(1, None)][rng.integers(5)]
    op = str(rng.choice(["add", "replace", "project_out"]))
    value = t.vector(site, seed=int(rng.integers(1000)))
    return Edit(site, op, value, tokens=tokens, generated=[None, True, False][rng.integers(3)])


@pytest.mark.parametrize("seed", range(30))
def test_any_requests_together_are_as_alone(
    tiny: Callable[[str], Tiny],
    reopen: Any,
    shadow: Shadow,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """With as few cells as will do, few sequences, and few rows in a decode."""
    rng = np.random.default_rng(seed)
    of = tiny(["llama", "gemma2-window", "gpt2"][seed % 3])
    requests = _random_requests(of, rng)
    alone = [of.model.run([r])[0] for r in requests]
    monkeypatch.setattr(limits, "MAX_SEQUENCES", [1, 2, 3, 6][seed // 3 % 4])
    monkeypatch.setattr(limits, "UBATCH", 6)
    monkeypatch.setattr(limits, "KV_BYTES", 0)
    t = reopen(of)
    done: list[tuple[int, int]] = []
    together = t.model.run(requests, progress=lambda i, n: done.append((i, n)))
    assert done == [(i + 1, len(requests)) for i in range(len(requests))]
    for request, a, b in zip(requests, alone, together, strict=True):
        check_same(a, b)
        check(b, request, t.oracle)


def test_outputs_that_nobody_wants_the_logits_of_run_apart(llama: Tiny, decoded: list[int]) -> None:
    """All of the last block's rows and the last token's logits: the unembedding runs for two rows."""
    prompts = [llama.prompt(30), llama.prompt(25)[::-1]]
    requests = [Request(p, captures=[Capture("l_out")]) for p in prompts]
    results = llama.model.run(requests)
    assert decoded == [29 + 24, 2]
    for request, result in zip(requests, results, strict=True):
        check(result, request, llama.oracle)
    decoded.clear()
    short = Request(llama.prompt(9), captures=[Capture("l_out")])
    check(llama.model.run([short])[0], short, llama.oracle)
    assert decoded == [9]


def test_the_unembedding_is_left_out_for_states_of_a_prompt_that_is_continued(
    llama: Tiny, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    skips: list[int] = []
    plain = Tracer.expect

    def expect(self: Tracer, addrs: Any, visits: Any, skip: Any, on_data: Any) -> None:
        skips.append(len(skip))
        plain(self, addrs, visits, skip, on_data)

    request = Request(llama.prompt(30), captures=[Capture("l_out")], n_predict=3, stop_at_eog=False)
    llama.model.run([request])  # a graph that is new is decoded twice
    decoded.clear()
    monkeypatch.setattr(Tracer, "expect", expect)
    check(llama.model.run([request])[0], request, llama.oracle)
    assert decoded == [29, 1, 1, 1]
    assert skips[0] > 0 and not any(skips[1:])


def test_a_large_vocabulary_has_fewer_sequences(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp keeps a row of logits for each sequence from the start: 262 MB for 256 of them over
    256,000 tokens."""
    prompts = [[*llama.prompt(3), 5 + i] for i in range(30)]
    alone = [llama.model.run([Request(p)])[0] for p in prompts]
    monkeypatch.setattr(limits, "LOGITS_BYTES", 4 * llama.model.n_vocab * 10)
    model = reopen(llama).model
    together = model.run([Request(p) for p in prompts])
    sessions = model._engine.sessions.open.values()
    assert [s.context.params.n_seq for s in sessions] == [10]
    monkeypatch.undo()
    assert [limits.sequences(n, 100) for n in (1, 2, 9, 1000)] == [1, 16, 32, limits.MAX_SEQUENCES]
    for a, b in zip(alone, together, strict=True):
        check_same(a, b)


def test_a_window_that_goes_on_leaves_its_cells_to_later_forks(
    tiny: Callable[[str], Tiny], reopen: Any, shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp gives cells that a window has left behind to whoever comes next: here to the second
    half of the long prompt, when the cells of the first, short one are free again."""
    monkeypatch.setattr(limits, "UBATCH", 16)
    monkeypatch.setattr(limits, "MAX_SEQUENCES", 16)
    t = reopen(tiny("gemma2-window"))
    prompt = t.prompt(30)
    requests = [Request(t.prompt(6, seed=3)), Request(prompt)]
    requests += [Request([*prompt[:p], *[5] * 8]) for p in (1, 4, 9)]
    requests += [Request(t.prompt(20, seed=s)) for s in (5, 6)]
    requests += [Request([*prompt[:p], 5, 6, p]) for p in (2, 7, 15)]
    _run_checked(t, requests)


def test_batches_end_where_foreign_cells_cost_more(
    llama: Tiny, shadow: Shadow, decoded: list[int]
) -> None:
    """Tiny models are F32: their attention is not fused, and a row of 48 numbers costs little else."""
    assert not llama.model._engine.fuses
    requests = [Request(llama.prompt(20, seed=s)) for s in range(40)]
    _run_checked(llama, requests, every=9)
    assert max(decoded) == limits.CELL_STEP


@pytest.mark.parametrize(
    ("n_used", "n_embd", "rows"),
    [
        (0, 576, 256),
        (24, 576, 232),
        (24, 4096, 488),
        (250, 576, 262),
        (600, 576, 168),
        (0, 9999, 512),
    ],
)
def test_a_row_costs_the_least(n_used: int, n_embd: int, rows: int) -> None:
    assert best_rows(n_used, n_embd, 512) == rows
    assert best_rows(n_used, n_embd, 5) == 5


def test_what_nobody_reads_of_one_request_does_not_end_the_others(
    tiny: Callable[[str], Tiny],
) -> None:
    """A block of zeros: each router's softmax is divided by zero. No logits of it are asked for."""
    t = tiny("qwen2moe")
    good = Request([135, 4, 3, 3], logits=None, n_predict=1)
    read = Request([135, 4, 3, 3], captures=[Capture("resid_post.2")], logits=None)
    bad = Request([85, 155, 198], [Edit("resid_mid.0", "zero")], logits=None)
    for request in (good, read):
        (want,) = t.model.run([request])
        got = t.model.run([request, bad])[0]
        assert got.tokens == want.tokens
        for site, rows in want.captures.items():
            np.testing.assert_allclose(got[site], rows, rtol=0, atol=1e-5)
    with pytest.raises(EngineError, match=r"not finite|not numbers"):
        t.model.run([good, Request(bad.tokens, bad.edits)])


def test_what_is_decoded_in_part_goes_on_before_resumed_segments(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    """It may hold the cells that they need, and is not among those that wait."""
    monkeypatch.setattr(limits, "UBATCH", 8)
    monkeypatch.setattr(limits, "MAX_SEQUENCES", 8)
    monkeypatch.setattr(limits, "CELLS_PER_EMBD", 0)
    monkeypatch.setattr(limits, "MIN_CELLS", 1)  # as many as the longest request has, and one
    t, prompt = reopen(llama), llama.prompt(6)
    edits = [Edit("mlp_out.2", "scale", coeff=c, tokens=slice(3, 6)) for c in (2.0, 3.0, 4.0, 5.0)]
    requests = [Request([*prompt, 7, 8, 9, 10]), *(Request(prompt, [e]) for e in edits)]
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, request, t.oracle)
    assert decoded[-4:] == [8, 2, 6, 6]  # the long prompt, then two and two
