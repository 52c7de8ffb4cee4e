"""The `openai` client works against the server unchanged. Skipped where it is not installed; CI also runs
it with the client of tests/clients/requirements.txt."""

import asyncio
import json
import time
from typing import Any

import pytest
from serving import Client

openai = pytest.importorskip("openai")

PROMPT = "The cat sat on"


@pytest.fixture
def api(client: Client) -> Any:
    url = f"http://127.0.0.1:{client.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as api:
        yield api


def test_completions(api: Any, client: Client) -> None:
    assert [m.id for m in api.models.list()] == ["served"]
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    want = client.choice(**body)["text"]
    whole = api.completions.create(model="served", **body, logprobs=2, echo=True)
    assert whole.choices[0].text == PROMPT_ECHO + want
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.total_tokens
    parts = api.completions.create(model="served", **body, stream=True)
    assert "".join(part.choices[0].text for part in parts) == want


PROMPT_ECHO = "<|endoftext|>" + PROMPT  # the model asks for a BOS


def test_chat(api: Any) -> None:
    body: dict[str, Any] = {
        "model": "served",
        "messages": [{"role": "user", "content": "The cat"}],
        "max_tokens": 6,
        "temperature": 0,
    }
    extra = {"ablate": "1.1", "lens": {"layers": [1], "k": 1}}
    whole = api.chat.completions.create(
        **body, logprobs=True, top_logprobs=2, extra_body=extra
    ).choices[0]
    assert whole.message.role == "assistant" and len(whole.logprobs.content[0].top_logprobs) == 2
    parts = list(
        api.chat.completions.create(
            **body, stream=True, stream_options={"include_usage": True}, extra_body=extra
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == whole.message.content
    assert parts[-1].usage.completion_tokens == 6 and not parts[-1].choices
    assert parts[-2].choices[0].model_extra["mia"]["lens"]


def test_errors(api: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        api.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported here"):
        api.completions.create(model="served", prompt="a", logit_bias={"5": 1})
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(model="served", prompt=[5] * 9000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError, match="nothing at /v1/embeddings"):
        api.embeddings.create(model="served", input="a")


def test_documents_have_the_client_s_types(api: Any, client: Client) -> None:
    """The client itself does not look: a missing field would be an error in its user's code."""
    from openai.types import Completion, Model
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    body = {"max_tokens": 4, "n": 2}
    chat = {**body, "messages": [{"role": "user", "content": "The cat"}]}
    Model.model_validate(client.get("/v1/models/served").document, strict=True)
    text = client.post("/v1/completions", prompt=PROMPT, logprobs=2, **body)
    Completion.model_validate(text.document, strict=True)
    whole = client.post("/v1/chat/completions", **chat, logprobs=True, top_logprobs=2)
    ChatCompletion.model_validate(whole.document, strict=True)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for event in client.post("/v1/chat/completions", **chat, logprobs=True, **options).events:
        ChatCompletionChunk.model_validate_json(json.dumps(event), strict=True)
    with api.chat.completions.stream(model="served", **chat) as stream:
        assert {event.type for event in stream} >= {"chunk", "content.delta"}


def test_many_at_once_and_one_that_leaves(api: Any, client: Client) -> None:
    async def ask() -> list[str]:
        url = f"http://127.0.0.1:{client.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as many:
            requests = [
                many.completions.create(model="served", prompt=PROMPT, max_tokens=6, seed=seed)
                for seed in range(8)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*requests)]

    alone = [
        api.completions.create(model="served", prompt=PROMPT, max_tokens=6, seed=seed)
        for seed in range(8)
    ]
    assert asyncio.run(ask()) == [answer.choices[0].text for answer in alone]
    stream = api.completions.create(
        model="served", prompt=PROMPT, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    for _ in range(500):
        health = client.health()
        if not health["running"]:
            break
        time.sleep(0.02)
    assert health["running"] == health["cells"]["used"] == health["sequences"]["used"] == 0
