"""Requests that a server should not get, and clients that do not behave."""

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/mia/lens",
    "/mia/attention",
    "/mia/activations",
    "/mia/attribute",
    "/mia/explore",
    "/mia/tokens",
    "/mia/vectors",
    "/mia/vectors/x",
]
_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    -(2**63),
    "",
    "\x00\x1b[2J<script>",
    "../../etc/passwd",
    "a" * 5000,
    [],
    [[]],
    [None],
    [10**20],
    {},
    {"a": {"b": []}},
    [{"vector": "warm"}] * 100,
    {"vector": "warm", "coefficient": 1e6},
    {"vector": "warm", "coefficient": 1e30},
    {"vector": "((((" * 100},
    {"vector": "warm", "operator": "replace", "coefficient": 900000},
    {"heads": "*.*", "attention": True},
    {"site": "l_out-1", "values": [1e29] * 48, "mode": "replace"},
    {"site": "l_out-*", "values": [[9e16]] * 3},
    {"sites": "*"},
    {"sites": ["l_out", "kq_soft_max"], "generated": True},
    "*->*",
    "0..->0",
]
_PARTS = ["text", "lens", "follow", "attention", "attribution", "blocking", "words", "other"]
_FIELDS = [
    "prompt",
    "messages",
    "model",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "logprobs",
    "echo",
    "steer",
    "ablate",
    "block",
    "patch",
    "lens",
    "capture",
    "sites",
    "layers",
    "tokens",
    "token",
    "k",
    "answer",
    "part",
    "at",
    "ids",
    "columns",
    "n_prompt",
    "return_labels",
    "expression",
    "name",
    "bos",
    "logit_bias",
    "stream_options",
    "tools",
]


def body(rng: np.random.Generator, path: str = "/v1/completions") -> bytes:
    """A body with some fields as they should be, and some that are not."""
    document: dict[str, Any] = {}
    if path.startswith("/v1"):
        document["max_tokens"] = int(rng.integers(1, 9))
    elif path == "/mia/explore":
        document["part"] = str(rng.choice(_PARTS))
    elif path == "/mia/activations":
        document["sites"] = "l_out-1"
    document["prompt"] = rng.integers(3, 300, int(rng.integers(1, 20))).tolist()
    for _ in range(rng.integers(0, 4)):
        document[str(rng.choice(_FIELDS))] = _VALUES[rng.integers(len(_VALUES))]
    data = json.dumps(document).encode()
    how = rng.integers(16)
    if how == 0:
        data = data[: rng.integers(len(data))]
    elif how == 1:
        data = b"[" * int(rng.integers(1, 100_000))
    elif how == 2:
        data = bytes(rng.integers(0, 256, 200, np.uint8))
    elif how == 3:
        data = data.replace(b":", b":NaN,", 1)
    elif how == 4:
        data = b'{"prompt": 1' + b"0" * 5000 + b"}"
    return data


def head(path: str, length: int, host: str, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def asks(port: int, rng: np.random.Generator) -> int:
    """A whole request with a body of that kind. Returns the status that answers it."""
    path = PATHS[rng.integers(len(PATHS))]
    data = body(rng, path)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(head(path, len(data), f"127.0.0.1:{port}", "Connection: close") + data)
        answer = b""
        while part := s.recv(65536):
            answer += part
    return int(answer.split(b" ", 2)[1])


def cuts_its_body(port: int, rng: np.random.Generator) -> None:
    data = body(rng)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(head("/v1/completions", len(data) + 100, "localhost") + data)


def vanishes(port: int, rng: np.random.Generator) -> None:
    """In the middle of a stream, without a goodbye."""
    document: dict[str, Any] = {
        "prompt": rng.integers(3, 300, 8).tolist(),
        "max_tokens": 2000,
        "stream": True,
    }
    document["ignore_eos"] = True
    data = json.dumps(document).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(head("/v1/completions", len(data), "localhost") + data)
        s.recv(int(rng.integers(1, 400)))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def leaves_before_the_answer(port: int, rng: np.random.Generator) -> None:
    document: dict[str, Any] = {"prompt": rng.integers(3, 300, 8).tolist(), "max_tokens": 2000}
    document["ignore_eos"] = True
    data = json.dumps(document).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(head("/v1/completions", len(data), "localhost") + data)


def leaves_its_look(port: int, rng: np.random.Generator) -> None:
    document = {"part": "blocking", "prompt": rng.integers(3, 300, 80).tolist()}
    data = json.dumps(document).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(head("/mia/explore", len(data), "localhost") + data)
        time.sleep(float(rng.uniform(0, 0.1)))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def talks_nonsense(port: int, rng: np.random.Generator) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(bytes(rng.integers(0, 256, int(rng.integers(1, 3000)), np.uint8)) + b"\r\n\r\n")
        s.shutdown(socket.SHUT_WR)
        s.recv(1000)


def claims_a_huge_body(port: int, rng: np.random.Generator) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(head("/v1/completions", 10**15, "localhost") + b"{" * 1000)


def has_huge_headers(port: int, rng: np.random.Generator) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(head("/v1/completions", 2, "localhost", "X: " + "y" * 100_000) + b"{}")
        s.recv(1000)


ILL: list[Callable[[int, np.random.Generator], None]] = [
    cuts_its_body,
    vanishes,
    leaves_before_the_answer,
    leaves_its_look,
    talks_nonsense,
    claims_a_huge_body,
    has_huge_headers,
]


def reads_slowly(port: int, rng: np.random.Generator) -> None:
    """A few bytes of a long stream, then nothing for a while."""
    document: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 400, "stream": True, "n": 4}
    data = json.dumps({**document, "logprobs": 20, "ignore_eos": True}).encode()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.settimeout(10)
        s.connect(("127.0.0.1", port))
        s.sendall(head("/v1/completions", len(data), "localhost") + data)
        for _ in range(5):
            s.recv(64)
            time.sleep(0.05)
