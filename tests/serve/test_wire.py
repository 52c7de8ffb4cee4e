"""OpenAI's wire format: what is asked, what is answered, and what is refused."""

from typing import Any

import numpy as np
import pytest
from serving import Client, serving

from mia.measure.losses import log_softmax
from mia.model import Model
from mia.request import Request
from mia.serve.changes import Reads
from mia.serve.writing import Choice, Written
from mia.show.text import visible

PROMPT = "The cat sat on"
CHAT = "/v1/chat/completions"


def _tokens(model: Model, prompt: str | list[int], n: int) -> list[int]:
    request = Request(model.ids(prompt), n_predict=n)
    return model.run([request])[0].tokens


def test_models(client: Client) -> None:
    (entry,) = client.get("/v1/models").document["data"]
    assert entry["id"] == "served" and entry["object"] == "model"
    assert client.get("/v1/models/served").document == entry
    answer = client.get("/v1/models/other")
    assert answer.status == 404 and answer.document["error"]["code"] == "model_not_found"


def test_a_tokenizer_for_those_that_have_none(client: Client, model: Model) -> None:
    ids = model.tokenize(PROMPT, bos=False)
    answer = client.post("/tokenize", prompt=PROMPT, add_special_tokens=False).document
    assert answer["tokens"] == ids and answer["count"] == len(ids)
    assert client.post("/tokenize", prompt=PROMPT).document["tokens"] == model.ids(PROMPT)
    assert client.post("/tokenize", prompt="", add_special_tokens=False).document["tokens"] == []
    assert client.post("/detokenize", tokens=ids).document["prompt"] == PROMPT
    info = client.get("/tokenizer_info").document
    assert info["eos_token"] == "<|endoftext|>" and info["chat_template"] == model.chat_template


def test_a_completion(client: Client, model: Model) -> None:
    answer = client.post("/v1/completions", prompt=PROMPT, max_tokens=5, temperature=0)
    document = answer.document
    assert document["object"] == "text_completion" and document["id"].startswith("cmpl-")
    (choice,) = document["choices"]
    ids, tokens = model.ids(PROMPT), _tokens(model, PROMPT, 5)
    text = b"".join(model.token_bytes(t) for t in tokens).decode(errors="replace")
    assert choice["text"] == text and choice["logprobs"] is None
    assert choice["finish_reason"] == ("length" if len(tokens) == 5 else "stop")
    n = len(ids)
    usage = {"prompt_tokens": n, "completion_tokens": 5, "total_tokens": n + 5}
    assert document["usage"] == usage
    assert client.choice(prompt=ids, max_tokens=5, temperature=0)["text"] == text


def test_several_prompts_and_completions(client: Client) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    answer = client.post("/v1/completions", prompt=prompts, n=2, max_tokens=4, seed=7)
    choices = answer.document["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    again = client.post("/v1/completions", prompt=prompts, n=2, max_tokens=4, seed=7).document
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in choices]
    assert choices[0]["text"] != choices[1]["text"]  # seeds of their own
    alone = client.choice(prompt=[8, 9], max_tokens=4, seed=7)
    assert alone["text"] == choices[2]["text"]
    assert answer.document["usage"]["prompt_tokens"] == 5


