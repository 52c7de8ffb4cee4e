"""A run that decodes nothing counts what the real one decodes; results are told as they come."""

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.engine.batch import Batch
from mia.engine.decode import Decoder
from mia.engine.dry import counted
from mia.errors import UsageError
from mia.request import Capture, LogitDifference, Request


def patches(case: Tiny, n: int) -> list[Request]:
    tokens, n_embd = case.prompt(6, seed=3), case.model.n_embd
    rows = np.zeros((n, n_embd), np.float32)
    return [
        Request(
            tokens,
            [Edit(f"resid_post.{i % case.model.n_layer}", "replace", rows[i], tokens=[i % 6])],
            [Capture("mlp_out.1", [-1])] if i % 4 == 0 else [],
            metric=LogitDifference(5, 6) if i % 2 else None,
        )
        for i in range(n)
    ]


def test_the_count_is_that_of_the_real_run(case: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [*patches(case, 30), Request(case.prompt(6, seed=3)), Request(case.prompt(9))]
    with counted() as count:
        nothing = case.model.run(requests)
    decoded: list[tuple[int, int, int]] = []
    decode = Decoder.decode

    def spy(self: Decoder, batch: Batch) -> None:
        decoded.append((len(batch.rows), len(set(batch.sequences)), batch.first_block))
        decode(self, batch)

    monkeypatch.setattr(Decoder, "decode", spy)
    real = case.model.run(requests)
    assert [(d.rows, d.sequences, d.first_block) for d in count.decodes] == decoded
    assert count.requests == 32 and count.alone == 31 * 6 + 9
    assert count.rows == sum(n for n, _, _ in decoded) < count.alone
    assert count.block_rows == sum(n * (case.model.n_layer - b) for n, _, b in decoded)
    for a, b in zip(nothing, real, strict=True):
        assert (a.value is None) == (b.value is None) and not a.value
        assert (a.logits is None) == (b.logits is None)
        assert {s: x.shape for s, x in a.captures.items()} == {
            s: x.shape for s, x in b.captures.items()
        }
    with counted() as nothing_yet:
        assert case.model.run([Request(case.prompt(4), n_predict=8)])[0].tokens == []
    assert nothing_yet.rows == 4
    assert case.model.run([Request(case.prompt(4), n_predict=2)])[0].tokens  # runs again


def test_each_result_is_told_once_as_it_comes(case: Tiny) -> None:
    requests = patches(case, 12)
    told, done = dict[int, object](), list[int]()

    def hear(i: int, result: object) -> None:
        assert i not in told
        told[i] = result

    results = case.model.run(
        requests, on_result=hear, progress=lambda n, _: done.append(n - len(told))
    )
    assert [told[i] for i in range(12)] == results and done == [0] * 12


def test_who_is_told_may_end_the_run(llama: Tiny) -> None:
    def refuse(i: int, result: object) -> None:
        raise UsageError(f"no {i}")

    # an edit that nothing is read behind: such requests are run again by themselves after an error
    unseen = Request(llama.prompt(4), [Edit("resid_post.1", "zero", tokens=[0])], logits=None)
    with pytest.raises(UsageError, match="no "):
        llama.model.run([*patches(llama, 4), unseen], on_result=refuse)
