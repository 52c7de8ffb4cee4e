"""Nothing is computed above the last node that somebody reads, and what is computed stays the same."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from reference import check
from tiny import Tiny

from mia.edits import Edit
from mia.engine import decode, limits
from mia.engine.batch import Batch
from mia.engine.graph import Topology
from mia.engine.jobs import resolve
from mia.engine.needs import not_read
from mia.engine.plan import build
from mia.engine.segments import Segment, walk
from mia.llama import Tracer
from mia.request import Capture, Request, Result
from mia.sites import Site


def _everything(batch: Batch, topology: Topology, visited: Iterable[int]) -> list[int]:
    return []


def _identical(a: Result, b: Result) -> None:
    assert a.tokens == b.tokens and list(a.captures) == list(b.captures)
    for site, rows in a.captures.items():
        np.testing.assert_array_equal(rows, b.captures[site], err_msg=str(site))
    assert (a.logits is None) == (b.logits is None)
    if a.logits is not None:
        np.testing.assert_array_equal(a.logits, b.logits)


def _forest(t: Tiny, rng: np.random.Generator) -> list[Request]:
    """Prompts that share beginnings, each read somewhere; few of them to the end."""
    stems = [rng.integers(3, 320, 6).tolist() for _ in range(2)]
    sites = [s for s in t.model.topology.sites if s.name != "logits"]
    requests = []
    for _ in range(rng.integers(2, 14)):
        stem = stems[rng.integers(2)]
        tokens = stem[: rng.integers(1, 7)] + rng.integers(3, 6, rng.integers(4)).tolist()
        captures = [
            Capture(sites[rng.integers(len(sites))], [None, -1, 0][rng.integers(3)])
            for _ in range(rng.integers(3))
        ]
        edits = []
        if rng.random() < 0.5:
            i = int(rng.integers(3))
            vector = t.vector(seed=int(rng.integers(3)))
            edits = [Edit(f"resid_post.{i}", "add", vector, tokens=-1, generated=False)]
        spoken = rng.random() < 0.15
        requests.append(
            Request(
                tokens,
                edits,
                captures,
                logits="last" if spoken and rng.random() < 0.5 else None,
                n_predict=3 if spoken else 0,
                stop_at_eog=False,
            )
        )
    return requests


@pytest.mark.parametrize("ubatch", [4, 512])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_read_is_the_same_to_the_last_bit(
    tiny: Callable[[str], Tiny],
    reopen: Any,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    ubatch: int,
) -> None:
    of = tiny(["llama", "gemma2-window", "gpt2", "mixtral", "qwen2"][seed % 5])
    requests = _forest(of, np.random.default_rng(seed))
    monkeypatch.setattr(limits, "UBATCH", ubatch)
    monkeypatch.setattr(limits, "MAX_SEQUENCES", min(ubatch, 256))
    t = reopen(of)
    left_out: list[int] = []

    def spy(batch: Batch, topology: Topology, visited: Iterable[int]) -> list[int]:
        left_out.append(len(not_read(batch, topology, visited)))
        return not_read(batch, topology, visited)

    monkeypatch.setattr(decode, "not_read", spy)
    early = t.model.run(requests)
    monkeypatch.setattr(decode, "not_read", _everything)
    whole = t.model.run(requests)
    monkeypatch.undo()
    after = t.model.run([Request(of.prompt(), logits="all")])[0]
    for a, b in zip(early, whole, strict=True):
        _identical(a, b)
    check(after, Request(of.prompt(), logits="all"), t.oracle)
    assert max(left_out, default=1)  # with no site at all there is no callback


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["resid_post", "head_out", "k", "attn_norm"])
def test_nothing_above_the_last_node_read_is_computed(
    case: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, layer: int
) -> None:
    skips: list[list[int]] = []
    plain = Tracer.expect

    def expect(self: Tracer, addrs: Any, visits: Any, skip: Any, on_data: Any) -> None:
        skips.append(list(skip))
        plain(self, addrs, visits, skip, on_data)

    monkeypatch.setattr(Tracer, "expect", expect)
    topology = case.model.topology
    site = Site(name, layer)
    request = Request(case.prompt(), captures=[Capture(site, tokens=-1)], logits=None)
    check(case.model.run([request])[0], request, case.oracle)
    last = topology.sites[site].index
    assert skips[-1] == list(range(last + 1, len(topology.nodes)))


def test_the_keys_that_others_attend_to_are_stored(
    llama: Tiny, reopen: Any, decoded: list[int]
) -> None:
    """A trunk that is read low, its children higher, in a cache that has nothing of them yet."""
    t, prompt = reopen(llama), llama.prompt(12)
    requests = [
        Request(prompt[:8], captures=[Capture("resid_post.0")], logits=None),
        Request(prompt, captures=[Capture("attn_pattern.1", -1)], logits=None),
        Request([*prompt[:8], 5, 6], captures=[Capture("resid_post.2", -1)], logits=None),
    ]
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, request, t.oracle)
    assert sum(decoded[-2:]) == 14


def _segments(t: Tiny, requests: list[Request]) -> list[Segment]:
    jobs = [resolve(i, r, 3) for i, r in enumerate(requests)]
    return list(walk(build(jobs, share=True, skip_blocks=True, n_layer=3, n_ubatch=512)))


def test_how_many_blocks_a_segment_needs(llama: Tiny) -> None:
    prompt, v = llama.prompt(), llama.vector()

    def needed(*requests: Request) -> list[int]:
        return [s.n_blocks for s in _segments(llama, list(requests))]

    for site, n in {"embed": 0, "q.0": 1, "l_out-1": 2, "final_norm": 3, "logits": 3}.items():
        assert needed(Request(prompt, captures=[Capture(site, 2)], logits=None)) == [n]
    assert needed(Request(prompt, logits=None)) == [0]
    assert needed(Request(prompt)) == needed(Request(prompt, logits=None, n_predict=1)) == [3]
    assert needed(Request(prompt, [Edit("mlp_out.1", "add", v)], logits=None)) == [2]
    low, high = (Capture(f"l_out-{i}", -1) for i in (0, 1))
    fork = [Request([*prompt, i], captures=[c], logits=None) for i, c in ((5, low), (6, high))]
    assert sorted(needed(*fork)) == [1, 2, 2]  # the trunk needs what the higher one needs
    edits = [Edit("mlp_out.1", "add", v, tokens=-1, coeff=c) for c in (1, 2, 3)]
    sweep = _segments(llama, [Request(prompt, [e]) for e in edits])
    # of their unedited twin the residuals at the end of block 0 are read, and nothing else
    assert sorted(s.n_blocks for s in sweep) == [1, 3, 3, 3, 3]


def test_a_state_is_brought_up_to_date_in_every_block(tiny: Callable[[str], Tiny]) -> None:
    assert tiny("mamba").model.topology.keeps_state
    for name in ("llama", "gemma2-window", "gpt2", "mixtral"):
        topology = tiny(name).model.topology
        assert not topology.keeps_state
        stores = [topology.last_store(n) for n in range(4)]
        assert stores[0] == -1 and stores == sorted(set(stores))
        for n in (1, 2, 3):
            last = topology.nodes[stores[n]]
            assert last.op == "SET_ROWS" and f"_l{n - 1}" in last.name


def test_the_rest_of_a_segment_attends_to_what_its_first_batch_stored(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    """No segment comes after it, and nothing is read of its first rows."""
    monkeypatch.setattr(limits, "UBATCH", 4)
    monkeypatch.setattr(limits, "MAX_SEQUENCES", 4)
    t = reopen(llama)
    prompt = t.prompt(9)
    last = Capture("resid_post.2", -1)
    for ended in (Request(prompt, captures=[last], logits=None), Request(prompt, captures=[last])):
        (result,) = t.model.run([ended])
        assert decoded[-3:] == [4, 4, 1]
        check(result, ended, t.oracle)
