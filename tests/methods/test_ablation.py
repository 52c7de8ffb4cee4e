"""Ablations of heads against the oracle, alone and many at once."""

from typing import Any

import numpy as np
import pytest
from one_prompt import Function, log_prob
from reference import check_edits
from tiny import Tiny

from mia.errors import RangeError, UsageError
from mia.methods import ablation
from mia.methods.ablation import ablate
from mia.methods.changes import Changes
from mia.methods.head_ablation import _draw, head_edits, head_outputs, pattern_edits
from mia.ranges import Head, other_heads
from mia.request import Request

TOLERANCE = 1e-4


def _heads(t: Tiny, heads: list[int], value: Any) -> Function:
    """Puts a value (…, len(heads), head_dim) at heads of head_out."""

    def put(z: np.ndarray) -> np.ndarray:
        by_head = z.reshape(len(z), t.oracle.n_head, -1)
        by_head[:, heads] = value
        return by_head.reshape(z.shape)

    return put


# -- edits ------------------------------------------------------------------------------


def test_zero(case: Tiny) -> None:
    chosen = [Head(0, 1), Head(0, 3), Head(2, 0)]
    truth = {"head_out.0": _heads(case, [1, 3], 0), "head_out.2": _heads(case, [0], 0)}
    check_edits(case, case.prompt(), head_edits(case.model, chosen), truth)


def test_zero_at_the_pattern_is_zero_at_the_head(case: Tiny) -> None:
    chosen = [Head(0, 1), Head(0, 3), Head(2, 0)]
    truth = {"head_out.0": _heads(case, [1, 3], 0), "head_out.2": _heads(case, [0], 0)}
    check_edits(case, case.prompt(), pattern_edits(chosen), truth)


def test_one_head_is_kept(llama: Tiny) -> None:
    others = other_heads([Head(1, 2)], llama.model.n_head)
    assert others == [Head(1, h) for h in (0, 1, 3, 4, 5)]
    truth = {"head_out.1": _heads(llama, [0, 1, 3, 4, 5], 0)}
    check_edits(llama, llama.prompt(), head_edits(llama.model, others), truth)


def test_mean_over_other_prompts(case: Tiny) -> None:
    source = head_outputs(case.model, case.prompt(9, seed=5), [1])
    edits = head_edits(case.model, [Head(1, 1), Head(1, 2)], how="mean", source=source)
    theirs = case.oracle.run(case.prompt(9, seed=5))["head_out.1"]
    mean = theirs.reshape(9, case.oracle.n_head, -1)[:, [1, 2]].mean(0)
    check_edits(case, case.prompt(), edits, {"head_out.1": _heads(case, [1, 2], mean)})


def test_resampling_gives_no_token_its_own(case: Tiny) -> None:
    tokens = case.prompt()
    source = head_outputs(case.model, tokens, [1])
    edits = head_edits(
        case.model,
        [Head(1, 2)],
        how="resample",
        source=source,
        n_tokens=len(tokens),
        rng=np.random.default_rng(0),
    )
    drawn = _draw(len(tokens), len(tokens), np.random.default_rng(0))
    assert sorted(drawn) == list(range(len(tokens)))
    assert all(i != d for i, d in enumerate(drawn))
    own = case.oracle.run(tokens)["head_out.1"].reshape(len(tokens), case.oracle.n_head, -1)
    check_edits(case, tokens, edits, {"head_out.1": _heads(case, [2], own[drawn][:, [2]])})


