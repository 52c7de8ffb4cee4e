"""What lm-evaluation-harness sends, and how it reads the answers (tests/clients runs it)."""

from operator import itemgetter
from typing import Any

import pytest
from serving import Client

from mia.measure.losses import log_softmax
from mia.model import Model
from mia.request import Request

PROMPT = "The cat sat on"


def _scores(choices: list[Any], lengths: list[int]) -> list[tuple[float, bool]]:
    """Log-likelihood of what stands behind each context, and whether the model would have written it."""
    scores = []
    for choice, n in zip(sorted(choices, key=itemgetter("index")), lengths, strict=True):
        told = choice["logprobs"]
        logprobs, tops = told["token_logprobs"][n:-1], told["top_logprobs"][n:-1]
        best = [max(top.values()) for top in tops]
        scores.append((sum(logprobs), logprobs == best))
    return scores


def test_a_batch_of_likelihoods(client: Client, model: Model) -> None:
    context = model.tokenize(PROMPT, bos=False)
    written = model.run([Request(context, n_predict=3)])[0].tokens
    answers = [written, [5, 9], [77], [*written[:2], 5]]
    prompts = [context + answer for answer in answers]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    document = client.post("/v1/completions", **body, echo=True, model="served").document
    scores = _scores(document["choices"], [len(context)] * len(answers))
    assert [greedy for _, greedy in scores] == [True, False, False, False]
    for (score, _), prompt, answer in zip(scores, prompts, answers, strict=True):
        logits = model.run([Request(prompt, logits="all")])[0].logits
        assert logits is not None
        rows = log_softmax(logits)[len(context) - 1 : -1]
        want = sum(rows[i, token] for i, token in enumerate(answer))
        assert score == pytest.approx(want, rel=0, abs=1e-4)


def test_lengths_under_other_names(client: Client) -> None:
    """Some of its tasks are written for transformers: `max_new_tokens` comes beside `max_tokens`."""
    for path, given, n in (
        ("/v1/completions", {"max_tokens": 6, "max_new_tokens": 3}, 3),
        ("/v1/completions", {"max_tokens": 3, "max_new_tokens": 6}, 3),
        ("/v1/completions", {"max_new_tokens": 20}, 20),
        ("/v1/chat/completions", {"max_new_tokens": 3, "max_completion_tokens": 5}, 3),
    ):
        prompt = {"prompt": PROMPT, "messages": [{"role": "user", "content": PROMPT}]}
        body = {k: v for k, v in prompt.items() if (k == "messages") == ("chat" in path)}
        answer = client.post(path, **body, **given, ignore_eos=True, num_beams=1)
        assert answer.status == 200, answer.data
        assert answer.document["usage"]["completion_tokens"] == n
    refused = client.post("/v1/completions", prompt=PROMPT, num_beams=4)
    assert refused.status == 400 and "num_beams is not supported here" in refused.error
