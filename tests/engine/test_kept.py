"""Captures at the ends of blocks that are read behind the decode: the same numbers, without a stop."""

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.engine import limits
from mia.engine.graph import Topology
from mia.engine.session import Session, _lasting
from mia.llama import Context, LlamaModel, Node, Tracer
from mia.request import Capture, Request, Result
from mia.sites import parse_many

NEVER = 1 << 60
ENDS = ["resid_post", "resid_pre", "final_norm"]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """For each decode the nodes at which the graph was to stop."""
    nodes: list[set[int]] = []
    plain = Tracer.expect

    def expect(self: Tracer, addrs: Any, requested: Collection[int], *rest: Any) -> None:
        nodes.append(set(requested))
        plain(self, addrs, requested, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Tracer, "expect", expect)
    return nodes


def _requests(t: Tiny) -> list[Request]:
    """Edits at the ends themselves, beside them, at none; sweeps that skip blocks; generation."""
    v, prompt = t.vector(), t.prompt(9)
    edits: list[list[Edit]] = [
        [],
        [Edit("resid_post.0", "add", v)],
        [Edit("resid_pre.1", "scale", coeff=0.5, tokens=-1), Edit("resid_post.0", "add", v)],
        [Edit("attn_out.1", "zero"), Edit("resid_post.1", np.abs, tokens=[2, 3])],
        [Edit("final_norm", "add", v, tokens=-1)],
        *([Edit("mlp_out.2", "add", v, tokens=-1, coeff=float(c))] for c in range(4)),
    ]
    reads = [Capture([*ENDS, "q.1"], generated=True), Capture("resid_post.1", tokens=[-1, 0])]
    long = [Request(prompt, e, reads, logits="all", n_predict=5, stop_at_eog=False) for e in edits]
    return [*long, *(Request(prompt, e, reads) for e in edits)]


def _session(t: Tiny) -> Session:
    return next(s for s in t.model._engine.sessions.open.values() if s.context.tracer is not None)


