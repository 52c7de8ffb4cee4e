"""What requests share: rows decoded once, blocks skipped, and no request left waiting."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import check, check_same
from tiny import Tiny

from mia.edits import Edit
from mia.engine import limits, run
from mia.engine.jobs import resolve
from mia.engine.plan import build
from mia.engine.runner import Runner
from mia.engine.segments import Segment
from mia.engine.session import Session
from mia.llama import Context, Tracer, read_array, rows_of
from mia.llama.library import Tensor
from mia.llama.tracer import FLAG_COMPUTE
from mia.request import Capture, Request
from mia.sites import Site


@pytest.fixture
def roots(monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """The segments of the last run."""
    kept: list[Segment] = []

    def spy(*args: Any, **options: Any) -> list[Segment]:
        kept[:] = build(*args, **options)
        return list(kept)

    monkeypatch.setattr(run, "build", spy)
    return kept


def _segments(roots: list[Segment]) -> list[Segment]:
    return [s for r in roots for s in [r, *_segments(r.children)]]


# -- rows -------------------------------------------------------------------------------------


def test_a_common_prefix_is_decoded_once(llama: Tiny, decoded: list[int]) -> None:
    prefix, ends = llama.prompt(9), llama.prompt(30, seed=5)
    requests = [Request([*prefix, *ends[3 * i : 3 * i + 3]], logits="all") for i in range(10)]
    results = llama.model.run(requests)
    assert decoded == [9 + 3, 27]  # one of the ends goes on in the prefix's batch
    for request, result in zip(requests, results, strict=True):
        check(result, request, llama.oracle)


def test_a_prompt_that_begins_another_is_decoded_once(llama: Tiny, decoded: list[int]) -> None:
    prompt = llama.prompt(12)
    requests = [Request(prompt[:n]) for n in (12, 4, 7, 12)]
    for request, result in zip(requests, llama.model.run(requests), strict=True):
        check(result, request, llama.oracle)
    assert sum(decoded) == 12


def test_the_same_request_is_decoded_once(llama: Tiny, decoded: list[int]) -> None:
    prompt, v = llama.prompt(), llama.vector()
    edit = Edit("resid_post.1", "add", v, tokens=3)
    requests = [Request(list(prompt), [edit], [Capture("l_out-2")], n_predict=3) for _ in range(4)]
    llama.model.run(requests[:1])  # a graph that is new is decoded twice
    decoded.clear()
    results = llama.model.run(requests)
    assert decoded == [14, 4, 4]
    for request, result in zip(requests, results, strict=True):
        check(result, request, llama.oracle)
    assert len({id(r.captures[Site("resid_post", 2)]) for r in results}) == 4
    assert not np.shares_memory(results[0].logits, results[1].logits)


def test_edited_prompts_part_at_the_first_edited_token(llama: Tiny, decoded: list[int]) -> None:
    prompt, v = llama.prompt(), llama.vector()
    shared = Edit("attn_out.0", "add", v, tokens=[2, 3])
    own = [Edit("mlp_out.1", "add", v, tokens=9, coeff=c) for c in (1.0, 2.0)]
    requests = [Request(prompt, [shared, e]) for e in own] + [Request(prompt)]
    results = llama.model.run(requests)
    # tokens 0 and 1 for all, 2 to 8 for those with `shared` and for the clean one, then apart
    assert sum(decoded) == 2 + 7 + 2 * 5 + 12
    for request, result in zip(requests, results, strict=True):
        check(result, request, llama.oracle)


def test_edits_are_the_same_only_in_the_same_place_of_the_list(
    llama: Tiny, decoded: list[int]
) -> None:
    prompt, v = llama.prompt(6), llama.vector()
    add, scale = Edit("resid_post.0", "add", v), Edit("resid_post.0", "scale", coeff=0.5)
    requests = [Request(prompt, e, logits="all") for e in ([add, scale], [scale, add])]
    results = llama.model.run(requests)
    assert sum(decoded) == 12
    for request, result in zip(requests, results, strict=True):
        check(result, request, llama.oracle)


def test_no_logits_where_none_are_wanted(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that nobody reads are no outputs, and the unembedding does not run for none."""
    seen, skips = [], []
    plain_decode, plain_expect = Context.decode, Tracer.expect

    def decode(self: Context, tokens: Any, positions: Any, seqs: Any, outputs: Any) -> bool:
        seen.append(list(outputs))
        return plain_decode(self, tokens, positions, seqs, outputs)

    def expect(self: Tracer, addrs: Any, wants: Any, skip: Any, on_data: Any) -> None:
        skips.append(len(skip))
        plain_expect(self, addrs, wants, skip, on_data)

    monkeypatch.setattr(Context, "decode", decode)
    monkeypatch.setattr(Tracer, "expect", expect)
    prompt = llama.prompt(6)
    inner, last = Capture("l_out-1", tokens=2), Capture("l_out-2", tokens=[2, 4])
    for request, outputs, skipped in [
        (Request(prompt, captures=[inner], logits=None), [0, 0, 0, 0, 0, 0], True),
        (Request(prompt, captures=[last], logits=None), [0, 0, 1, 0, 1, 0], True),
        (Request(prompt, captures=[inner]), [0, 0, 0, 0, 0, 1], False),
        (Request(prompt, captures=[inner], logits=[1, -2]), [0, 1, 0, 0, 1, 0], False),
        (Request(prompt, captures=[Capture("logits", 0)], logits=None), [1, 0, 0, 0, 0, 0], False),
    ]:
        seen.clear()
        skips.clear()
        check(llama.model.run([request])[0], request, llama.oracle)
        assert seen[-1] == outputs
        assert (skips[-1] > 0) == skipped