def test_echo_with_logprobs_has_one_entry_for_each_token(client: Client, model: Model) -> None:
    """As lm-evaluation-harness asks for log-likelihoods."""
    ids = [5, 9, 14, 77, 210]
    logits = model.run([Request(ids, logits="all")])[0].logits
    assert logits is not None
    want = log_softmax(logits)
    for n in (0, 1):
        body: dict[str, Any] = {
            "prompt": ids,
            "max_tokens": n,
            "echo": True,
            "logprobs": 2,
            "temperature": 0,
        }
        choice = client.choice(**body)
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + n
        assert logprobs["tokens"][:5] == [model.piece(t) for t in ids]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        got = logprobs["token_logprobs"][1:5]
        np.testing.assert_allclose(got, want[range(4), ids[1:]], rtol=0, atol=1e-4)
        for i, top in enumerate(logprobs["top_logprobs"][1:5]):
            best = [model.piece(int(t)) for t in want[i].argsort()[::-1][:2]]
            assert sorted(top, key=lambda t: -top[t])[:2] == best
        assert choice["text"].startswith(model.detokenize(ids))
        assert logprobs["text_offset"][:3] == [
            0,
            len(model.piece(5)),
            len(model.detokenize([5, 9])),
        ]
    (event, *_) = client.post("/v1/completions", **body, stream=True).events
    assert event["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(got)


def test_logprobs_of_what_is_written(client: Client, model: Model) -> None:
    choice = client.choice(prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3)
    tokens = _tokens(model, PROMPT, 4)
    assert choice["logprobs"]["tokens"] == [model.piece(t) for t in tokens]
    for top, logprob in zip(
        choice["logprobs"]["top_logprobs"], choice["logprobs"]["token_logprobs"], strict=True
    ):
        assert len(top) == 3 and max(top.values()) == logprob


def test_a_stream_is_the_same_text(client: Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 3, "n": 2}
    whole = client.post("/v1/completions", **body).document["choices"]
    options = {"include_usage": True}
    *events, last = client.post(
        "/v1/completions", **body, stream=True, stream_options=options
    ).events
    texts, reasons = ["", ""], [None, None]
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == [c["text"] for c in whole] and reasons == [c["finish_reason"] for c in whole]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24


def test_a_chat(client: Client, model: Model) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "The cat"}]},
    ]
    body = {"messages": messages, "max_tokens": 5, "temperature": 0}
    answer = client.post(CHAT, **body, logprobs=True, top_logprobs=2).document
    (choice,) = answer["choices"]
    prompt = model.chat([messages[0], {"role": "user", "content": "The cat"}])  # type: ignore[list-item]
    tokens = _tokens(model, prompt, 5)
    want = b"".join(model.token_bytes(t) for t in tokens).decode(errors="replace")
    assert answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": want, "refusal": None}
    content = choice["logprobs"]["content"]
    assert [bytes(c["bytes"]) for c in content] == [model.token_bytes(t) for t in tokens]
    assert all(len(c["top_logprobs"]) == 2 for c in content)
    first, *rest = client.post(CHAT, **body, stream=True).events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [e["choices"][0]["delta"].get("content", "") for e in rest]
    assert "".join(deltas) == want
    assert rest[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_stop_texts(client: Client, model: Model) -> None:
    """One that is written over two tokens is never shown in part."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "seed": 11, "temperature": 1.5}
    text = client.choice(**body)["text"]
    stop = text[5:9]
    want = text[: text.index(stop)]
    choice = client.choice(**body, stop=stop)
    assert choice["text"] == want and choice["finish_reason"] == "stop"
    events = client.post("/v1/completions", **body, stop=["nowhere", stop], stream=True).events
    assert "".join(e["choices"][0]["text"] for e in events) == want
    read = client.choice(**body, stop=stop, lens={"layers": 1, "k": 1})
    assert read["text"] == want and len(read["mia"]["lens"]) >= 1


def test_bytes_of_one_character_come_together() -> None:
    choice = Choice(0, Request([5]), [5], ["€!"], Reads())
    told = [choice.push(Written(0, None), bytes([b]), ends_turn=False) for b in "a€b€!".encode()]
    # the second € is held back: it may be the beginning of the stop text
    assert told == ["a", "", "", "", "€b", "", "", "", ""]
    assert "".join(told) == choice.text == "a€b" and choice.finish_reason == "stop"
    cut = Choice(0, Request([5]), [5], [], Reads())
    assert cut.push(Written(0, None), "€".encode()[:2], ends_turn=False) == ""
    assert cut.end("length") == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {}, "prompt is missing"),
        ("/v1/completions", {"prompt": []}, "prompt is missing"),
        ("/v1/completions", {"prompt": [1, "a"]}, "is a text or token ids"),
        ("/v1/completions", {"prompt": [10**9]}, "token id 1000000000 is out of range"),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens is 0 to"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1.5}, "max_tokens is a whole number"),
        ("/v1/completions", {"prompt": "a", "max_tokens": True}, "max_tokens is a whole number"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, "temperature is a number"),
        ("/v1/completions", {"prompt": "a", "temperature": 1e9}, "temperature is 0 to 100"),
        ("/v1/completions", {"prompt": "a", "n": 10**6}, "n is 1 to"),
        ("/v1/completions", {"prompt": "a", "logprobs": 1000}, "logprobs is -1 to"),
        ("/v1/completions", {"prompt": "a", "stop": [""]}, "stop is a text of 1 to"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix is not supported here"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias is not supp"),
        ("/v1/completions", {"prompt": "a", "nonsense": 1}, "unknown or unsupported: 'nonsense'"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 128, "n": 16, "best_of": 17}, "best_of"),
        (CHAT, {}, "messages is missing"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is system"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content is a text"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [1]}, "tools is not"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}]},
            "type is not supported",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "needs log"),
        ("/v1/completions", {"prompt": "a", "steer": {"vector": "nobody"}}, "no vector 'nobody'"),
        ("/v1/completions", {"prompt": "a", "steer": {"vector": "/etc/passwd"}}, "no vector '/etc"),
        ("/v1/completions", {"prompt": "a", "steer": {"vector": "../secret"}}, "no vector"),
        (
            "/v1/completions",
            {"prompt": "a", "steer": {"vector": "warm", "operator": "os:system"}},
            "operator 'os:system' is not known",
        ),
        (
            "/v1/completions",
            {"prompt": "a", "steer": {"vector": "warm", "layers": [99]}},
            "layer 99 is out of range",
        ),
        ("/v1/completions", {"prompt": "a", "ablate": "9.9"}, "out of range"),
        ("/v1/completions", {"prompt": "a", "ablate": {"heads": "0.1", "with": "mean"}}, "with"),
        ("/v1/completions", {"prompt": "a", "block": "x"}, "is not QUERIES->KEYS"),
        ("/v1/completions", {"prompt": "a", "lens": {"layers": "0..9"}}, "out of range"),
        ("/v1/completions", {"prompt": "a", "capture": {"sites": "nowhere"}}, "nowhere"),
        ("/v1/completions", {"prompt": "a", "patch": {"site": "l_out-1"}}, "patch[0].prompt"),
        ("/mia/lens", {"prompt": ""}, "prompt is missing"),
        ("/mia/attribute", {"prompt": "a"}, "answer is missing"),
        ("/mia/activations", {"prompt": "a"}, "sites is like"),
        ("/mia/vectors", {"name": "x", "expression": "warm +"}, "ends where a vector"),
        ("/mia/vectors", {"name": "../x", "expression": "warm"}, "a vector's name is"),
        ("/mia/vectors", {"name": "warm", "expression": "cold"}, "is a file of the server"),
    ],
)
def test_what_is_refused(client: Client, path: str, body: dict[str, Any], message: str) -> None:
    answer = client.post(path, **body)
    assert answer.status == 400, answer.data
    assert message in answer.error
    if "stream" not in body and path.startswith("/v1"):
        streamed = client.post(path, **body, stream=True)
        assert streamed.status == 400 and message in streamed.error


def test_a_prompt_that_is_too_long(client: Client) -> None:
    answer = client.post("/v1/completions", prompt=[5] * 9000)
    assert answer.status == 400
    assert answer.document["error"]["code"] == "context_length_exceeded"
    answer = client.post("/v1/completions", model="gpt-4", prompt="a")
    assert answer.status == 404 and "this server has served" in answer.error


def test_a_text_without_a_length_goes_as_far_as_there_is_room(model: Model) -> None:
    with serving(model, cells=64) as client:
        answer = client.post(CHAT, messages=[{"role": "user", "content": "a b c"}], ignore_eos=True)
        assert answer.status == 200, answer.data
        assert answer.document["usage"]["total_tokens"] == 65  # the last is not fed back
        full = client.post("/v1/completions", prompt=[5] * 60, ignore_eos=True)
        assert full.document["usage"]["completion_tokens"] == 5
        assert client.post("/v1/completions", prompt=[5] * 60, max_tokens=6).status == 400


def test_offsets_are_places_in_the_text(client: Client, model: Model) -> None:
    """Also behind a character whose bytes are several tokens."""
    prompt = "a \N{EURO SIGN} b \N{GRINNING FACE}!"
    ids = model.ids(prompt)
    assert any(len(model.piece(t)) > 1 and model.piece(t).startswith("<0x") for t in ids)
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 6, "echo": True, "logprobs": 1}
    choice = client.choice(**body, temperature=0)
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("<0x"):
            assert choice["text"][offset:].startswith(token)
    events = client.post("/v1/completions", **body, temperature=0, stream=True).events
    parts = [e["choices"][0]["logprobs"] for e in events]
    assert [x for part in parts if part for x in part["text_offset"]] == offsets


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_token_ids_and_labels(client: Client, model: Model, path: str) -> None:
    body: dict[str, Any] = {"max_tokens": 9, "temperature": 1.5, "seed": 4, "n": 2}
    body |= {"return_token_ids": True, "return_labels": True}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": PROMPT}]
        ids = model.ids(model.chat(body["messages"]))
    else:
        body["prompt"], ids = PROMPT, model.ids(PROMPT)
    whole = client.post(path, **body).document["choices"]
    events = client.post(path, **body, stream=True).events
    assert whole[0]["token_ids"] != whole[1]["token_ids"]
    for choice in whole:
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert choice["prompt_token_ids"] == own[0]["prompt_token_ids"] == ids
        assert not any("prompt_token_ids" in e for e in own[1:])
        assert [t for e in own for t in e["token_ids"]] == choice["token_ids"]
        assert len(choice["token_ids"]) == 9 or choice["finish_reason"] == "stop"
        rows = model.token_rows([*ids, *choice["token_ids"]])
        labels = [[t.id, visible(t.label), t.text] for t in rows]
        assert choice["prompt_labels"] == own[0]["prompt_labels"] == labels[: len(ids)]
        assert choice["labels"] == labels[len(ids) :]
        assert [t for e in own for t in e["labels"]] == choice["labels"]
    plain = client.choice(path, **{k: v for k, v in body.items() if not k.startswith("return")})
    assert not {"token_ids", "labels", "prompt_token_ids"} & plain.keys()


def test_the_model_and_its_tokens(client: Client, model: Model) -> None:
    told = client.get("/mia/model").document
    want = {name: getattr(model, name) for name in ("n_layer", "n_head", "n_head_kv", "n_embd")}
    assert want.items() <= told.items() and told["words"] == model.path.name
    assert told["name"] == "served" and told["architecture"] == "llama" and told["has_chat"]
    assert told["missing"] == {} and told["limits"] == {"logprobs": 20, "changes": 64}
    assert told["longest"] == 2048 and told["as_type"] == "" and told["has_bos"] == model.adds_bos
    rows = client.post("/mia/tokens", prompt=PROMPT).document["tokens"]
    want_rows = model.token_rows(model.ids(PROMPT))
    assert [(r["id"], r["label"], r["text"]) for r in rows] == [
        (t.id, visible(t.label), t.text) for t in want_rows
    ]
    chat = [{"role": "user", "content": PROMPT}]
    rows = client.post("/mia/tokens", messages=chat).document["tokens"]
    assert [r["id"] for r in rows] == model.ids(model.chat(chat))


def test_what_a_model_lacks_is_said(tiny: Any) -> None:
    with serving(tiny("mamba").model) as other:
        told = other.get("/mia/model").document
        assert told["missing"].keys() == {"attention", "attribution", "blocking"}
        assert "no softmax attention" in told["missing"]["blocking"] and not told["has_chat"]
