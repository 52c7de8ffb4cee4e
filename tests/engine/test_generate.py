"""Generation: edits and captures at generated tokens, log-probabilities, sampling, where it stops."""

from typing import Any

import numpy as np
import pytest
from reference import check, check_same, expected
from tiny import CASES, Tiny

from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.request import Capture, Request, Sampling

N_PROMPT, N_PREDICT = 7, 6


def _edits(t: Tiny) -> dict[str, list[Edit]]:
    """When edits act: at the prompt, at what is generated, at both."""
    v, q = t.vector(), t.vector("head_out.1")[: 2 * t.oracle.head_dim]
    negative = -np.abs(t.vector("logits"))
    return {
        "none": [],
        "prompt": [Edit("resid_post.1", "add", v, tokens=[2, -1], coeff=2.0)],
        "all of the prompt": [Edit("resid_post.1", "add", v, generated=False)],
        "generated": [Edit("mlp_out.2", "replace", v, tokens=[], generated=True)],
        "both": [Edit("resid_pre.1", "add", v), Edit("attn_out.2", "scale", coeff=-0.5)],
        "one token and generated": [Edit("embed", "add", v, tokens=1, generated=True)],
        "heads": [Edit("head_out.1", "blend", q, heads=[1, 3], coeff=0.7)],
        "keys": [Edit("k.1", "project_out", t.vector("k.1"), tokens=0, generated=True)],
        "pattern": [Edit("attn_pattern.2", "zero", heads=[0, 2])],
        "scores": [Edit("attn_scores.0", _forget_the_second)],
        "function": [Edit("final_norm", np.abs, tokens=-1, generated=True)],
        "logits": [Edit("logits", "add", negative, dims=None, coeff=3.0)],
    }


def _forget_the_second(h: np.ndarray) -> np.ndarray:
    """Scores (1, n_head * n_keys): nobody but itself looks at token 1."""
    n_head = next(n for n in (6, 4) if h.shape[1] % n == 0)
    scores = h.reshape(n_head, -1)
    if scores.shape[1] > 2:
        scores[:, 1] = -np.inf
    return scores.reshape(1, -1)


def _requests(t: Tiny) -> list[Request]:
    prompt = t.prompt(N_PROMPT)
    captures = [
        Capture(["resid_post.0", "attn_pattern.2", "head_out.1", "logits", "k.1"], generated=True),
        Capture(["q.0", "attn_scores.1"], tokens=[-1, 0], generated=True),
        Capture("mlp_norm", tokens=3),
    ]
    warm = Sampling(temperature=1.5, seed=4)  # greedy gemma2 repeats itself
    return [
        Request(
            prompt,
            edits,
            captures,
            "all",
            n_predict=N_PREDICT,
            sampling=how,
            stop_at_eog=False,
            logprobs=True,
        )
        for edits in _edits(t).values()
        for how in (Sampling(), warm)
    ]


def test_generations_as_many_as_the_prompt_has_tokens(llama: Tiny) -> None:
    """The rows of the first step are as many as those of the prompt's decode, of which only one
    was an output."""
    v = llama.vector()
    for n in (2, 3, 5):
        requests = [
            Request(
                llama.prompt(n),
                [Edit("resid_post.2", "add", v, [], generated=True, coeff=i)],
                [Capture(["final_norm", "logits"], [], generated=True)],
                None,
                n_predict=4,
                sampling=Sampling(temperature=1, seed=i),
                stop_at_eog=False,
            )
            for i in range(n)
        ]
        for request, result in zip(requests, llama.model.run(requests), strict=True):
            check(result, request, llama.oracle)


def test_a_run_that_fails_spoils_no_other(tiny: Any) -> None:
    """What the edits made is in the cache by then."""
    t = tiny("gpt2")
    huge = np.full(t.model.n_embd, 3e38, np.float32)
    edits = [
        Edit("k.2", "add", huge, tokens=[], generated=True),
        Edit("resid_post.2", "add", t.vector()),
    ]
    with pytest.raises(UsageError, match="not finite"):
        t.model.run([Request(t.prompt(4), edits, n_predict=8, stop_at_eog=False)])
    after = Request([279, 210, 169], [Edit("mlp_out.0", "scale", coeff=0.5, tokens=-1)])
    check(t.model.run([after])[0], after, t.oracle)


def _check_all(t: Tiny, requests: list[Request], results: list[Any]) -> None:
    rows = [N_PROMPT + N_PREDICT - 1] * 5 + [2 + N_PREDICT - 1] * 2 + [1] * 3
    for request, result in zip(requests, results, strict=True):
        assert len(result.tokens) == len(result.logprobs) == N_PREDICT
        assert [len(a) for a in result.captures.values()] == rows
        want = check(result, request, t.oracle)
        clean = t.oracle.run([*request.tokens, *result.tokens[:-1]])
        moved = np.abs(want["logits"] - clean["logits"]).max() > 0.01
        assert moved == bool(request.edits)  # the edits matter


