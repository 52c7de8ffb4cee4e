"""Ablations and knockouts against the oracle, alone and many at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.methods import ablation
from mia.methods.ablation import Block, block_edits, head_edits, parse_block, parse_heads
from mia.request import Request

TOLERANCE = 1e-4
Function = Callable[[np.ndarray], np.ndarray]


def _check(t: Tiny, tokens: list[int], edits: list[Edit], truth: dict[str, Function]) -> None:
    """Logits at all tokens, as the oracle has them; and the change is one that shows."""
    result = t.model.run([Request(tokens, edits, logits="all")])[0]
    want = t.oracle.run(tokens, truth)["logits"]
    assert result.logits is not None
    assert np.abs(result.logits - want).max() < TOLERANCE
    assert np.abs(want - t.oracle.run(tokens)["logits"]).max() > 1e-3


def _heads(t: Tiny, heads: list[int], value: Any) -> Function:
    """Puts a value (…, len(heads), head_dim) at heads of head_out."""

    def put(z: np.ndarray) -> np.ndarray:
        by_head = z.reshape(len(z), t.oracle.n_head, -1)
        by_head[:, heads] = value
        return by_head.reshape(z.shape)

    return put


# -- reading what heads are meant ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("3.5", {3: [5]}),
        ("3.5,4.0,3.1", {3: [1, 5], 4: [0]}),
        ("7.*", {7: [0, 1, 2, 3, 4, 5]}),
        ("0..2.1", {0: [1], 1: [1], 2: [1]}),
        ("0-1.2-3", {0: [2, 3], 1: [2, 3]}),
        ("-1.0", {7: [0]}),
        ("*.5", {i: [5] for i in range(8)}),
    ],
)
def test_heads_are_read(text: str, heads: dict[int, list[int]]) -> None:
    assert parse_heads(text, 8, 6) == heads


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("3", UsageError, "'3' is not LAYER.HEAD, like 3.5 or 7.*"),
        ("3.x", UsageError, "'3.x' is not LAYER.HEAD"),
        ("3.6", RangeError, "head 6 is out of range; 0 to 5"),
        ("3.4-2", RangeError, "head 4-2 is out of range"),
        ("8.0", RangeError, "layer 8 is out of range; this model has 0 to 7"),
        ("", UsageError, "'' is not LAYER.HEAD"),
    ],
)
def test_wrong_heads_are_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as found:
        parse_heads(text, 8, 6, "--ablate")
    assert message in str(found.value) and "--ablate" in str(found.value)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("5->0", Block([5], [0])),
        (" 3..5 -> 0,1 ", Block([3, 4, 5], [0, 1])),
        ("-1->-3", Block([7], [5])),
        ("6..->0", Block([6, 7], [0], True)),
        ("*->2", Block(list(range(8)), [2], True)),
        ("5->0@1..2", Block([5], [0], False, {1: [0, 1], 2: [0, 1]})),
        ("5->0@3.1,2.*", Block([5], [0], False, {2: [0, 1], 3: [1]})),
    ],
)
def test_blocks_are_read(text: str, block: Block) -> None:
    assert parse_block(text, 8, 4, 2) == block


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5-0", "'5-0' is not QUERIES->KEYS"),
        ("5->8", "token index 8 is out of range; 0 to 7"),
        ("5->0@4", "layer 4 is out of range; this model has 0 to 3"),
        ("5->0@3.2", "head 2 is out of range; 0 to 1"),
        ("5..3->0", "the range 5..3 runs backwards"),
        ("2->5", "no query sees these keys"),
        ("x->0", "'x' is not a token index"),
    ],
)
def test_wrong_blocks_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as found:
        parse_block(text, 8, 4, 2)
    assert message in str(found.value)


# -- taking heads away -------------------------------------------------------------------


def test_zero(case: Tiny) -> None:
    chosen = {0: [1, 3], 2: [0]}
    truth = {f"head_out.{i}": _heads(case, h, 0) for i, h in chosen.items()}
    _check(case, case.prompt(), head_edits(case.model, chosen), truth)


def test_zero_at_the_pattern_is_zero_at_the_head(case: Tiny) -> None:
    chosen = {0: [1, 3], 2: [0]}
    truth = {f"head_out.{i}": _heads(case, h, 0) for i, h in chosen.items()}
    _check(case, case.prompt(), ablation.pattern_edits(chosen), truth)


def test_one_head_is_kept(llama: Tiny) -> None:
    others = ablation.all_but({1: [2]}, llama.model.n_head)
    assert others == {1: [0, 1, 3, 4, 5]}
    truth = {"head_out.1": _heads(llama, [0, 1, 3, 4, 5], 0)}
    _check(llama, llama.prompt(), head_edits(llama.model, others), truth)


def test_mean_over_other_prompts(case: Tiny) -> None:
    source = ablation.head_outputs(case.model, case.prompt(9, seed=5), [1])
    edits = head_edits(case.model, {1: [1, 2]}, how="mean", source=source)
    theirs = case.oracle.run(case.prompt(9, seed=5))["head_out.1"]
    mean = theirs.reshape(9, case.oracle.n_head, -1)[:, [1, 2]].mean(0)
    _check(case, case.prompt(), edits, {"head_out.1": _heads(case, [1, 2], mean)})


def test_resampling_gives_no_token_its_own(case: Tiny) -> None:
    tokens = case.prompt()
    source = ablation.head_outputs(case.model, tokens, [1])
    edits = head_edits(
        case.model,
        {1: [2]},
        how="resample",
        source=source,
        n_tokens=len(tokens),
        rng=np.random.default_rng(0),
    )
    drawn = ablation._draw(len(tokens), len(tokens), np.random.default_rng(0))
    assert sorted(drawn) == list(range(len(tokens)))
    assert all(i != d for i, d in enumerate(drawn))
    own = case.oracle.run(tokens)["head_out.1"].reshape(len(tokens), case.oracle.n_head, -1)
    _check(case, tokens, edits, {"head_out.1": _heads(case, [2], own[drawn][:, [2]])})


def test_resampling_goes_on_while_generating(llama: Tiny) -> None:
    tokens = llama.prompt(5)
    source = ablation.head_outputs(llama.model, tokens, [0])
    edits = head_edits(
        llama.model,
        {0: [0]},
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
            "has rows of 48 here, what is given has shape (2, 3)",
        ),
        ({"how": "resample"}, "resampling needs a random generator"),
    ],
)
def test_what_an_ablation_needs_is_said(llama: Tiny, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as found:
        head_edits(llama.model, {0: [1]}, **more)
    assert message in str(found.value)


# -- knockout ------------------------------------------------------------------------------


def _blind(t: Tiny, block: Block, layer: int) -> Function:
    """What a block does to the scores (n_query, n_head, n_key)."""

    def put(scores: np.ndarray) -> np.ndarray:
        heads = range(t.oracle.n_head) if block.heads is None else block.heads.get(layer, ())
        for q in block.queries:
            for h in heads:
                scores[q, h, block.keys] = -np.inf
        return scores

    return put


@pytest.mark.parametrize("text", ["5->0", "3..6->1,2", "4..->0@1..2", "-1->8..11@0.1,2.*", "*->3"])
def test_knockout(case: Tiny, text: str) -> None:
    o, tokens = case.oracle, case.prompt()
    block = parse_block(text, len(tokens), o.n_layer, o.n_head)
    truth = {f"attn_scores.{i}": _blind(case, block, i) for i in range(o.n_layer)}
    _check(case, tokens, block_edits(case.model, block), truth)


def test_what_is_left_sums_to_one_and_others_stay(case: Tiny) -> None:
    """Many knockouts at once, one sequence each; the first layer's pattern is renormalised."""
    from mia.methods.attention import maps_of, maps_request

    tokens = case.prompt()
    clean = case.oracle.run(tokens)["attn_pattern.0"]  # (n_query, n_head, n_key)
    blocks = [Block([q], [q - 1]) for q in range(2, len(tokens))]
    requests = [maps_request(case.model, tokens, edits=block_edits(case.model, b)) for b in blocks]
    for b, request, result in zip(blocks, requests, case.model.run(requests), strict=True):
        q = b.queries[0]
        weights = maps_of(case.model, request, result).weights
        assert np.abs(weights.sum(-1) - 1).max() < 1e-5
        assert (weights[:, :, q, q - 1] == 0).all()
        want = clean.copy()
        want[q, :, q - 1] = 0
        want[q] /= want[q].sum(-1, keepdims=True)
        assert np.abs(weights[0].swapaxes(0, 1) - want).max() < TOLERANCE


