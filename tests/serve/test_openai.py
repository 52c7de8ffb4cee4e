"""The `openai` client works against the server unchanged. Skipped where it is not installed."""

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
