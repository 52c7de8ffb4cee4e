"""Many clients at once, those that leave, and those that should not have come."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE
from typing import Any

import hostile
import numpy as np
import pytest
from serving import Client, serving

from mia.errors import UsageError
from mia.model import Model
from mia.serve.address import check_address
from mia.serve.changes import Reads
from mia.serve.limits import Limits
from mia.serve.scheduler import Scheduler


def _until_idle(client: Client) -> Any:
    """The server's counters, when everything is over: nothing is lost."""
    for _ in range(600):
        health = client.health()
        if not (health["pending"] or health["running"] or health["waiting"]):
            break
        time.sleep(0.02)
    assert health["cells"]["used"] == health["sequences"]["used"] == 0, health
    assert health["pending"] == health["running"] == health["waiting"] == 0, health
    assert health["cells"]["kept"] <= health["cells"]["all"]
    return health


def _bodies() -> list[dict[str, Any]]:
    """Eight clients with vectors, ablations and seeds of their own."""
    bodies = []
    for i in range(8):
        body: dict[str, Any] = {
            "prompt": f"The cat sat on the {['mat', 'dog', 'red sky'][i % 3]}",
            "max_tokens": 16 + 3 * i,
            "temperature": 1.0 if i % 2 else 0.0,
            "seed": i,
            "logprobs": 0,
        }
        if i in (1, 2, 5, 6):
            name, layers = ("warm", "1") if i % 2 else ("cold", "1..2")
            body["steer"] = {"vector": name, "coefficient": 0.4 * i, "layers": layers}
        if i in (2, 3, 7):
            body["ablate"] = f"{i % 3}.{i % 6}"
        if i == 4:
            body["block"] = ["4..->1"]
        bodies.append(body)
    return bodies


@pytest.mark.parametrize("streamed", [False, True])
def test_eight_at_once_get_the_tokens_of_each_alone(client: Client, streamed: bool) -> None:
    def tokens(body: dict[str, Any]) -> list[str]:
        answer = client.post("/v1/completions", **body, stream=streamed)
        assert answer.status == 200, answer.data
        if not streamed:
            return list(answer.document["choices"][0]["logprobs"]["tokens"])
        parts = [event["choices"][0]["logprobs"] for event in answer.events]
        return [token for part in parts if part for token in part["tokens"]]

    bodies = _bodies()
    alone = [tokens(body) for body in bodies]
    assert len({tuple(t) for t in alone}) == 8
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(tokens, bodies)) == alone
    _until_idle(client)


def test_a_conversation_s_prefix_stays(client: Client, decoded: list[int]) -> None:
    messages = [{"role": "user", "content": "The cat sat on the red mat and the blue dog. " * 3}]
    body = {"max_tokens": 6, "temperature": 0, "steer": {"vector": "warm", "coefficient": 0.2}}
    first = client.post("/v1/chat/completions", messages=messages, **body).document
    n_prompt = first["usage"]["prompt_tokens"]
    decoded.clear()
    messages = [*messages, first["choices"][0]["message"], {"role": "user", "content": "And?"}]
    second = client.post("/v1/chat/completions", messages=messages, **body).document
    assert second["usage"]["prompt_tokens"] > n_prompt
    assert decoded[0] <= second["usage"]["prompt_tokens"] - n_prompt + 6
    _until_idle(client)


@pytest.mark.parametrize("leave", [hostile.vanishes, hostile.leaves_before_the_answer])
def test_who_leaves_is_cancelled(client: Client, leave: Callable[..., None]) -> None:
    before = client.health()["cancelled"]
    for i in range(4):
        leave(client.port, np.random.default_rng(i))
    n_cancelled = _until_idle(client)["cancelled"] - before
    # who left before the server had read its request was never let in
    assert n_cancelled == 4 or (leave is hostile.leaves_before_the_answer and n_cancelled < 4)


def test_too_many_are_asked_to_come_back(model: Model) -> None:
    limits = Limits(waiting=3)
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True}
    with serving(model, limits=limits) as client, ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/completions", **body), range(9)))
        statuses = sorted(a.status for a in answers)
        assert set(statuses) == {200, 503} and statuses.count(200) >= 3
        refused = next(a for a in answers if a.status == 503)
        assert refused.headers["retry-after"] == "1"
        assert "requests wait already" in refused.error
        assert _until_idle(client)["refused"] == statuses.count(503)