def test_resampling_goes_on_while_generating(llama: Tiny) -> None:
    tokens = llama.prompt(5)
    source = head_outputs(llama.model, tokens, [0])
    edits = head_edits(
        llama.model,
        [Head(0, 0)],
        how="resample",
        source=source,
        n_tokens=5,
        rng=np.random.default_rng(1),
    )
    assert [e.on_generated for e in edits] == [False, True]
    assert edits[1].positions(5) == []
    row = np.asarray(edits[1].value)
    assert any(np.array_equal(row, r[:8]) for r in source[0])
    assert len(llama.model.run([Request(tokens, edits, logits=None, n_predict=3)])[0].tokens) >= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"how": "shuffle"}, "unknown way to ablate 'shuffle'; known: zero, mean, resample"),
        ({"how": "mean"}, "mean ablation needs outputs of the heads of layer 0"),
        (
            {"how": "mean", "source": {0: np.zeros((2, 3))}},
            "has rows of 48 here, got shape (2, 3)",
        ),
        ({"how": "resample"}, "resampling needs a random generator"),
    ],
)
def test_what_an_ablation_needs_is_said(llama: Tiny, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        head_edits(llama.model, [Head(0, 1)], **more)
    assert message in str(caught.value)


# -- every head in turn --------------------------------------------------------------------


def _logprob(logits: np.ndarray, answer: list[int]) -> float:
    rows = logits[-len(answer) :]
    return sum(log_prob(row, token) for row, token in zip(rows, answer, strict=True))


@pytest.mark.parametrize("answer", [[30], [30, 41, 7]])
def test_sweep_agrees_with_one_by_one_in_the_oracle(case: Tiny, answer: list[int]) -> None:
    tokens, o = case.prompt(10), case.oracle
    whole = [*tokens, *answer[:-1]]
    sweep = ablation.head_sweep(case.model, tokens, answer)
    assert abs(sweep.clean - _logprob(o.run(whole)["logits"], answer)) < TOLERANCE
    for layer in range(o.n_layer):
        for head in range(o.n_head):

            def edit(z: np.ndarray, head: int = head) -> np.ndarray:
                z.reshape(len(z), o.n_head, -1)[len(tokens) - 1 :, head] = 0
                return z

            expected = _logprob(o.run(whole, {f"head_out.{layer}": edit})["logits"], answer)
            assert abs(sweep.ablated[layer, head] - expected) < TOLERANCE
    assert np.allclose(sweep.drop, sweep.clean - sweep.ablated, atol=1e-6)


def test_sweep_of_some_heads_with_another_ablation_under_other_changes(llama: Tiny) -> None:
    o, tokens = llama.oracle, llama.prompt(10)
    fixed = head_edits(llama.model, [Head(0, 0)])
    sweep = ablation.head_sweep(
        llama.model,
        tokens,
        [30],
        heads=[Head(1, 2), Head(2, 5)],
        edits_of=lambda head: pattern_edits([head]),
        edits=fixed,
    )
    base = {"head_out.0": _heads(llama, [0], 0)}
    assert abs(sweep.clean - _logprob(o.run(tokens, base)["logits"], [30])) < TOLERANCE
    expected = o.run(tokens, {**base, "head_out.1": _heads(llama, [2], 0)})["logits"]
    assert abs(sweep.ablated[1, 2] - _logprob(expected, [30])) < TOLERANCE
    assert np.isfinite(sweep.ablated).sum() == 2
    with pytest.raises(UsageError, match="the answer is empty"):
        ablation.head_sweep(llama.model, tokens, [])


def test_sweep_is_one_run(llama: Tiny, decoded: list[int]) -> None:
    """18 heads of a prompt of 14: the prompt is decoded once, then a row for each head."""
    ablation.head_sweep(llama.model, llama.prompt(), [30])
    assert sum(decoded) == 13 + 1 + 18


# -- the report -------------------------------------------------------------------------


def test_a_report_ablates_at_the_tokens_that_predict_the_answer(llama: Tiny) -> None:
    o, m, tokens = llama.oracle, llama.model, llama.prompt(6)
    report = ablation.ablate(m, tokens, " the cat", heads="1.2,2.5", k=1)
    answer = [t.id for t in report.answer_tokens]
    whole = [*tokens, *answer[:-1]]
    assert m.detokenize(answer) == " the cat" and len(answer) == 2
    assert report.positions == [5, 6]

    def edit(z: np.ndarray) -> np.ndarray:
        z.reshape(len(z), o.n_head, -1)[5:, 2] = 0
        return z

    clean = _logprob(o.run(whole)["logits"], answer)
    drop = clean - _logprob(o.run(whole, {"head_out.1": edit})["logits"], answer)
    assert abs(report.sweep.clean - clean) < TOLERANCE
    rows = report.rows()
    assert [(r["layer"], r["head"]) for r in rows] == [(1, 2), (2, 5)]
    assert abs(rows[0]["drop"] - drop) < TOLERANCE
    document = report.document()
    assert document["drop"][0] == [None] * 6 and document["ablated_at"] == [5, 6]
    best = max(rows, key=lambda r: abs(r["drop"]))
    assert document["top"] == [
        {"layer": best["layer"], "head": best["head"], "value": round(best["drop"], 6)}
    ]
    assert report.plain().startswith(f"log-probability of ' the cat': {report.sweep.clean:.4f}\n")


@pytest.mark.parametrize("tokens", [None, "*", "1..3"])
@pytest.mark.parametrize("attention", [False, True])
def test_changes_say_how_heads_are_ablated(
    llama: Tiny, tokens: str | None, attention: bool
) -> None:
    """Zero at the attention weights is zero at head_out; the other changes are in every run."""
    prompt = llama.prompt(6)
    changes = Changes(ablate="0.0", ablate_attention=attention)
    report = ablation.ablate(
        llama.model, prompt, " France", heads="1.*", tokens=tokens, changes=changes
    )
    rows = {None: slice(5, None), "*": slice(None), "1..3": slice(1, 4)}[tokens]
    base = {"head_out.0": _heads(llama, [0], 0)}
    answer = [t.id for t in report.answer_tokens]
    logits = llama.oracle.run(prompt, base)["logits"]
    assert abs(report.sweep.clean - _logprob(logits, answer)) < TOLERANCE
    for head in range(6):

        def edit(z: np.ndarray, head: int = head) -> np.ndarray:
            z.reshape(len(z), 6, -1)[rows, head] = 0
            return z

        logits = llama.oracle.run(prompt, {**base, "head_out.1": edit})["logits"]
        assert abs(report.sweep.ablated[1, head] - _logprob(logits, answer)) < TOLERANCE


def test_a_report_refuses(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="the answer is empty"):
        ablation.ablate(llama.model, llama.prompt(4), "")
    with pytest.raises(RangeError, match="token index 4 is out of range; there are 0 to 3"):
        ablation.ablate(llama.model, llama.prompt(4), " France", tokens="4")


def test_heads_and_tokens_may_be_numbers(llama: Tiny) -> None:
    tokens, answer = llama.prompt(6), llama.model.piece(llama.prompt(1, seed=3)[0])
    numbers = ablate(llama.model, tokens, answer, heads=[Head(2, 1)], tokens=-1)
    text = ablate(llama.model, tokens, answer, heads="2.1", tokens="-1")
    assert numbers.document() == text.document()
