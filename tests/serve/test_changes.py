"""mia's own fields and routes: the same numbers as the library gives."""

import base64
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors, save as save_safetensors
from serving import Client, serving

from mia.edits import Edit
from mia.methods.attribution import attribute
from mia.methods.changes import Changes
from mia.methods.logit_lens import logit_lens
from mia.model import Model
from mia.request import Capture, Request
from mia.serve.limits import Limits
from mia.steering import Steering
from mia.vectors.vector import load

PROMPT = "The cat sat on the mat"


def _text(model: Model, edits: list[Edit], n: int = 12) -> str:
    request = Request(model.ids(PROMPT), edits, n_predict=n)
    tokens = model.run([request])[0].tokens
    return b"".join(model.token_bytes(t) for t in tokens).decode(errors="replace")


def _asked(client: Client, **fields: Any) -> str:
    return str(client.choice(prompt=PROMPT, max_tokens=12, temperature=0, **fields)["text"])


def test_each_request_has_its_own_changes(client: Client, model: Model, folder: Any) -> None:
    warm, cold = (load(folder / f"{name}.safetensors") for name in ("warm", "cold"))
    ids = model.ids(PROMPT)
    plain = _text(model, [])
    cases: list[tuple[dict[str, Any], list[Edit]]] = [
        ({"steer": "warm"}, Steering(warm).edits()),
        (
            {"steer": {"vector": "warm - 0.5*cold", "coefficient": 3, "layers": "1"}},
            Steering(warm - 0.5 * cold, coeff=3, layers=[1]).edits(),
        ),
        (
            {"steer": [{"vector": "cold", "operator": "project_out"}, "warm"]},
            [*Steering(cold, "project_out").edits(), *Steering(warm).edits()],
        ),
        (
            {"steer": {"vector": "warm", "coefficient": 9, "tokens": "-1"}},
            Steering(warm, coeff=9, tokens=[-1]).edits(),
        ),
        ({"ablate": "0.1,1.*"}, Changes(ablate="0.1,1.*").edits(model, ids)),
        (
            {"ablate": {"heads": ["1.2"], "with": "resample", "seed": 4}},
            Changes(ablate="1.2", ablate_with="resample", ablate_seed=4).edits(model, ids),
        ),
        ({"block": ["3..->0"]}, Changes(block=["3..->0"]).edits(model, ids)),
        (
            {"patch": {"site": "l_out-1", "prompt": "The dog", "from": "-1", "to": "-1"}},
            [Edit("l_out-1", "replace", model.look("The dog", "l_out-1")[-1], tokens=-1)],
        ),
        (
            {"patch": {"site": "l_out-0", "values": [1.0] * model.n_embd, "mode": "add", "to": 2}},
            [Edit("l_out-0", "add", np.ones(model.n_embd), tokens=2)],
        ),
    ]
    texts = []
    for fields, edits in cases:
        texts.append(_asked(client, **fields))
        assert texts[-1] == _text(model, edits), fields
    assert sum(text != plain for text in texts) >= 7
    assert _asked(client) == plain


def test_lens_and_capture_ride_along(client: Client, model: Model) -> None:
    body: dict[str, Any] = {
        "lens": {"layers": "0,2", "k": 3, "tokens": "0,-1"},
        "capture": {"sites": ["l_out-1", "kq_soft_max-0"], "tokens": "1..2", "generated": True},
    }
    choice = client.choice(prompt=PROMPT, max_tokens=4, temperature=0, ablate="1.1", **body)
    ids = model.ids(PROMPT)
    edits = Changes(ablate="1.1").edits(model, ids)
    captures = [Capture(["l_out-1", "kq_soft_max-0"], [1, 2], True), Capture("l_out", None, True)]
    result = model.run([Request(ids, edits, captures, n_predict=4)])[0]
    for site, array in result.of(captures[0]).items():
        given = choice["mia"]["activations"][str(site)]
        data = np.frombuffer(base64.b64decode(given["float32"]), "<f4").reshape(given["shape"])
        np.testing.assert_allclose(data, array, rtol=0, atol=1e-5)
    rows = choice["mia"]["lens"]
    n = len(ids)
    assert [(r["layer"], r["token_index"]) for r in rows] == [
        (i, t) for i in (0, 2) for t in (0, n - 1, n, n + 1, n + 2)
    ]
    every = result.of(captures[1])
    for row in rows:
        site = next(s for s in every if s.layer == row["layer"])
        read = model.lens.read(every[site][[row["token_index"]]], 3)
        assert [t["id"] for t in row["top"]] == read.ids[0].tolist()
    *_, last = client.post(
        "/v1/completions",
        prompt=PROMPT,
        max_tokens=4,
        temperature=0,
        ablate="1.1",
        stream=True,
        **body,
    ).events
    again = last["choices"][0]["mia"]  # with a prefix that was there: up to the last bits
    assert [[t["id"] for t in r["top"]] for r in again["lens"]] == [
        [t["id"] for t in r["top"]] for r in rows
    ]
    assert again["activations"].keys() == choice["mia"]["activations"].keys()