def _session(t: Tiny) -> Session:
    return next(s for (callback, _), s in t.model._engine.sessions.open.items() if callback)


def test_what_is_skipped_is_not_computed(llama: Tiny, reopen: Any) -> None:
    """The unembedding leaves the memory of the logits as it was."""
    t = reopen(llama)

    def mark(h: np.ndarray) -> np.ndarray:
        with rows_of(logits, write=True) as memory:
            memory[:] = 7
        return h

    for wanted, computed in ((None, False), ("last", True)):
        t.model.run([Request([5, 6], captures=[Capture("final_norm", -1)], logits=wanted)])
        session = _session(t)
        logits = session.variants[0].addrs[session.site(Site("logits")).index]
        edit = Edit("final_norm", mark, tokens=-1)
        t.model.run([Request([5, 6], [edit], [Capture("final_norm", -1)], logits=wanted)])
        assert (read_array(logits) != 7).any() == computed


# -- blocks that need not run -------------------------------------------------------------------


def _last_token(t: Tiny) -> list[Request]:
    prompt = t.prompt()
    sites = [s for s in t.model.topology.sites if s.name not in ("attn_scores", "attn_pattern")]
    edits = [Edit(s, "replace", t.vector(str(s)), tokens=-1) for s in sites]
    return [Request(prompt, [e], [Capture("l_out-2")]) for e in edits]


def _suffix(t: Tiny) -> list[Request]:
    prompt, v = t.prompt(), t.vector()
    edits = [
        Edit(f"resid_post.{i}", "add", v, tokens=[-4, -2], coeff=c)
        for i in (0, 1, 2)
        for c in (1, 3)
    ]
    captures = [Capture(["q.2", "mlp_out.2", "attn_pattern.2", "l_out-1"], tokens=[0, -1, -3])]
    return [Request(prompt, [e], captures, "all") for e in edits] + [Request(prompt, (), captures)]


def _whole_prompts(t: Tiny) -> list[Request]:
    prompts, v = [t.prompt(), t.prompt(seed=8)], t.vector()
    edits = [
        Edit(f"{site}.{i}", "add", v, generated=False, coeff=c)
        for i in range(3)
        for site in ("resid_post", "resid_pre", "mlp_out")
        for c in (0.5, 2)
    ]
    return [Request(p, [e], [Capture("final_norm")]) for e in edits for p in prompts]


def _edited_before(t: Tiny) -> list[Request]:
    prompt, v = t.prompt(), t.vector()
    before = Edit("attn_out.0", "add", v, tokens=3)
    edits = [
        Edit(f"mlp_out.{i}", "replace", v, tokens=-1, coeff=c) for i in range(3) for c in (1, 2)
    ]
    return [Request(prompt, [before, e]) for e in edits] + [Request(prompt, [e]) for e in edits]


def _captured_below(t: Tiny) -> list[Request]:
    prompt, v = t.prompt(), t.vector()
    edits = [Edit("mlp_out.2", "add", v, tokens=-1, coeff=c) for c in range(1, 6)]
    below = ["resid_post.0", "attn_norm.1", "resid_post.1", "v.2", "resid_pre.2"]
    return [Request(prompt, [e], [Capture(s)]) for e, s in zip(edits, below, strict=True)]