def test_together(case: Tiny) -> None:
    requests = _requests(case)
    _check_all(case, requests, case.model.run(requests))


def test_one_by_one_in_small_micro_batches(case: Tiny, reopen: Any, five_rows: None) -> None:
    t = reopen(case)
    requests = _requests(t)[list(CASES).index(t.name) % 3 :: 3]  # every one is some model's
    _check_all(t, requests, [t.model.run([r])[0] for r in requests])


def test_edits_of_the_prompt_only_leave_the_rest(llama: Tiny) -> None:
    """A generated token's own residual is clean where an edit is of the prompt alone."""
    prompt, v = llama.prompt(N_PROMPT), llama.vector()
    edit = Edit("embed", "replace", v, tokens=slice(None))
    request = Request(prompt, [edit], [Capture("embed", generated=True)], n_predict=4)
    result = llama.model.run([request])[0]
    rows = result["embed"]
    np.testing.assert_array_equal(rows[:N_PROMPT], np.broadcast_to(v, (N_PROMPT, len(v))))
    table = llama.oracle.weights["token_embd.weight"]
    np.testing.assert_allclose(rows[N_PROMPT:], table[result.tokens[:-1]], atol=1e-6)


# -- where it stops -----------------------------------------------------------------------------


def _wish(t: Tiny, token: int, **when: Any) -> Edit:
    """Makes one token the most likely by far."""
    v = np.zeros(t.model.n_vocab, np.float32)
    v[token] = 100.0
    return Edit("logits", "add", v, **when)


@pytest.mark.parametrize("end", [0, 2])  # end of text, end of turn
def test_it_stops_where_the_model_ends_its_turn(llama: Tiny, end: int) -> None:
    prompt = llama.prompt()
    capture = Capture(["l_out-1", "attn_pattern.2"], tokens=[], generated=True)

    def run(edit: Edit, **options: Any) -> Any:
        request = Request(prompt, [edit], [capture], None, n_predict=5, **options)
        result = llama.model.run([request, Request(prompt, n_predict=9)])[0]
        check(result, request, llama.oracle)
        return result

    at_once = run(_wish(llama, end, tokens=-1))
    assert at_once.tokens == [end]
    assert at_once["l_out-1"].shape == (0, 48)
    later = run(_wish(llama, end, tokens=[], generated=True))
    assert len(later.tokens) == 2 and later.tokens[1] == end
    assert later["l_out-1"].shape == (1, 48)
    assert later["attn_pattern.2"].shape == (1, 6, 15)
    assert llama.model.text(later.tokens) == llama.model.piece(later.tokens[0])
    on = run(_wish(llama, end), stop_at_eog=False)
    assert on.tokens == [end] * 5
    assert on["l_out-1"].shape == (4, 48)
    other = run(_wish(llama, 1))  # a control token that ends nothing
    assert other.tokens == [1] * 5


def test_how_much_is_generated(llama: Tiny, reopen: Any, decoded: list[int]) -> None:
    t = reopen(llama, ctx=16)
    prompt = t.prompt(12)
    nothing, one = t.model.run([Request(prompt), Request(prompt, n_predict=1, stop_at_eog=False)])
    assert nothing.tokens == nothing.logprobs == []
    assert len(one.tokens) == 1 and sum(decoded) == 12
    full = Request(prompt, n_predict=5, stop_at_eog=False)  # the fifth is not fed back
    assert len(t.model.run([full])[0].tokens) == 5
    with pytest.raises(RangeError, match=r"12 tokens and 6 to generate is longer than .* of 16"):
        t.model.run([Request(prompt, n_predict=6)])
    with pytest.raises(UsageError, match="n_predict -1 is negative"):
        Request(prompt, n_predict=-1)
    check(t.model.run([full])[0], full, t.oracle)


def test_generate_gives_text(llama: Tiny) -> None:
    model = llama.model
    ids = model.tokenize("The capital of")
    tokens = model.run([Request(ids, n_predict=5)])[0].tokens
    text = model.generate("The capital of", 5).text
    assert text == model.text(tokens) == model.generate(ids, 5).text
    end = _wish(llama, 0, tokens=-1)
    assert model.generate("The capital of", 5, edits=[end]).text == ""
    without = model.generate("The capital of", 5, bos=False)
    assert without.tokens == model.generate(ids[1:], 5).tokens


# -- sampling -------------------------------------------------------------------------------------


def _sample(t: Tiny, n_predict: int = 12, **how: Any) -> tuple[Request, Any]:
    request = Request(
        t.prompt(5), logits=None, n_predict=n_predict, sampling=Sampling(**how), stop_at_eog=False
    )
    result = t.model.run([request])[0]
    check(result, request, t.oracle)  # log-probabilities are those before temperature and cuts
    return request, result