def test_a_query_without_keys_is_refused_and_the_model_goes_on(case: Tiny) -> None:
    tokens = case.prompt(6)
    clean = case.model.run([Request(tokens)])[0].logits
    for text, query in (("0->0", 0), ("4->*@1", 4)):
        block = parse_block(text, 6, case.oracle.n_layer, case.oracle.n_head)
        with pytest.raises(UsageError, match=f"query {query} has no key left to look at in layer"):
            case.model.run([Request(tokens, block_edits(case.model, block))])
    assert np.array_equal(case.model.run([Request(tokens)])[0].logits, clean)


def test_a_window_counts_as_blocked(tiny: Callable[[str], Tiny]) -> None:
    """Of gemma2's window of 4, keys 3..6 are all that query 6 sees in layer 0."""
    t = tiny("gemma2-window")
    block = parse_block("6->3..6@0", 8, t.oracle.n_layer, t.oracle.n_head)
    with pytest.raises(UsageError, match="query 6 has no key left to look at in layer 0, head 0"):
        t.model.run([Request(t.prompt(8), block_edits(t.model, block))])
    rest = parse_block("6->4..6@0", 8, t.oracle.n_layer, t.oracle.n_head)
    truth = {"attn_scores.0": _blind(t, rest, 0)}
    _check(t, t.prompt(8), block_edits(t.model, rest), truth)


