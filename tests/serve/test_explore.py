"""What the page asks for, part by part: the library's numbers, also under changes."""

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
from serving import Client, serving

from mia.lenses.followed import follow
from mia.measure.losses import log_softmax
from mia.methods.attention import attention_maps
from mia.methods.attribution import attribute_logit
from mia.methods.changes import Changes
from mia.methods.explore import explore
from mia.methods.explore_changes import said_of
from mia.model import Model
from mia.request import Capture, Request
from mia.serve.changes import Asked
from mia.serve.fields import Fields
from mia.serve.saying import changes_of
from mia.show.explorer import explorer_data

PROMPT = "The cat sat on the red mat"
#: changes of every kind, some of them for some tokens of the prompt only
CHANGES: list[dict[str, Any]] = [
    {},
    {"steer": {"vector": "warm", "coefficient": 2}, "ablate": "1.1"},
    {"steer": {"vector": "cold", "coefficient": 3, "tokens": "1..3"}, "block": ["4..->1"]},
    {"patch": {"site": "l_out-1", "prompt": "The dog", "from": "-2..-1", "to": "2,3"}},
    {"ablate": {"heads": "1.*", "with": "resample", "seed": 3}, "block": "5->0"},
]


def unpacked(document: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(document["data"])
    return np.frombuffer(data, "<" + document["type"]).reshape(document["shape"])


def _text(client: Client, n: int = 8, **changes: Any) -> tuple[list[int], int, list[float]]:
    """A text that was generated under changes: its tokens, those of the prompt, log-probabilities."""
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": n,
        "temperature": 0.9,
        "seed": 2,
        "ignore_eos": True,
    }
    choice = client.choice(**body, logprobs=0, return_token_ids=True, **changes)
    prompt, tokens = choice["prompt_token_ids"], choice["token_ids"]
    return [*prompt, *tokens], len(prompt), choice["logprobs"]["token_logprobs"]


def _ask(client: Client, part: str, text: list[int], n_prompt: int, **more: Any) -> Any:
    answer = client.post("/mia/explore", part=part, prompt=text, n_prompt=n_prompt, **more)
    assert answer.status == 200, answer.data
    assert answer.document["version"] == 2 and answer.document["part"] == part
    return answer.document


@pytest.mark.parametrize("i", range(len(CHANGES)))
def test_a_text_is_read_as_it_was_generated(client: Client, i: int) -> None:
    ids, n, logprobs = _text(client, **CHANGES[i])
    lens = _ask(client, "lens", ids, n, **CHANGES[i])
    own = unpacked(lens["alternatives"]["own"])
    np.testing.assert_allclose(own[n - 1 : -1], logprobs, rtol=0, atol=1e-5)
    last = _ask(client, "lens", ids, n, columns=f"{len(ids) - 3}..{len(ids) - 1}", **CHANGES[i])
    for name, axis in (("ids", 0), ("logprobs", 0), ("own", 0)):
        whole, some = (unpacked(x["alternatives"][name]) for x in (lens, last))
        np.testing.assert_allclose(some, whole.take(range(len(ids) - 3, len(ids)), axis), atol=1e-5)
    if CHANGES[i]:
        plain = unpacked(_ask(client, "lens", ids, n)["alternatives"]["own"])
        assert np.abs(plain - own)[n - 1 : -1].max() > 1e-3


