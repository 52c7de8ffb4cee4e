"""A server under hostile clients: it goes on answering, nothing is lost, and its memory stays flat."""

from __future__ import annotations

import base64
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import hostile
import numpy as np
from serving import TEMPLATE, Client, serving as served
from tiny_gguf import write_tiny

from mia.model import Model
from mia.serve.limits import Limits
from mia.vectors import Vector
from reliability.part import Options, Part, count

#: hostile clients that work at a time
_CLIENTS = 6
#: of memory that may grow between the first quarter and the end, in MiB
_GROWTH = 24.0
_TIMEOUT_CODES = {200, 400, 404, 408, 413, 415, 503}


def serving(options: Options) -> Part:
    """`n` requests, half of them hostile."""
    part = Part("serving")
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_tiny(folder / "served.gguf", "llama", chat_template=TEMPLATE)
        with Model(path, threads=1, ctx=2048) as model:
            direction = rng.standard_normal(model.n_embd).astype(np.float32)
            Vector({1: direction}).save(folder / "warm.safetensors")
            limits = Limits(send_seconds=2.0, body_seconds=2.0)
            with served(model, vectors=folder, limits=limits) as client:
                _all(part, options, client)
    return part


def _bodies(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Requests as they should be, whose answers are known."""
    bodies: list[dict[str, Any]] = []
    for i in range(12):
        prompt = rng.integers(3, 300, int(rng.integers(2, 30))).tolist()
        body = {"prompt": prompt, "max_tokens": int(rng.integers(1, 12)), "seed": i}
        if i % 3 == 1:
            body["steer"] = {"vector": "warm", "coefficient": 0.2 * i}
        if i % 4 == 2:
            body["ablate"] = f"{i % 3}.{i % 6}"
        if i % 5 == 3:
            body |= {"echo": True, "logprobs": 2}
        bodies.append(body)
    return bodies


def _looks(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Looks whose numbers are known."""
    looks: list[dict[str, Any]] = []
    for i, name in enumerate(("lens", "attention", "attribution", "blocking")):
        prompt = rng.integers(3, 300, 20).tolist()
        looks.append({"part": name, "prompt": prompt, "n_prompt": 12})
        if name != "lens":
            looks[-1]["at"] = 17
        if i % 2:
            looks[-1] |= {"ablate": "1.1", "steer": {"vector": "warm", "coefficient": 0.3}}
    return looks


#: of each part the numbers that are compared
_NUMBERS = {"lens": ("lens", "probs"), "attribution": ("heads",), "blocking": ("drop",)}


def _numbers(look: dict[str, Any], document: Any) -> np.ndarray:
    """Those of a look's answer."""
    for name in _NUMBERS.get(look["part"], ("weights",)):
        document = document[name]
    data = np.frombuffer(base64.b64decode(document["data"]), "<" + document["type"])
    largest = 65535.0 if look["part"] == "attention" else 1.0
    return np.asarray(data / largest, np.float64)


def _all(part: Part, options: Options, client: Client) -> None:
    rng = np.random.default_rng(options.seed)
    bodies = _bodies(rng)
    wanted = [client.choice(**body)["text"] for body in bodies]
    looks = _looks(rng)
    numbers = [_numbers(look, client.post("/mia/explore", **look).document) for look in looks]
    kinds: Counter[str] = Counter()
    memory: list[float] = []
    lock = threading.Lock()

    def one(i: int) -> None:
        own = np.random.default_rng([options.seed, i])
        if i % 10 == 4:
            k = int(own.integers(len(looks)))
            kind, fault = _look(client, looks[k], numbers[k])
        else:
            kind, fault = _request(client, i, own, bodies, wanted)
        with lock:
            kinds[kind] += 1
            if fault:
                part.wrong(f"request {i}: {fault}")
            if i % 50 == 0:
                memory.append(_resident())
            if i % 1000 == 0:
                part.say(f"{i} requests, {memory[-1]:.0f} MiB")

    with ThreadPoolExecutor(_CLIENTS) as pool:
        for i in range(options.n):
            if options.is_over:
                break
            pool.submit(one, i).add_done_callback(lambda f: f.result())
            while pool._work_queue.qsize() > 2 * _CLIENTS:
                time.sleep(0.002)
    health = _until_idle(client)
    for what in ("pending", "running", "waiting"):
        if health[what]:
            part.wrong(f"{health[what]} requests are {what} at the end")
    if health["cells"]["used"] or health["sequences"]["used"]:
        part.wrong(f"cells or sequences are lost: {health}")
    for body, text in zip(bodies, wanted, strict=True):
        if client.choice(**body)["text"] != text:
            part.wrong(f"another answer at the end: {body}")
    quarter = memory[len(memory) // 4] if memory else 0.0
    growth = max(memory[len(memory) // 4 :], default=0.0) - quarter
    if growth > _GROWTH:
        part.wrong(f"memory grew by {growth:.0f} MiB after the first quarter")
    part.figures["requests"] = count(sum(kinds.values()))
    part.figures.update({kind: count(n) for kind, n in sorted(kinds.items())})
    part.figures["cells, sequences, requests in use at the end"] = "0"
    part.figures["memory after the first quarter"] = f"{growth:+.1f} MiB"


def _look(client: Client, look: dict[str, Any], numbers: np.ndarray) -> tuple[str, str]:
    """One look: its kind, and what is wrong with the answer."""
    answer = client.post("/mia/explore", **look)
    if answer.status == 503:
        return "asked to come back", ""
    if answer.status != 200:
        return "looks", f"status {answer.status}: {answer.data[:200]!r}"
    far = np.abs(_numbers(look, answer.document) - numbers).max()
    return "looks", "" if far < 1e-3 else f"numbers of {look['part']} are {far:.2g} off"


def _request(
    client: Client,
    i: int,
    rng: np.random.Generator,
    bodies: list[dict[str, Any]],
    wanted: list[str],
) -> tuple[str, str]:
    """One request: its kind, and what is wrong with the answer."""
    if i % 2 == 0:
        k = int(rng.integers(len(bodies)))
        answer = client.post("/v1/completions", **bodies[k])
        if answer.status == 503:
            return "asked to come back", ""
        if answer.status != 200:
            return "as they should be", f"status {answer.status}: {answer.data[:200]!r}"
        text = answer.document["choices"][0]["text"]
        return "as they should be", "" if text == wanted[k] else f"another answer: {bodies[k]}"
    if i % 4 == 1:
        status = hostile.asks(client.port, rng)
        return "hostile bodies", "" if status in _TIMEOUT_CODES else f"status {status}"
    clients = [*hostile.ILL, hostile.reads_slowly]
    ill = clients[int(rng.integers(len(clients)))]
    with suppress(ConnectionError, TimeoutError):  # the server has left it
        ill(client.port, rng)
    return "clients that do not behave", ""


def _until_idle(client: Client) -> Any:
    for _ in range(1500):
        health = client.health()
        if not (health["pending"] or health["running"] or health["waiting"]):
            break
        time.sleep(0.02)
    return client.health()


def _resident() -> float:
    """MiB of this process."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * 4096 / 2**20
