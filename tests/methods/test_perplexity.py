"""Perplexity against the oracle: windows and edits."""

from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.errors import UsageError
from mia.methods import perplexity as method
from mia.methods.changes import Changes
from mia.methods.perplexity import measure, perplexity
from mia.notices import MiaWarning


def losses(t: Tiny, tokens: list[int], edits: dict[str, Any] | None = None) -> np.ndarray:
    x = t.oracle.run(tokens, edits)["logits"][:-1]
    logp = x - x.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return -logp[np.arange(len(x)), tokens[1:]]


def test_every_token_but_the_first_is_scored(case: Tiny) -> None:
    ids = case.prompt(40)
    got = perplexity(case.model, ids)
    np.testing.assert_allclose(got.nll, losses(case, ids), atol=1e-4)
    assert got.value == pytest.approx(np.exp(losses(case, ids).mean()), rel=1e-4)


@pytest.mark.parametrize("bos", [False, True])
def test_windows_do_not_overlap_and_begin_alike(
    llama: Tiny, bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "_BLOCK", 4)  # logits come in blocks within a window
    body = llama.prompt(37)
    ids = [llama.model.bos_token, *body] if bos else body
    got = perplexity(llama.model, ids, window=10)
    size = 9 if bos else 10
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    windows = [[llama.model.bos_token, *p] if bos else p for p in parts]
    want = np.concatenate([losses(llama, w) for w in windows if len(w) > 1])
    np.testing.assert_allclose(got.nll, want, atol=1e-4)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 9])
def test_a_stride_scores_the_last_tokens_of_windows_that_overlap(
    llama: Tiny, bos: bool, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "_BLOCK", 4)
    body = llama.prompt(37)
    head = [llama.model.bos_token] if bos else []
    got = perplexity(llama.model, head + body, window=10, stride=stride)
    room = 10 - len(head)
    want, reached = [losses(llama, head + body[:room])], room
    for start in range(stride, len(body), stride):
        end = min(start + room, len(body))
        if end > reached:
            want.append(losses(llama, head + body[start:end])[reached - end :])
            reached = end
    np.testing.assert_allclose(got.nll, np.concatenate(want), atol=1e-4)
    assert len(got.nll) == len(head + body) - 1 and got.n_windows == len(want)


def test_a_window_is_no_longer_than_the_context(llama: Tiny) -> None:
    ids = llama.prompt(300)
    got = perplexity(llama.model, ids, window=9999)
    assert got.window == llama.model.n_ctx == 256 and got.n_windows == 2
    assert len(got.nll) == 298
    assert perplexity(llama.model, ids[:9], window=8).window == 8
    for stride in (0, 11):
        with pytest.raises(UsageError, match=f"a stride of {stride} is out of range; .* 1 to 10"):
            perplexity(llama.model, ids, window=10, stride=stride)


@pytest.mark.parametrize("tokens", [None, [0, 3]])
def test_edits_act_in_every_window_or_at_tokens_of_the_only_one(
    llama: Tiny, tokens: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "_BLOCK", 4)
    ids, v = llama.prompt(24), llama.vector("resid_post.1")
    edits = [Edit("resid_post.1", "add", v, tokens)]
    if tokens is not None:
        with pytest.raises(UsageError, match="24 tokens are 2 windows of up to 12"):
            perplexity(llama.model, ids, edits=edits, window=12)
        ids = ids[:12]
    got = perplexity(llama.model, ids, edits=edits, window=12)

    def add(x: np.ndarray) -> np.ndarray:
        x[slice(None) if tokens is None else tokens] += v
        return x

    want = np.concatenate(
        [losses(llama, w, {"resid_post.1": add}) for w in (ids[:12], ids[12:]) if w]
    )
    np.testing.assert_allclose(got.nll, want, atol=1e-4)


def test_too_little_text(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="needs two tokens; there are 1"):
        perplexity(llama.model, [5])


def test_a_report_has_the_text_plain_and_changed(llama: Tiny) -> None:
    ids = llama.prompt(30)
    report = measure(llama.model, ids, Changes(ablate="1.2"), window=20)
    plain = perplexity(llama.model, ids, window=20)
    edits = Changes(ablate="1.2").edits(llama.model, ids)
    changed = perplexity(llama.model, ids, window=20, edits=edits)
    document = report.document()
    assert document["perplexity"] == pytest.approx(plain.value, abs=1e-6)
    assert document["changed"] == pytest.approx(changed.value, abs=1e-6)
    assert report.ratio == pytest.approx(changed.value / plain.value)
    assert (document["n_tokens"], document["n_scored"], document["n_windows"]) == (30, 28, 2)
    assert [r["nll_changed"] for r in report.rows()] == pytest.approx(changed.nll.tolist())
    only = measure(llama.model, ids)
    assert only.changed is None and "ratio" not in only.document()
    assert list(only.rows()[0]) == ["nll"]
    with pytest.warns(MiaWarning, match="window reduced to the context size, 256"):
        measure(llama.model, ids, window=9999)