def test_parts_are_those_of_the_page(client: Client, model: Model) -> None:
    report = explore(model, PROMPT, n_predict=6, k=4)
    (data,) = explorer_data(report)["views"]
    ids, n = [t.id for t in report.tokens], report.n_prompt
    text = _ask(client, "text", ids, n, k=4)
    assert text["tokens"] == data["tokens"] and text["n_prompt"] == n
    words = {k: v for k, v in data["words"].items() if k not in ("alternatives", "answers")}
    assert {k: v for k, v in text["words"].items() if k != "answers"} == words
    assert set(text["words"]["answers"]) == set(data["words"]["answers"]) & set(ids)
    lens = _ask(client, "lens", ids, n, k=4, columns="1..3,6")
    columns = [1, 2, 3, 6]
    assert lens["columns"] == columns
    assert (unpacked(lens["lens"]["ids"]) == report.lens.ids[:, columns]).all()
    np.testing.assert_allclose(
        unpacked(lens["lens"]["probs"]), report.lens.probs[:, columns], atol=1e-5
    )
    assert (unpacked(lens["alternatives"]["ids"]) == report.alternatives.ids[columns]).all()
    assert (unpacked(lens["alternatives"]["ranks"]) == report.alternatives.ranks[columns]).all()
    pieces = {int(t): piece for t, piece in lens["pieces"].items()}
    assert pieces.keys() == {*unpacked(lens["lens"]["ids"]).ravel()} | {
        *unpacked(lens["alternatives"]["ids"]).ravel()
    }
    assert all(data["pieces"][t] == piece for t, piece in pieces.items())
    assert report.attention is not None and report.attribution is not None
    for q in (0, 3, len(ids) - 1):
        looks = _ask(client, "attention", ids, n, at=q)
        weights = unpacked(looks["weights"]) / 65535 * looks["largest"]
        assert weights.shape == (model.n_layer, model.n_head, q + 1)
        np.testing.assert_allclose(weights, report.attention.weights[:, :, q, : q + 1], atol=2e-5)
    for t in (1, n, len(ids) - 1):
        shares, own = _ask(client, "attribution", ids, n, at=t), report.attribution[t - 1]
        assert own is not None
        for name in ("logit", "embed", "bias"):
            assert shares[name] == pytest.approx(getattr(own, name), abs=1e-4)
        for name in ("attn", "mlp", "heads"):
            np.testing.assert_allclose(unpacked(shares[name]), getattr(own, name), atol=1e-4)
    assert report.blocking is not None
    for t in (2, n + 1, len(ids) - 1):
        hidden = _ask(client, "blocking", ids, n, at=t)
        np.testing.assert_allclose(
            unpacked(hidden["drop"]), report.blocking.drop[t, : t - 1], atol=1e-4
        )
        assert 0 < hidden["floor"] < 1e-3


def test_parts_under_changes(client: Client, model: Model) -> None:
    changes: dict[str, Any] = {"ablate": "1.1,2.*", "block": ["2..->1"]}
    ids, n, _ = _text(client, **changes)
    edits = Changes(ablate="1.1,2.*", block=["2..->1"]).edits(model, ids)
    q, t = n + 2, n + 3
    maps = attention_maps(model, ids[: q + 1], edits=[e.on_text(len(ids), q + 1) for e in edits])
    looks = _ask(client, "attention", ids, n, at=q, **changes)
    weights = unpacked(looks["weights"]) / 65535 * looks["largest"]
    np.testing.assert_allclose(weights, maps.weights[:, :, q], atol=2e-5)
    assert (weights[:, :, 1] == 0).all()
    cut = [e.on_text(len(ids), t) for e in edits]
    shares = _ask(client, "attribution", ids, n, at=t, **changes)
    own = attribute_logit(model, ids[:t], ids[t], edits=cut)
    assert shares["logit"] == pytest.approx(own.logit, abs=1e-4)
    np.testing.assert_allclose(unpacked(shares["heads"]), own.heads, atol=1e-4)
    assert np.abs(own.heads[2]).max() == 0
    hidden = _ask(client, "blocking", ids, n, at=t, **changes)
    drop = unpacked(hidden["drop"])
    assert abs(drop[1]) < 1e-5  # nobody attends to it anyway
    losses = []
    for more in ([], ["3..->2"]):
        both = Changes(ablate="1.1,2.*", block=["2..->1", *more]).edits(model, ids[:t])
        logits = model.run([Request(ids[:t], both)])[0].logits
        assert logits is not None
        losses.append(-log_softmax(logits)[0, ids[t]])
    assert drop[2] == pytest.approx(losses[1] - losses[0], abs=1e-4)


def test_an_architecture_is_not_blamed_for_changes(client: Client) -> None:
    ids, n, _ = _text(client)
    steered = _ask(client, "attribution", ids, n, at=n, steer="warm")
    assert steered["why"].endswith("(what is changed adds to it, or llama adds something else)")


def test_tokens_followed(client: Client, model: Model) -> None:
    ids, n, _ = _text(client)
    at, some = n + 1, [5, 77, ids[n + 2]]
    found = _ask(client, "follow", ids, n, at=at, ids=some)
    result = model.run([Request(ids[: at + 1], captures=[Capture("l_out", at)])])[0]
    rows = np.concatenate(list(result.captures.values()))
    want = follow(model.lens, rows, np.tile(np.array(some), (model.n_layer, 1)))
    np.testing.assert_allclose(unpacked(found["logprobs"]), want.logprobs, atol=1e-4)
    assert (unpacked(found["ranks"]) == want.ranks).all()
    assert found["pieces"].keys() == {str(t) for t in some}


