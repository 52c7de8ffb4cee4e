"""Graphs that come unexpected, and Ctrl-C while one is computed."""

import signal
from typing import Any

import pytest
from reference import check, check_same
from tiny import Tiny

from mia.edits import Edit
from mia.engine.session import Session, Variant
from mia.engine.visits import Visits
from mia.errors import EngineError
from mia.llama import (
    Tracer,
    tracer,
)
from mia.request import Capture, Request


def _spoil(session: Session, how: str, other: Session) -> None:
    first = session.variants[0]
    addrs = first.addrs
    wrong = {
        "first": [addrs[0] + 8, *addrs[1:]],
        "middle": [*addrs[: len(addrs) // 2], 8, *addrs[len(addrs) // 2 + 1 :]],
        "last": [*addrs[:-1], 8],
        "longer": [*addrs, 8, 16],
        "turned": addrs[7:] + addrs[:7],
    }
    if how == "another model's":
        session.variants[:] = list(other.variants)
    elif how == "many":
        session.variants[:] = [Variant([i, *addrs], first.topology) for i in range(8)]
    else:
        session.variants[:] = [Variant(wrong[how], first.topology)]


@pytest.mark.parametrize(
    "how",
    ["first", "middle", "last", "longer", "turned", "another model's", "many"],
)
def test_the_tracer_learns_a_graph_that_it_did_not_expect(
    llama: Tiny, tiny: Any, reopen: Any, how: str
) -> None:
    t, other = reopen(llama), reopen(tiny("gpt2"))
    assert other.model.topology
    v = t.vector()
    edits = [[], [Edit("resid_mid.1", "add", v)], [Edit("mlp_out.2", "add", v, tokens=-1)]]
    requests = [
        Request(
            t.prompt(), e, [Capture(["l_out", "q.1", "attn_pattern"], generated=True)], n_predict=3
        )
        for e in edits
    ]
    t.model.run(requests[:1])
    (session,) = t.model._engine.sessions.open.values()
    _spoil(session, how, *other.model._engine.sessions.open.values())
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, request, t.oracle)
    assert len(session.variants) <= 8
    _spoil(session, how, *other.model._engine.sessions.open.values())
    for request in requests:
        check(t.model.run([request])[0], request, t.oracle)


def test_a_graph_that_never_comes_back_is_given_up(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    request = Request(t.prompt(), captures=[Capture("l_out")])
    want = t.model.run([request])[0]

    def forget(self: Session, n_tokens: int) -> None:
        first = self.variants[0]
        self.variants = [Variant([0, *first.addrs[1:]], first.topology)]

    with monkeypatch.context() as m:
        m.setattr(Session, "learn", forget)
        (session,) = t.model._engine.sessions.open.values()
        session.learn(2)
        with pytest.raises(
            EngineError, match="builds another graph each time; mia cannot follow it"
        ):
            t.model.run([request])
    check_same(t.model.run([request])[0], want)


def test_known_graphs_are_few(llama: Tiny) -> None:
    """Batches of any size, with and without outputs, come as a handful of graphs."""
    for n in (1, 2, 3, 9, 40):
        for logits in (None, "last", "all"):
            llama.model.run(
                [Request(llama.prompt(n), captures=[Capture("l_out-1")], logits=logits)]
            )
    for (callback, _), session in llama.model._engine.sessions.open.items():
        if callback:
            assert len({id(v.topology) for v in session.variants}) <= 2


def test_ctrl_c_between_two_nodes_is_not_lost(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no Python frame to raise it in: ctypes would print it and go on."""

    class Requested(dict[int, Any]):
        def __contains__(self, i: object) -> bool:
            if i == 20:
                signal.raise_signal(signal.SIGINT)
            return super().__contains__(i)

    monkeypatch.setattr(tracer, "native_watch", lambda: None)
    t = reopen(llama)
    request = Request(t.prompt(), captures=[Capture("l_out")])
    plain = Tracer.expect
    with monkeypatch.context() as m:
        m.setattr(
            Tracer, "expect", lambda self, a, nodes, *rest: plain(self, a, Requested(nodes), *rest)
        )
        with pytest.raises(KeyboardInterrupt):
            t.model.run([request])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check(t.model.run([request])[0], request, t.oracle)


def test_ctrl_c_at_a_node_is_not_lost(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [Edit("l_out-1", "scale", coeff=0.5)]  # an edit is what Python is called for
    request = Request(llama.prompt(), edits, [Capture("l_out")])
    plain = Visits.visit

    def visit(self: Visits, i: int, addr: int) -> None:
        signal.raise_signal(signal.SIGINT)
        plain(self, i, addr)

    with monkeypatch.context() as m:
        m.setattr(Visits, "visit", visit)
        with pytest.raises(KeyboardInterrupt):
            llama.model.run([request])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check(llama.model.run([request])[0], request, llama.oracle)


def test_graphs_with_and_without_outputs_are_both_remembered(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp keeps one of each; going from one to the other is no surprise."""
    tokens = llama.prompt(7)
    silent = Request(tokens, captures=[Capture("l_out-0")], logits=None)
    spoken = Request(tokens, captures=[Capture("l_out-0")])
    for request in (silent, spoken):
        llama.model.run([request])
    surprises: list[int] = []
    monkeypatch.setattr(Session, "learn", lambda self: surprises.append(1))
    for request in (silent, spoken, silent, spoken):
        llama.model.run([request])
    assert not surprises