def test_looks_are_the_library_s(client: Client, model: Model) -> None:
    ids = model.ids(PROMPT)
    edits = Changes(ablate="1.1").edits(model, ids)
    lens = client.post("/mia/lens", prompt=PROMPT, layers="1", k=2, ablate="1.1").document
    want = logit_lens(model, ids, "l_out", layers="1", k=2, tokens="0..", edits=edits).document()
    assert lens["tokens"] == want["tokens"]
    for a, b in zip(lens["lens"], want["lens"], strict=True):
        assert [t["id"] for t in a["top"]] == [t["id"] for t in b["top"]]
    parts = client.post("/mia/attribute", prompt=PROMPT, answer="a").document
    assert parts["logit"] == pytest.approx(attribute(model, ids, "a").document()["logit"], abs=1e-4)
    heads = client.post("/mia/attention", prompt=PROMPT, heads="1.2").document
    assert heads["heads"] and heads["layers"] == [1]
    data = client.post("/mia/activations", prompt=PROMPT, sites="l_out-1", tokens="-1").data
    arrays = load_safetensors(data)
    rows = model.look(PROMPT, "l_out-1", tokens=-1).arrays["resid_post.1"]
    np.testing.assert_allclose(arrays["resid_post.1"], rows, atol=1e-5)
    tokens = client.post("/mia/tokens", prompt=PROMPT).document
    assert [t["id"] for t in tokens["tokens"]] == ids
    assert client.post("/mia/tokens", prompt=ids).document["text"] == model.detokenize(ids)


def test_vectors(client: Client, model: Model, folder: Any) -> None:
    listed = client.get("/mia/vectors").document["vectors"]
    assert [v["name"] for v in listed] == ["cold", "warm"]
    assert [v["file"] for v in listed] == ["cold.safetensors", "warm.safetensors"]
    norms = load(folder / "warm.safetensors").norms
    assert listed[1]["norms"] == {str(i): pytest.approx(x, abs=1e-6) for i, x in norms.items()}
    sum_ = client.post("/mia/vectors", name="both", expression="warm + cold").document
    assert sum_["layers"] == [1, 2]
    want = load(folder / "warm.safetensors") + load(folder / "cold.safetensors")
    assert _asked(client, steer="both") == _text(model, Steering(want).edits())
    arrays = {"direction.1": np.ones(model.n_embd, np.float32)}
    data = save_safetensors(arrays, metadata={"site": "resid_post"})
    answer = client.ask(
        "POST", "/mia/vectors/mine", data, **{"Content-Type": "application/octet-stream"}
    )
    assert answer.status == 200, answer.data
    edit = Edit("l_out-1", "add", np.ones(model.n_embd))
    assert _asked(client, steer="mine") == _text(model, [edit])
    again = client.post("/mia/vectors", name="mine", expression="3*mine").document
    assert again["name"] == "mine"
    edit = Edit("l_out-1", "add", 3 * np.ones(model.n_embd))
    assert _asked(client, steer="mine") == _text(model, [edit])  # nothing old is remembered
    uploaded = client.get("/mia/vectors").document["vectors"]
    assert {v["name"]: v["file"] for v in uploaded if v["uploaded"]} == {"both": None, "mine": None}
    for name in ("mine", "both"):
        assert client.ask("DELETE", f"/mia/vectors/{name}").status == 200
    assert client.ask("DELETE", "/mia/vectors/warm").status == 404
    answer = client.ask(
        "POST", "/mia/vectors/bad", b"x" * 99, **{"Content-Type": "application/octet-stream"}
    )
    assert answer.status == 400 and "/" not in answer.error.partition(":")[0]