@pytest.mark.parametrize(
    "make", [_last_token, _suffix, _whole_prompts, _edited_before, _captured_below]
)
def test_resumed_runs_equal_whole_ones(
    case: Tiny,
    make: Callable[[Tiny], list[Request]],
    roots: list[Segment],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skips = []
    plain = Tracer.expect
    first_end = case.model.topology.sites[Site("resid_post", 0)].index

    def expect(self: Tracer, addrs: Any, wants: Any, skip: Any, on_data: Any) -> None:
        skips.append(sum(i < first_end for i in skip))
        plain(self, addrs, wants, skip, on_data)

    monkeypatch.setattr(Tracer, "expect", expect)
    runners: list[Runner] = []
    close = Runner.close

    def spy_close(self: Runner) -> None:
        runners.append(self)
        close(self)

    monkeypatch.setattr(Runner, "close", spy_close)
    requests = make(case)
    resumed = case.model.run(requests)
    some = [s for s in _segments(roots) if s.first_block]
    assert len(some) >= 3
    assert {s.first_block for s in some} == {1, 2}
    twins = [s.twin for s in some if s.twin is not None]
    assert len(twins) == len(some)
    assert {twin.saved for twin in twins}.isdisjoint(runners[0].buffers)  # let go
    assert max(skips) > 10

    def whole_ones(*args: Any, **options: Any) -> list[Segment]:
        return build(*args, **{**options, "skip_blocks": False})

    monkeypatch.setattr(run, "build", whole_ones)
    skips.clear()
    whole = case.model.run(requests)
    assert not any(skips)
    for request, a, b in zip(requests, resumed, whole, strict=True):
        check_same(a, b)
        check(a, request, case.oracle)


# -- one clean run for every position -----------------------------------------------------------


def _every_position(t: Tiny) -> list[Request]:
    prompt = t.prompt()
    return [
        Request(prompt, [Edit(f"resid_post.{i}", "add", t.vector(seed=9 * i + p), tokens=p)])
        for i in range(3)
        for p in range(len(prompt))
    ]


def _with_all_else(t: Tiny) -> list[Request]:
    """The clean run read at every token, prompts that end or leave within it, some that go on."""
    prompt, other, v = t.prompt(), t.prompt(6, seed=8), t.vector()
    requests = _every_position(t)
    requests.insert(5, Request(prompt, (), [Capture(["l_out", "attn_pattern.1"])], "all"))
    requests += [Request(prompt[:n], n_predict=n % 3, logits="all") for n in (3, 8, 9)]
    for p in (2, 7, 13):
        edit = Edit("mlp_out.1", "replace", v, tokens=p, generated=False)
        requests.append(Request(prompt, [edit], [Capture("q.2", generated=True)], n_predict=3))
        requests += [Request(prompt[:p] + other, [e]) for e in _late_edits(t, p)]
    return requests


def _late_edits(t: Tiny, p: int) -> list[Edit]:
    return [Edit("mlp_out.2", "add", t.vector(seed=c), tokens=[p, -1]) for c in range(4)]


@pytest.mark.parametrize("make", [_every_position, _with_all_else])
def test_one_clean_run_serves_every_position(
    case: Tiny, make: Callable[[Tiny], list[Request]], roots: list[Segment]
) -> None:
    requests = make(case)
    for request, result in zip(requests, case.model.run(requests), strict=True):
        check(result, request, case.oracle)
    resumed = [s for s in _segments(roots) if s.first_block]
    longest = max((s.twin for s in resumed if s.twin), key=lambda twin: len(twin.resumed))
    assert len(longest.resumed) >= 3 * 14 and len(longest.rows) == 14
    assert {s.rows[0].pos for s in longest.resumed} == set(range(14))


def test_the_clean_run_is_one_decode(llama: Tiny, decoded: list[int]) -> None:
    requests = _every_position(llama)
    llama.model.run(requests)  # a graph that is new is decoded twice
    decoded.clear()
    llama.model.run(requests)
    assert decoded[0] == 14
    assert sum(decoded) == 14 + 3 * sum(range(1, 15))


@pytest.mark.parametrize(("n_rows", "n_sequences"), [(6, 1), (6, 2), (20, 20)])
@pytest.mark.parametrize("make", [_every_position, _with_all_else])
def test_few_cells_and_sequences_are_enough_for_every_position(
    llama: Tiny,
    reopen: Any,
    small_cache: None,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Tiny], list[Request]],
    n_rows: int,
    n_sequences: int,
) -> None:
    monkeypatch.setattr(limits, "UBATCH", n_rows)
    monkeypatch.setattr(limits, "MAX_SEQUENCES", n_sequences)
    t = reopen(llama)
    requests = make(t)
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, request, t.oracle)