def test_words_of_a_token(client: Client, model: Model) -> None:
    report = explore(model, PROMPT, n_predict=4, k=3)
    ids, n = [t.id for t in report.tokens], report.n_prompt
    for at in (1, n, len(ids) - 1):
        others = report.alternatives.ids[at - 1].tolist()
        words = _ask(client, "words", ids, n, at=at, ids=others)
        assert words["prompts"] == report.words.prompts[at - 1]
        assert words["answers"] == (ids[at] in report.words.answers)
        assert list(words["alternatives"].values()) == report.words.alternatives[at - 1]


def test_messages_are_a_text_too(client: Client, model: Model) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = client.post("/mia/explore", part="text", messages=messages).document
    assert [t[0] for t in text["tokens"]] == model.ids(model.chat(messages))


@pytest.mark.parametrize("changes", CHANGES[:4])
def test_a_generated_text_is_not_decoded_again(
    client: Client, decoded: list[int], changes: dict[str, Any]
) -> None:
    ids, n, _ = _text(client, 24, **changes)
    decoded.clear()
    columns = list(range(len(ids) - 8, len(ids)))
    _ask(client, "lens", ids, n, columns=columns, **changes)
    assert sum(decoded) == 8


def test_what_is_wrong_is_said(client: Client) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"part": "nothing"}, "part is one of text, lens"),
        ({}, "part is one of"),
        ({"part": "lens", "n_prompt": 99}, "n_prompt is 1 to"),
        ({"part": "lens", "columns": "50.."}, "columns"),
        ({"part": "lens", "columns": []}, "columns"),
        ({"part": "follow", "at": 1}, "ids are missing"),
        ({"part": "follow", "at": 1, "ids": [10**9]}, "ids are token ids"),
        ({"part": "follow", "at": 1, "ids": list(range(65))}, "ids are 65; 64 are the most"),
        ({"part": "attention", "at": 99}, "at is 0 to"),
        ({"part": "attribution", "at": 0}, "at is 1 to"),
        ({"part": "blocking", "at": 1}, "at is 2 to"),
        ({"part": "blocking", "prompt": [5, 6]}, "at is 2 at least"),
        ({"part": "lens", "other": 1}, "unknown or unsupported: 'other'"),
        ({"part": "lens", "k": 21}, "k is 1 to 20"),
        ({"part": "lens", "lens": {}}, "lens and capture belong"),
    ]
    for body, message in cases:
        answer = client.post("/mia/explore", **{"prompt": PROMPT, **body})
        assert answer.status == 400 and message in answer.error, (body, answer.data)


def test_what_the_architecture_lacks_is_said(tiny: Any) -> None:
    with serving(tiny("mamba").model) as other:
        body = {"prompt": [5, 6, 7, 8], "at": 3}
        for part in ("attention", "attribution", "blocking"):
            answer = other.post("/mia/explore", part=part, **body)
            assert answer.status == 400 and "no softmax attention" in answer.error
            assert answer.document["error"]["code"] == "missing"
        assert other.post("/mia/explore", part="lens", prompt=[5, 6, 7, 8]).status == 200


def _views(page: bytes) -> list[Any]:
    data = re.search(
        r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.decode(), re.S
    )
    assert data is not None
    return list(json.loads(data[1])["views"])


