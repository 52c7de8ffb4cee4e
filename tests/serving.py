"""A server of a tiny model in a thread, and a client of few lines."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from mia.model import Model
from mia.serve.address import listen
from mia.serve.app import Server, make_app
from mia.serve.limits import Limits
from mia.serve.protocol import http_protocol

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "<|im_start|>assistant "
)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> str:
        """The message of an error, in OpenAI's shape."""
        error = self.document["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["message"])

    @property
    def events(self) -> list[Any]:
        """The documents of a stream, which ends as OpenAI's do."""
        lines = [x for x in self.data.decode().split("\n\n") if x]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass
class Client:
    port: int
    server: Server
    key: str | None = None

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """`body`: a document, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        more = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        more |= {"Content-Type": "application/json", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, more)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Answer:
        return self.ask("POST", path, body)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def choice(self, path: str = "/v1/completions", **body: Any) -> Any:
        """The first choice of a completion."""
        answer = self.post(path, **body)
        assert answer.status == 200, answer.data
        return answer.document["choices"][0]

    def health(self) -> Any:
        return self.get("/health").document


@contextmanager
def serving(
    model: Model, *, key: str | None = None, limits: Limits | None = None, **options: Any
) -> Iterator[Client]:
    app, server = make_app(model, key=key, limits=limits, **options)
    listener = listen("127.0.0.1", 0)
    limits = limits or Limits()
    config = uvicorn.Config(
        app,
        log_level="critical",
        lifespan="off",
        ws="none",
        http=http_protocol(limits.body_seconds),
        limit_concurrency=limits.connections,
    )
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    server.scheduler.start()
    thread.start()
    try:
        yield Client(listener.getsockname()[1], server, key)
    finally:
        web.should_exit = True
        thread.join(10)
        server.scheduler.stop()
        listener.close()