def _equal(a: list[Result], b: list[Result]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.tokens == y.tokens and x.captures.keys() == y.captures.keys()
        for site in x.captures:
            np.testing.assert_array_equal(x.captures[site], y.captures[site], err_msg=str(site))
        np.testing.assert_array_equal(x.logits, y.logits)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_kept_inputs_are_what_a_stop_would_show(
    tiny: Callable[[str], Tiny],
    reopen: Any,
    monkeypatch: pytest.MonkeyPatch,
    stopped: list[set[int]],
    name: str,
    together: bool,
) -> None:
    t = tiny(name)
    results: list[list[Result]] = []
    for after in (NEVER, 1):
        monkeypatch.setattr(limits, "KEPT_STOPS", after)
        mine = reopen(t)
        stopped.clear()
        requests = _requests(mine)
        runs = [requests] if together else [[r] for r in requests]
        results.append([result for run in runs for result in mine.model.run(run)])
        kept = _session(mine).kept.blocks
        assert kept == (set(range(t.model.n_layer)) if after == 1 else set())
    _equal(*results)


def test_the_graph_stops_only_where_it_must(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, stopped: list[set[int]]
) -> None:
    monkeypatch.setattr(limits, "KEPT_STOPS", 1)
    t = reopen(llama)
    n = t.model.n_layer
    read = Capture(["embed", "resid_pre", "resid_post", "final_norm", "logits"], generated=True)
    request = Request(t.prompt(5), [], [read], n_predict=4, stop_at_eog=False)
    t.model.run([request])
    nodes = t.model.topology.sites
    (last,) = parse_many(f"resid_post.{n - 1}", n)
    assert stopped[-1] == {nodes[last].index}  # no block has it as its input
    edit = Edit("resid_post.0", "add", t.vector())
    t.model.run([Request(t.prompt(5), [edit], [read], n_predict=4, stop_at_eog=False)])
    (edited,) = parse_many("resid_post.0", n)
    assert stopped[-1] == {nodes[edited].index, nodes[last].index}


def test_architectures_that_do_not_name_them_stop(
    case: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "KEPT_STOPS", 1)
    if case.name.startswith("llama"):
        pytest.skip("llama names them")
    monkeypatch.setattr("mia.llama.child.run", lambda *a, **k: pytest.fail("a child was started"))
    t = reopen(case)
    request = Request(t.prompt(5), captures=[Capture("resid_post", generated=True)], n_predict=3)
    t.model.run([request])
    t.model.run([request])
    assert _session(t).kept.blocks == set()


def test_they_are_kept_once_it_pays(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    plain = Context.keep_inputs

    def keep(self: Context, blocks: Collection[int], **trust: bool) -> bool:
        asked.append(sorted(blocks))
        return plain(self, blocks, **trust)

    monkeypatch.setattr(Context, "keep_inputs", keep)
    monkeypatch.setattr(limits, "KEPT_STOPS", 20)
    t = reopen(llama)

    def run(site: str, n_predict: int, n: int = 1) -> None:
        read = Capture(site, generated=True)
        request = Request(t.prompt(5), [], [read], n_predict=n_predict, stop_at_eog=False)
        t.model.run([request] * n)

    for _ in range(4):  # 5 stops each time: the prompt, and four tokens that are fed back
        assert asked == []
        run("resid_post.0", 5)
    assert asked == [[1]]
    run("resid_post.0", 50)
    run("resid_post.2", 50)  # the last block's
    assert asked == [[1]]
    run("resid_post.1", 50)
    assert asked == [[1], [2]]
    run("resid_post", 50, 2)  # a context with more sequences takes its place
    assert asked == [[1], [2], [1, 2]]
    assert _session(t).kept.blocks == {1, 2}


def test_not_where_they_take_too_much(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "KEPT_STOPS", 1)
    monkeypatch.setattr(limits, "KEPT_BYTES", 1 << 10)
    monkeypatch.setattr(Context, "keep_inputs", lambda *_, **__: pytest.fail("kept"))
    t = reopen(llama)
    request = Request(t.prompt(5), captures=[Capture("resid_post", generated=True)], n_predict=3)
    t.model.run([request])
    assert _session(t).kept.blocks == set()


def test_a_model_that_cannot_keep_them_is_asked_once(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[LlamaModel] = []

    def never(model: LlamaModel) -> bool:
        asked.append(model)
        return False

    monkeypatch.setattr(limits, "KEPT_STOPS", 1)
    monkeypatch.setattr("mia.llama.context.can_keep_inputs", never)
    t = reopen(llama)
    request = Request(t.prompt(5), captures=[Capture("resid_post", generated=True)], n_predict=3)
    for _ in range(3):
        t.model.run([request])
    assert len(asked) == 1


def test_graphs_are_looked_at_anew_at_the_same_addresses(llama: Tiny, reopen: Any) -> None:
    """What the tracer expected last must not pass for what it has seen."""
    t = reopen(llama)
    request = Request(t.prompt(5), captures=[Capture("resid_post")])
    (want,) = t.model.run([request])
    captures = {site: rows.copy() for site, rows in want.captures.items()}
    session = _session(t)
    for _ in range(3):
        session._scout()
        assert all(len(v.addrs) == len(v.topology.nodes) for v in session.variants)
    _equal([want], t.model.run([request]))
    for site, rows in captures.items():  # nor is anything written to what has been given out
        np.testing.assert_array_equal(want.captures[site], rows)


def _ends(t: Tiny) -> Request:
    read = Capture(["resid_post.0", "resid_post.1"], generated=True)
    return Request(t.prompt(5), [], [read], n_predict=5, stop_at_eog=False)


def test_a_session_that_has_grown_stops_no_more(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, stopped: list[set[int]]
) -> None:
    """Its new graphs may lie where the old ones lay."""
    monkeypatch.setattr(limits, "KEPT_STOPS", 12)
    t = reopen(llama)
    for _ in range(3):
        (want,) = t.model.run([_ends(t)])
    session = _session(t)
    assert session.kept.blocks == {1, 2}
    assert stopped[-1] == set()
    assert all(v.addrs for v in session.variants)
    _equal([want], t.model.run([_ends(t)]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_session_that_could_not_grow_is_given_up(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    t = reopen(llama)
    (want,) = t.model.run([_ends(t)])
    monkeypatch.setattr(limits, "KEPT_STOPS", 1)
    with monkeypatch.context() as m:

        def scout(self: Session) -> None:
            raise error

        m.setattr(Session, "_scout", scout)
        with pytest.raises(error):
            t.model.run([_ends(t)])
    assert not any(callback for callback, _ in t.model._engine.sessions.open)
    for _ in range(2):
        _equal([want], t.model.run([_ends(t)]))


def test_outputs_that_others_look_at_do_not_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(addr: int, view_src: int = 0) -> Node:
        return Node(addr, f"n{addr}", "ADD", "f32", (4, 1), (4, 16), (), view_src, b"")

    nodes = [node(1), node(2), node(3, view_src=2), node(4)]
    topology = cast(Topology, SimpleNamespace(nodes=nodes))
    # seen again at other addresses, of which the last is no output
    monkeypatch.setattr("mia.engine.session.is_output", lambda addr: addr != 14)
    assert _lasting([11, 12, 13, 14], topology) == {0}