def test_generated_tokens_are_kept_from_a_key(llama: Tiny) -> None:
    """An open range goes on while generating: the same as one prompt with the block."""
    tokens = llama.prompt(6)
    sizes = (llama.oracle.n_layer, llama.oracle.n_head)
    edits = block_edits(llama.model, parse_block("3..->1", 6, *sizes))
    request = Request(tokens, edits, n_predict=4, logits=None, stop_at_eog=False, logprobs=True)
    found = llama.model.run([request])[0]
    whole = tokens + found.tokens[:-1]
    block = parse_block("3..->1", len(whole), *sizes)
    truth = {f"attn_scores.{i}": _blind(llama, block, i) for i in range(sizes[0])}
    logits = llama.oracle.run(whole, truth)["logits"][5:]
    assert logits.argmax(-1).tolist() == found.tokens
    logprobs = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    assert np.abs(np.asarray(found.logprobs) - logprobs).max() < TOLERANCE


# -- every head in turn ------------------------------------------------------------------------


def _logprob(logits: np.ndarray, answer: list[int]) -> float:
    rows = logits[-len(answer) :]
    return float(sum(r[t] - np.log(np.exp(r).sum()) for r, t in zip(rows, answer, strict=True)))


@pytest.mark.parametrize("answer", [[30], [30, 41, 7]])
def test_sweep_agrees_with_one_by_one_in_the_oracle(case: Tiny, answer: list[int]) -> None:
    tokens, o = case.prompt(10), case.oracle
    whole = [*tokens, *answer[:-1]]
    sweep = ablation.head_sweep(case.model, tokens, answer)
    assert abs(sweep.clean - _logprob(o.run(whole)["logits"], answer)) < TOLERANCE
    for layer in range(o.n_layer):
        for head in range(o.n_head):

            def silence(z: np.ndarray, head: int = head) -> np.ndarray:
                z.reshape(len(z), o.n_head, -1)[len(tokens) - 1 :, head] = 0
                return z

            want = _logprob(o.run(whole, {f"head_out.{layer}": silence})["logits"], answer)
            assert abs(sweep.ablated[layer, head] - want) < TOLERANCE
    assert np.allclose(sweep.drop, sweep.clean - sweep.ablated, atol=1e-6)


def test_sweep_of_some_heads_with_another_ablation_under_other_changes(llama: Tiny) -> None:
    o, tokens = llama.oracle, llama.prompt(10)
    fixed = head_edits(llama.model, {0: [0]})
    sweep = ablation.head_sweep(
        llama.model,
        tokens,
        [30],
        heads={1: [2], 2: [5]},
        edits_of=lambda layer, head: ablation.pattern_edits({layer: [head]}),
        edits=fixed,
    )
    base = {"head_out.0": _heads(llama, [0], 0)}
    assert abs(sweep.clean - _logprob(o.run(tokens, base)["logits"], [30])) < TOLERANCE
    want = o.run(tokens, {**base, "head_out.1": _heads(llama, [2], 0)})["logits"]
    assert abs(sweep.ablated[1, 2] - _logprob(want, [30])) < TOLERANCE
    assert np.isfinite(sweep.ablated).sum() == 2
    with pytest.raises(UsageError, match="the answer is empty"):
        ablation.head_sweep(llama.model, tokens, [])


def test_sweep_is_one_planned_run(llama: Tiny, decoded: list[int]) -> None:
    """18 heads of a prompt of 14: the prompt is decoded once, then a row for each head."""
    ablation.head_sweep(llama.model, llama.prompt(), [30])
    assert sum(decoded) == 13 + 1 + 18