def test_a_twin_must_spare_what_it_costs() -> None:
    """Nobody asked for the clean run: its missing rows take all nine blocks."""
    prompt, v = list(range(3, 13)), np.ones(4, np.float32)

    def n_resumed(block: int, *places: int) -> int:
        edits = [Edit(f"mlp_out.{block}", "add", v, tokens=p) for p in places]
        jobs = [resolve(i, Request(prompt, [e]), 9) for i, e in enumerate(edits)]
        roots = build(jobs, share=True, skip_blocks=True, n_layer=9, n_ubatch=512)
        return sum(s.first_block > 0 for s in _segments(roots))

    assert n_resumed(3, 2, 2, 2) == 3  # 3 x 3 blocks of eight rows
    assert n_resumed(2, 2, 2, 2) == 0
    assert n_resumed(2, 0, 3, 8) == 3  # 2 blocks of ten, seven and two rows for one more row
    assert n_resumed(2, 0, 8) == 0  # too few


def test_blocks_that_are_skipped_are_off_for_one_decode(llama: Tiny, reopen: Any) -> None:
    """ggml passes over nodes without the flag; all have it again afterwards."""
    t, prompt = reopen(llama), llama.prompt()

    def off() -> set[int]:
        addrs = _session(t).variants[0].addrs
        flags = [Tensor.from_address(a).flags for a in addrs]
        return {i for i, f in enumerate(flags) if not f & FLAG_COMPUTE}

    seen = []

    def look(h: np.ndarray) -> np.ndarray:
        seen.append(off())
        return h

    t.model.run([Request(prompt, captures=[Capture("l_out")])])
    topology = _session(t).topology
    requests = [Request(prompt, [Edit(f"mlp_out.{i}", look, tokens=-1)]) for i in (2, 2, 1, 2)]
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, Request(request.tokens), t.oracle)
    # one batch, from the lowest block that any of it needs: block 1's edit, then the three of block 2
    assert seen == [set(topology.skippable_below(1))] * 4
    assert off() == set()


def _roots_of(t: Tiny, requests: list[Request], n_ubatch: int = 512) -> list[Segment]:
    jobs = [resolve(i, r, t.oracle.n_layer) for i, r in enumerate(requests)]
    return build(jobs, share=True, skip_blocks=True, n_layer=t.oracle.n_layer, n_ubatch=n_ubatch)


def test_what_cannot_resume_does_not(llama: Tiny) -> None:
    prompt, v = llama.prompt(), llama.vector()

    def resumes(edits: list[Edit], n_ubatch: int = 512, **options: Any) -> list[int]:
        requests = [Request(prompt, [e], **options) for e in edits]
        return sorted(
            s.first_block for s in _segments(_roots_of(llama, requests, n_ubatch)) if s.first_block
        )

    at_last = [Edit("mlp_out.2", "add", v, tokens=-1, coeff=c) for c in (1, 2, 3)]
    whole = [Edit("mlp_out.2", "add", v, coeff=c) for c in (1, 2, 3)]
    assert resumes(at_last) == [2, 2, 2]
    assert resumes(at_last, captures=[Capture("q.1")]) == [1, 1, 1]
    assert resumes(at_last[:2]) == []  # a twin would cost what it saves
    assert resumes(at_last, n_predict=1) == []  # what is generated reads the keys of all blocks
    assert resumes([Edit("mlp_out.0", "add", v, tokens=-1) for _ in range(3)]) == []
    assert resumes(whole) == [2, 2, 2]
    assert resumes(whole, n_ubatch=13) == []  # not in one batch
    edits = [Edit("mlp_out.2", "add", v, tokens=11, generated=False, coeff=c) for c in (1, 2, 3)]
    forks = [Request([*prompt, end], [e]) for e in edits for end in (5, 6)]
    assert not [s for s in _segments(_roots_of(llama, forks)) if s.first_block]  # keys are read on
    clean = _segments(_roots_of(llama, [Request(prompt), Request(prompt, at_last[:1])]))
    assert [s.first_block for s in clean if s.first_block] == [2]  # a twin there is already


def test_an_edit_is_the_same_at_all_tokens_but_where_its_value_has_rows() -> None:
    rows = Edit("l_out-0", "add", np.ones((4, 2)), tokens=[0, 1, 2, 3])
    job = resolve(0, Request([5] * 4, [Edit("l_out-0", "zero"), rows]), 2)
    first, second = zip(*(job.edits_at[p] for p in range(4)), strict=True)
    assert len({id(e) for e in first}) == 1 and first[0] == (0, job.request.edits[0], 0)
    assert [e.value_row for e in second] == [0, 1, 2, 3]