def test_hostile_requests_harm_nobody(client: Client) -> None:
    rng = np.random.default_rng(0)
    good = _bodies()[2]
    want = client.choice(**good)["text"]
    statuses: list[int] = []
    for i in range(240):
        if i % 4 == 3:
            hostile.ILL[i // 4 % len(hostile.ILL)](client.port, rng)
        else:
            statuses.append(hostile.asks(client.port, rng))
        if i % 40 == 0:
            assert client.choice(**good)["text"] == want
    assert {200, 400} <= set(statuses) <= {200, 400, 404, 413, 415}, set(statuses)
    _until_idle(client)
    assert client.choice(**good)["text"] == want


def test_wild_edits_fail_alone(client: Client) -> None:
    good = _bodies()[1]
    want = client.choice(**good)["text"]
    wild = {
        "prompt": [5, 6],
        "steer": {"vector": "warm", "coefficient": 1e6, "operator": "replace"},
    }
    huge = {"site": "l_out-0", "values": [9e29] * 48}
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(client.post, "/v1/completions", **good) for _ in range(3)]
        asked += [pool.submit(client.post, "/v1/completions", **wild)]
        bad = pool.submit(client.post, "/v1/completions", prompt=[5, 6], patch=huge).result()
        for answer in asked[:3]:
            assert answer.result().document["choices"][0]["text"] == want
    assert bad.status == 400 and "overflow" in bad.error
    _until_idle(client)


# -- who may come --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:99"}, 200),
        ({"Host": "127.0.0.1:1"}, 200),
        ({"Host": "[::1]:8420"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example:8420"}, 403),
        ({"Host": "192.168.0.1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost:8420", "Origin": "http://localhost:8420"}, 200),
    ],
)
def test_other_names_and_origins_are_refused(
    client: Client, headers: dict[str, str], status: int
) -> None:
    for path in ("/health", "/v1/models"):
        answer = client.get(path, **headers)
        assert answer.status == status, path
        assert not any(h.lower().startswith("access-control") for h in answer.headers)