def test_several_captures(client: Client, model: Model) -> None:
    first, second = {"sites": "l_out-0", "tokens": "-1"}, {"sites": ["l_out-1", "attn_out-1"]}
    choice = client.choice(prompt=PROMPT, max_tokens=1, capture=[first, second])
    shapes = {site: a["shape"] for site, a in choice["mia"]["activations"].items()}
    n = len(model.ids(PROMPT))
    assert shapes == {
        "resid_post.0": [1, model.n_embd],
        "resid_post.1": [n, model.n_embd],
        "attn_out.1": [n, model.n_embd],
    }
    answer = client.post("/v1/completions", prompt=PROMPT, capture=[second, second])
    assert answer.status == 400 and "which another capture has" in answer.error


def test_limits_are_of_one_request(model: Model) -> None:
    """Not of each capture, prompt or completion."""
    ids = [5] * 10
    size = 10 * model.n_embd
    one = {"sites": "l_out-0"}
    with serving(model, limits=Limits(captured=2 * size, patch_tokens=20)) as client:

        def status(**body: Any) -> int:
            return client.post("/v1/completions", max_tokens=1, **body).status

        assert status(prompt=ids, n=2, capture=one) == 200
        assert status(prompt=ids, n=3, capture=one) == 400
        assert status(prompt=[ids, ids, ids], capture=one) == 400
        assert status(prompt=ids, capture=[{"sites": f"l_out-{i}"} for i in range(3)]) == 400
        assert status(prompt=ids, capture=one, lens={"layers": "1,2", "tokens": "0.."}) == 400
        patches = [{"site": "l_out-1", "prompt": [k] * 10} for k in (6, 7, 8)]
        assert status(prompt=ids, patch=patches[:2]) == 200
        assert status(prompt=ids, patch=patches) == 400


def test_another_prompt_is_read_once_for_a_request(
    client: Client, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    plain = type(model).look

    def look(self: Model, prompt: Any, *more: Any, **options: Any) -> Any:
        looks.append(prompt)
        return plain(self, prompt, *more, **options)

    monkeypatch.setattr(type(model), "look", look)
    patch = {"site": "l_out-1", "prompt": "The dog"}
    body = {"prompt": [[5, 6], [7, 8]], "patch": [patch, {**patch, "mode": "add"}], "n": 2}
    assert client.post("/v1/completions", **body, max_tokens=1).status == 200
    assert len(looks) == 1


def test_changes_of_all_prompts_have_a_limit(model: Model, folder: Any) -> None:
    n = model.n_embd
    with serving(model, vectors=folder, limits=Limits(edited=5 * n)) as client:
        patch = {"site": "l_out-1", "values": [1.0] * n, "to": 0}
        steer = {"vector": "warm", "tokens": "0", "layers": "1"}
        for body in ({"patch": patch}, {"patch": [patch] * 2}, {"steer": steer}, {"steer": "warm"}):
            for prompts, ok in (([[5, 6]] * 2, True), ([[5, i] for i in range(3, 9)], False)):
                answer = client.post("/v1/completions", prompt=prompts, max_tokens=1, **body)
                if ok or body == {"steer": "warm"}:  # the same edits for all prompts
                    assert answer.status == 200, answer.data
                else:
                    assert answer.status == 400 and f"{5 * n} are the most" in answer.error
        taken = {"site": "l_out-1", "prompt": [5, 6, 7]}
        assert client.post("/v1/completions", prompt=[5], patch=taken, max_tokens=1).status == 200
        two = [taken, {"site": "l_out-1", "prompt": [5, 6, 8]}]
        answer = client.post("/v1/completions", prompt=[5], patch=two, max_tokens=1)
        assert answer.status == 400 and f"patches take {6 * n} numbers" in answer.error
        text = {"site": "l_out-1", "prompt": "a" * 2_000_000}
        answer = client.post("/v1/completions", prompt=[5], patch=text, max_tokens=1)
        assert answer.status == 400 and "prompt is too long" in answer.error
        heads = {"ablate": {"heads": "1.*,2.0", "with": "resample"}}
        for prompt, status in (([5, 6], 200), ([5, 6, 7], 400)):
            answer = client.post("/v1/completions", prompt=prompt, **heads, max_tokens=1)
            assert answer.status == status
        assert f"heads take {6 * n} numbers of this prompt" in answer.error