def test_a_seed_is_a_text(llama: Tiny) -> None:
    texts = [_sample(llama, temperature=1.0, seed=s)[1].tokens for s in (3, 3, 4, 0, 2**32 - 2)]
    assert texts[0] == texts[1]
    assert len({tuple(x) for x in texts}) == 4


def test_the_surest_choices_are_greedy(llama: Tiny) -> None:
    greedy = _sample(llama)[1]
    hows: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 0.999999},
        {"temperature": 1e-4},
    ]
    for how in hows:
        check_same(_sample(llama, **{"temperature": 2.0, "seed": 5, **how})[1], greedy)


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}], ids=str)
def test_cuts_leave_only_what_they_should(llama: Tiny, how: dict[str, Any]) -> None:
    ranks = []
    for seed in range(4):
        request, result = _sample(llama, 20, temperature=1.0, seed=seed, **how)
        z = expected(llama.oracle, request, result.tokens[:-1])["logits"][len(request.tokens) - 1 :]
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        for row, token in zip(p, result.tokens, strict=True):
            order = np.argsort(-row)
            rank = int(np.flatnonzero(order == token)[0])
            ranks.append(rank)
            assert rank < how.get("top_k", 999)
            assert row[order[:rank]].sum() < how.get("top_p", 1.0)  # the nucleus was not full yet
            assert row[token] >= how.get("min_p", 0.0) * row.max()
    assert max(ranks) > 0  # it is not greedy


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_samples_follow_the_softmax(llama: Tiny, temperature: float) -> None:
    n = 900
    samplings = [Sampling(temperature=temperature, seed=s) for s in range(n)]
    requests = [
        Request(llama.prompt(5), logits=None, n_predict=1, sampling=s, stop_at_eog=False)
        for s in samplings
    ]
    counts = np.bincount(
        [r.tokens[0] for r in llama.model.run(requests)], minlength=llama.model.n_vocab
    )
    z = llama.oracle.run(llama.prompt(5))["logits"][-1] / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    sigma = np.sqrt(n * p * (1 - p)) + 1
    assert (np.abs(counts - n * p) < 5 * sigma).all()
    assert np.count_nonzero(counts) > 5


@pytest.mark.parametrize(
    "how",
    [
        {"presence_penalty": 50.0},
        {"frequency_penalty": 0.9},
        {"repeat_penalty": 1.7},
        {"repeat_penalty": 0.5},
        {"repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.6},
    ],
    ids=str,
)
def test_penalties_are_greedy_on_penalised_logits(llama: Tiny, how: dict[str, float]) -> None:
    """Keskar et al. 2019 for repeat_penalty, OpenAI's formula for the others; prompt included."""
    request, result = _sample(llama, 25, **how)
    n = len(request.tokens)
    logits = expected(llama.oracle, request, result.tokens[:-1])["logits"][n - 1 :]
    seen = [*request.tokens]
    for row, token in zip(logits, result.tokens, strict=True):
        count = np.bincount(seen, minlength=len(row))
        factor = np.where(row > 0, 1 / how.get("repeat_penalty", 1), how.get("repeat_penalty", 1))
        row = np.where(count > 0, row * factor, row)
        row = row - count * how.get("frequency_penalty", 0)
        row = row - (count > 0) * how.get("presence_penalty", 0)
        assert row.max() - row[token] < 1e-4
        seen.append(token)
    assert result.tokens != _sample(llama, 25)[1].tokens


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is negative"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, r"top-p 0.0 is not in \(0, 1\]"),
        ({"top_p": 1.1}, "top-p 1.1"),
        ({"min_p": 1.0}, r"min-p 1.0 is not in \[0, 1\)"),
        ({"top_k": -1}, "top-k -1 is negative"),
        ({"repeat_penalty": 0.0}, "repeat penalty 0.0 is not positive"),
        ({"seed": -1}, "seed -1 is not in 0 to 4294967294"),
        ({"seed": 2**32 - 1}, "seed 4294967295 is not in"),
    ],
)
def test_sampling_that_makes_no_sense(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**how)


def test_penalties_and_samples_are_each_request_s_own(llama: Tiny) -> None:
    """Side by side, with different samplers, each gives what it gives alone."""
    prompt = llama.prompt(5)
    hows: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"repeat_penalty": 1.8},
        {"temperature": 0.7, "top_k": 5},
    ]
    requests = [
        Request(prompt[: 3 + i % 3], n_predict=8, sampling=Sampling(**h), stop_at_eog=False)
        for i, h in enumerate([*hows, *hows])
    ]
    for request, result in zip(requests, llama.model.run(requests), strict=True):
        check_same(llama.model.run([request])[0], result)