def test_a_form_of_another_page_is_refused(client: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.ask("POST", "/v1/completions", b'{"prompt": "a"}', **{"Content-Type": kind})
        assert answer.status == 415
    assert client.ask("OPTIONS", "/v1/completions").status == 405


def test_a_key(model: Model) -> None:
    with serving(model, key="correct-horse") as client:
        assert client.post("/v1/completions", prompt="a", max_tokens=1).status == 200
        assert client.get("/v1/models", Host="192.168.0.7:8420").status == 200
        for given in (
            "Bearer wrong-horse",
            "Bearer ",
            "correct-horse",
            "Basic correct-horse",
            "Bearer ü",
        ):
            answer = client.get("/v1/models", Authorization=given)
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/health", Authorization=given).document == {"status": "ok"}
        assert "cells" in client.health()
        client.key = None
        for path in ("/v1/models", "/mia/model", "/mia/vectors"):
            assert client.get(path).status == 401
        assert client.get("/health").document == {"status": "ok"}
        page = client.get("/")
        assert page.status == 200 and b"served" not in page.data
        assert client.get("/", Host="evil.example").status == 403


def test_bodies_have_an_end(model: Model) -> None:
    with serving(model, limits=Limits(body=1000, body_seconds=0.2)) as client:
        answer = client.ask("POST", "/v1/completions", b" " * 2000)
        assert answer.status == 413 and "larger than 1000 bytes" in answer.error
        hostile.cuts_its_body(client.port, np.random.default_rng(0))
        answer = client.ask("POST", "/v1/completions", b"{", **{"Content-Length": "50"})
        assert answer.status == 408
        _until_idle(client)


def test_all_bodies_together_have_a_limit(model: Model) -> None:
    limits = Limits(bodies=1000, body_seconds=20)
    begun = hostile.head("/v1/completions", 900, "localhost") + b" " * 600
    with serving(model, limits=limits) as client:
        body = {"prompt": "a" * 300, "max_tokens": 1}
        assert client.post("/v1/completions", **body).status == 200
        with socket.create_connection(("127.0.0.1", client.port)) as s:
            s.sendall(begun)
            time.sleep(0.1)
            answer = client.post("/v1/completions", prompt="a" * 600, max_tokens=1)
            assert answer.status == 503 and answer.headers["retry-after"] == "1"
            assert "too large together" in answer.error
            assert client.post("/v1/completions", **body).status == 200
        time.sleep(0.1)
        answer = client.post("/v1/completions", prompt="a" * 600, max_tokens=1)
        assert answer.status == 200  # what that client held is free


@pytest.mark.parametrize(
    ("host", "key", "message"),
    [
        ("0.0.0.0", None, "other machines can reach 0.0.0.0"),
        ("::", None, "other machines can reach ::"),
        ("example.com", "", "at least 8"),
        ("127.0.0.1", "short", "at least 8"),
        ("127.0.0.1", "with a\nline", "at least 8"),
        ("127.0.0.1", " spaces at its ends ", "no space"),
    ],
)
def test_addresses_that_need_a_key(host: str, key: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_address(host, key)


@pytest.mark.parametrize(
    ("host", "key"), [("127.0.0.1", None), ("::1", None), ("localhost", None), ("0.0.0.0", "k" * 8)]
)
def test_addresses_that_do(host: str, key: str | None) -> None:
    check_address(host, key)


def test_an_answer_that_fails_ends_its_own_request_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def document(self: Reads, *_: Any) -> dict[str, Any]:
        raise KeyError("of this one")

    monkeypatch.setattr(Reads, "document", document)
    answer = client.post("/v1/completions", prompt="The cat", max_tokens=2)
    assert answer.status == 500 and "of this one" in answer.error
    monkeypatch.undo()
    assert client.choice(prompt="The cat", max_tokens=2)["finish_reason"]
    _until_idle(client)


def test_the_model_s_thread_outlives_its_faults(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(*_: Any) -> None:
        raise RuntimeError("a fault of the engine")

    monkeypatch.setattr(Scheduler, "_cancel", finish)
    assert client.choice(prompt="The cat", max_tokens=2)["finish_reason"]
    monkeypatch.undo()
    assert client.choice(prompt="The cat", max_tokens=2)["finish_reason"]
    _until_idle(client)


def test_connections_that_say_nothing_are_closed(model: Model) -> None:
    with serving(model, limits=Limits(connections=4, body_seconds=2)) as client:
        silent = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(4)]
        silent[0].sendall(b"GET /health HT")
        silent[1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        assert b"\r\n\r\n" in silent[1].recv(4096)
        time.sleep(0.1)
        assert client.get("/health").status == 503
        for _ in range(200):
            time.sleep(0.05)
            if (status := client.get("/health").status) == 200:
                break
        assert status == 200
        for connection in silent:
            connection.settimeout(5)
            while connection.recv(4096):
                pass  # to the end
            connection.close()


def test_the_end_of_the_server_ends_what_is_under_way(model: Model) -> None:
    with serving(model) as client, ThreadPoolExecutor(3) as pool:
        body = {"prompt": "The cat", "max_tokens": 2000, "ignore_eos": True}
        whole = pool.submit(client.post, "/v1/completions", **body)
        streamed = pool.submit(client.post, "/v1/completions", **body, stream=True)
        for _ in range(500):
            if client.health()["running"] == 2:
                break
            time.sleep(0.01)
        client.server.scheduler.stop()
        assert whole.result(10).status == 503 and "stopping" in whole.result().error
        assert b"the server is stopping" in streamed.result(10).data
        late = pool.submit(client.post, "/v1/completions", prompt="a")
        assert late.result(10).status == 503
        assert pool.submit(client.post, "/mia/tokens", prompt="a").result(10).status == 503


def test_ctrl_c_shows_no_traceback(model: Model) -> None:
    code = (
        "import asyncio, sys; from mia import Model; from mia.serve import serve; "
        "serve(Model(sys.argv[1], threads=1, ctx=2048), port=0, "
        "ready=lambda url: asyncio.get_running_loop() and print(url, flush=True))"
    )
    command = [sys.executable, "-c", code, str(model.path)]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip().removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=20)
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), kind)
        response = connection.getresponse()
        response.read(20)
        process.send_signal(signal.SIGINT)
        assert b"the server is stopping" in response.read()
        connection.close()
        process.wait(20)
        assert "ERROR" not in process.stderr.read().replace("KeyboardInterrupt", "")