def test_the_page_of_a_text_as_a_file(client: Client, model: Model) -> None:
    changes: dict[str, Any] = {"steer": {"vector": "warm", "coefficient": 2}, "ablate": "1.1"}
    plain, n, _ = _text(client)
    changed, _, _ = _text(client, **changes)
    body = {"prompt": plain[:n], "written": plain[n:], "k": 4}
    answer = client.post("/mia/page", **body, changed=changed[n:], **changes, title="a </title> b")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-disposition"] == 'attachment; filename="explore.html"'
    assert b"<title>a &lt;/title&gt; b</title>" in answer.data
    first, second = _views(answer.data)
    assert [first["label"], second["label"]] == ["unchanged", "changed"]
    assert [t[0] for t in first["tokens"]] == plain and [t[0] for t in second["tokens"]] == changed
    assert second["options"] == [[0, ["--ablate", "1.1"]], [0, ["--steer=2*warm.safetensors"]]]
    assert second["python"] == "Changes(ablate='1.1', steer=['2*warm.safetensors'])"
    lens = _ask(client, "lens", changed, n, k=4, **changes)
    for name in ("own", "logprobs"):
        a, b = unpacked(lens["alternatives"][name]), unpacked(second["alternatives"][name])
        np.testing.assert_allclose(a, b, atol=1e-5)
    (only,) = _views(client.post("/mia/page", **body, changed=None).data)
    assert only["label"] == "the text" and only["options"] == [] and only["n_prompt"] == n
    assert {k: v for k, v in only.items() if k != "label"}.keys() == first.keys() - {"label"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "written is missing"),
        ({"written": [5] * 3000}, "written are 3000"),
        ({"written": [5], "changed": [5]}, "give both or none"),
        ({"written": [5], "ablate": "1.1"}, "give both or none"),
        ({"written": [5], "other": 1}, "unknown or unsupported"),
        ({"written": [-1]}, "written are token ids"),
    ],
)
def test_a_page_that_cannot_be(client: Client, more: dict[str, Any], message: str) -> None:
    answer = client.post("/mia/page", prompt=PROMPT, **more)
    assert answer.status == 400 and message in answer.error


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (
            {"steer": [{"vector": "warm - 0.5*cold", "coefficient": -4}, "cold"]},
            ["--steer=-4*(warm.safetensors - 0.5*cold.safetensors) + cold.safetensors"],
        ),
        (
            {"steer": [{"vector": "warm", "coefficient": 1.5, "layers": [1, 2]}]},
            ["--steer=1.5*warm.safetensors", "--steer-layers", "1,2"],
        ),
        (
            {"steer": {"vector": "warm", "coefficient": None, "operator": None, "layers": None}},
            ["--steer=warm.safetensors"],
        ),
        (
            {"steer": {"vector": "warm", "coefficient": -0.12345678}},
            ["--steer=-0.12345678*warm.safetensors"],
        ),
        (
            {"patch": {"site": "l_out-1", "prompt": [5], "values": None, "mode": None, "to": None}},
            ["--patch", "l_out-1", "residual-1.safetensors", "-1", "5"],
        ),
        ({"steer": {"vector": "warm", "operator": "project_out"}}, None),
        ({"steer": {"vector": "warm", "tokens": "-1"}}, None),
        ({"steer": [{"vector": "warm", "layers": "1"}, "cold"]}, None),
        ({"patch": {"site": "l_out-1", "values": [1.0], "to": 2}}, None),
        (
            {"patch": {"site": "l_out-1", "prompt": [5], "to": [2, -1]}, "block": "3..->0"},
            ["--patch", "l_out-1", "residual-1.safetensors", "-1", "2,5", "--block", "3..->0"],
        ),
        (
            {"ablate": {"heads": ["1.1", "2.*"], "with": "resample", "seed": 4}},
            ["--ablate", "1.1,2.*", "--ablate-with", "resample", "--ablate-seed", "4"],
        ),
    ],
)
def test_changes_as_options(
    client: Client, model: Model, fields: dict[str, Any], options: list[str] | None
) -> None:
    server = client.server
    asked = Asked.of(Fields(fields), server.limits)
    said = said_of(changes_of(asked, server.vectors), model, [5] * 6)
    words = None if said.options is None else [w for _, words in said.options for w in words]
    assert words == options


@pytest.mark.slow
def test_smollm2(smollm2: Model, decoded: list[int]) -> None:
    with serving(smollm2) as client:
        for changes in ({}, {"ablate": "10.*", "block": "3..->1"}):
            body: dict[str, Any] = {"prompt": "The Colosseum is in the city of", "bos": True}
            body |= {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
            choice = client.choice(**body, return_token_ids=True, **changes)
            prompt, written = choice["prompt_token_ids"], choice["token_ids"]
            ids, n = [*prompt, *written], len(prompt)
            decoded.clear()
            columns = list(range(len(ids) - 8, len(ids)))
            lens = _ask(client, "lens", ids, n, columns=columns, **changes)
            assert sum(decoded) == 8
            ranks = unpacked(lens["alternatives"]["ranks"])[:-1]
            assert ranks.max() <= 3  # greedy, but for rounding to 8 bits
            best = unpacked(lens["alternatives"]["logprobs"])[:, 0]
            last = np.log(unpacked(lens["lens"]["probs"])[-1, :, 0])
            assert np.abs(np.exp(best) - np.exp(last)).max() < 0.05
            hidden = _ask(client, "blocking", ids[: n + 1], n, at=n, **changes)
            assert unpacked(hidden["drop"]).max() > 5 * hidden["floor"] > 0
        health = client.health()
        assert health["cells"]["used"] == health["pending"] == 0
