"""Attention knockout against the oracle, alone and many at once."""

from collections.abc import Callable

import numpy as np
import pytest
from one_prompt import Function
from reference import check_edits
from tiny import Tiny, logits

from mia.errors import UsageError
from mia.methods.knockout import Block, block_edits, parse_block
from mia.ranges import Head
from mia.request import Request

TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("5->0", Block([5], [0])),
        (" 3..5 -> 0,1 ", Block([3, 4, 5], [0, 1])),
        ("-1->-3", Block([7], [5])),
        ("6..->0", Block([6, 7], [0], True)),
        ("*->2", Block(list(range(8)), [2], True)),
        ("5->0@1..2", Block([5], [0], False, [Head(1, 0), Head(1, 1), Head(2, 0), Head(2, 1)])),
        ("5->0@3.1,2.*", Block([5], [0], False, [Head(2, 0), Head(2, 1), Head(3, 1)])),
    ],
)
def test_blocks_are_read(text: str, block: Block) -> None:
    assert parse_block(text, 8, 4, 2) == block


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5-0", "'5-0' is not QUERIES->KEYS"),
        ("5->8", "token index 8 is out of range; there are 0 to 7"),
        ("5->0@4", "layer 4 is out of range; there are 0 to 3"),
        ("5->0@3.2", "head 2 is out of range; there are 0 to 1"),
        ("5..3->0", "the range 5..3 runs backwards"),
        ("2->5", "no query sees these keys"),
        ("x->0", "'x' is not a token index"),
    ],
)
def test_wrong_blocks_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_block(text, 8, 4, 2)
    assert message in str(caught.value)


def _blocked(t: Tiny, block: Block, layer: int) -> Function:
    """What a block does to the scores (n_query, n_head, n_key)."""

    def put(scores: np.ndarray) -> np.ndarray:
        every = [Head(layer, h) for h in range(t.oracle.n_head)]
        heads = [h.head for h in block.heads or every if h.layer == layer]
        for q in block.queries:
            for h in heads:
                scores[q, h, block.keys] = -np.inf
        return scores

    return put


@pytest.mark.parametrize("text", ["5->0", "3..6->1,2", "4..->0@1..2", "-1->8..11@0.1,2.*", "*->3"])
def test_knockout(case: Tiny, text: str) -> None:
    o, tokens = case.oracle, case.prompt()
    block = parse_block(text, len(tokens), o.n_layer, o.n_head)
    truth = {f"attn_scores.{i}": _blocked(case, block, i) for i in range(o.n_layer)}
    check_edits(case, tokens, block_edits(case.model, block), truth)


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
        expected = clean.copy()
        expected[q, :, q - 1] = 0
        expected[q] /= expected[q].sum(-1, keepdims=True)
        assert np.abs(weights[0].swapaxes(0, 1) - expected).max() < TOLERANCE


def test_a_query_without_keys_is_refused_and_the_model_goes_on(case: Tiny) -> None:
    tokens = case.prompt(6)
    clean = logits(case.model.run([Request(tokens)])[0])
    for text, query in (("0->0", 0), ("4->*@1", 4)):
        block = parse_block(text, 6, case.oracle.n_layer, case.oracle.n_head)
        with pytest.raises(UsageError, match=f"all keys of query {query} are blocked in layer"):
            case.model.run([Request(tokens, block_edits(case.model, block))])
    assert np.array_equal(logits(case.model.run([Request(tokens)])[0]), clean)


def test_a_window_counts_as_blocked(tiny: Callable[[str], Tiny]) -> None:
    """Of gemma2's window of 4, keys 3..6 are all that query 6 sees in layer 0."""
    t = tiny("gemma2-window")
    block = parse_block("6->3..6@0", 8, t.oracle.n_layer, t.oracle.n_head)
    with pytest.raises(UsageError, match="all keys of query 6 are blocked in layer 0, head 0"):
        t.model.run([Request(t.prompt(8), block_edits(t.model, block))])
    rest = parse_block("6->4..6@0", 8, t.oracle.n_layer, t.oracle.n_head)
    truth = {"attn_scores.0": _blocked(t, rest, 0)}
    check_edits(t, t.prompt(8), block_edits(t.model, rest), truth)


def test_generated_tokens_are_kept_from_a_key(llama: Tiny) -> None:
    """An open range goes on while generating: the same as one prompt with the block."""
    tokens = llama.prompt(6)
    sizes = (llama.oracle.n_layer, llama.oracle.n_head)
    edits = block_edits(llama.model, parse_block("3..->1", 6, *sizes))
    request = Request(tokens, edits, n_predict=4, logits=None, stop_at_eog=False, logprobs=True)
    result = llama.model.run([request])[0]
    whole = tokens + result.tokens[:-1]
    block = parse_block("3..->1", len(whole), *sizes)
    truth = {f"attn_scores.{i}": _blocked(llama, block, i) for i in range(sizes[0])}
    logits = llama.oracle.run(whole, truth)["logits"][5:]
    assert logits.argmax(-1).tolist() == result.tokens
    logprobs = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    assert np.abs(np.asarray(result.logprobs) - logprobs).max() < TOLERANCE
