"""Models on RPC servers: bit by bit what the processor gives, and one clear line where a server is
not as it should be."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, run
from tiny import Tiny

from mia.edits import Edit
from mia.errors import EngineError, UsageError
from mia.io.runs import Run
from mia.llama import rpc
from mia.llama.library import library
from mia.methods.rerun import command_line
from mia.model import Model
from mia.models import server
from mia.models.server import RpcServer
from mia.notices import MiaWarning
from mia.request import Capture, Request
from mia.sites import Site

needs_rpc = pytest.mark.skipif(not rpc.supported(), reason=rpc.NO_RPC)


@pytest.fixture(scope="module", autouse=True)
def _forgotten_afterwards() -> Iterator[None]:
    """No child of a process that used a device may use llama.cpp, and other files' tests fork."""
    lib = library()
    before = lib._on_device
    yield
    lib._on_device = before


# -- names and greetings, which need no RPC in the build ------------------------------------------


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("127.0.0.1:50052", ["127.0.0.1:50052"]),
        ("localhost:1, 10.0.0.2:65535", ["127.0.0.1:1", "10.0.0.2:65535"]),
        (["localhost:1", "10.0.0.2:2,10.0.0.3:2"], ["127.0.0.1:1", "10.0.0.2:2", "10.0.0.3:2"]),
    ],
)
def test_servers_are_read(text: Any, endpoints: list[str]) -> None:
    assert rpc.parse(text) == endpoints


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *(
            (t, "is no RPC server: host:port")
            for t in ("", "x", "x:", ":1", "x:0", "x:65536", "x:٣")
        ),
        ("10.0.0.1:1,", "'' is no RPC server"),
        ("no.such.host.invalid:1", "has no IPv4 address"),
        ("[::1]:1", "has no IPv4 address"),
        ("localhost:7,127.0.0.1:7", "127.0.0.1:7 is given 2 times"),
    ],
)
def test_what_is_no_server_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        rpc.parse(text)


@pytest.mark.parametrize(
    ("host", "private"),
    [
        *((h, True) for h in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.7", "169.254.1.1")),
        *((h, False) for h in ("0.0.0.0", "8.8.8.8", "172.32.0.1", "100.64.0.1")),
    ],
)
def test_private_networks(host: str, private: bool) -> None:
    assert rpc.is_private(host) == private


@pytest.fixture
def answering() -> Iterator[Callable[[bytes | None], str]]:
    """A server that answers whatever it is asked with these bytes, and ends the connection; None:
    never says a word."""
    listening: list[socket.socket] = []
    held: list[socket.socket] = []

    def start(answer: bytes | None) -> str:
        s = socket.create_server(("127.0.0.1", 0))
        listening.append(s)

        def serve() -> None:
            connection, _ = s.accept()
            held.append(connection)
            if answer is not None:
                connection.recv(1 << 12)
                connection.sendall(answer)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{s.getsockname()[1]}"

    yield start
    for s in (*listening, *held):
        s.close()


def _hello(major: int, minor: int) -> bytes:
    return struct.pack("<QBBBB", 28, major, minor, 0, 0) + bytes(24)


def test_a_greeting(answering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_PROTOCOLS", {library().version: (7, 1)})
    rpc.check(answering(_hello(7, 0)))
    for answer, why in (
        (_hello(6, 0), "speaks version 6.0 of the protocol, this llama.cpp 7.1"),
        (_hello(8, 0), "speaks version 8.0"),
        (_hello(7, 2), "speaks version 7.2"),
        (b"", "is no RPC server of llama.cpp"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no RPC server of llama.cpp"),
    ):
        with pytest.raises(EngineError, match=why):
            rpc.check(answering(answer))


def test_a_server_that_says_nothing(answering: Any) -> None:
    with pytest.raises(
        EngineError, match=r"no answer in 0.2 s: it hangs, or serves another client"
    ):
        rpc.check(answering(None), patience=0.2)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(EngineError, match=r"cannot be reached: Connection refused"):
        rpc.check(f"127.0.0.1:{server._free_port('127.0.0.1')}")


def test_a_build_without_rpc(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        pass

    lib = library()
    monkeypatch.setattr(lib, "base", Base())
    assert not rpc.supported()
    monkeypatch.setattr("mia.llama.model.library", lambda: lib)
    with pytest.raises(EngineError, match="was built without RPC: build llama-cpp-python with"):
        rpc.devices(["127.0.0.1:9"])


@pytest.mark.parametrize("host", ["0.0.0.0", "8.8.8.8"])
def test_an_open_network_needs_a_word(host: str) -> None:
    with pytest.raises(UsageError, match=r"not an address of this machine .* no authentication"):
        RpcServer(host, 0)


@needs_rpc
def test_a_server_in_an_open_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(endpoint: str) -> None:
        raise EngineError("as far as this")

    monkeypatch.setattr(rpc, "check", check)
    told = pytest.warns(MiaWarning, match=r"8.8.8.8:1 is not in a private network.* no encryption")
    with told, pytest.raises(EngineError, match="as far as this"):
        rpc.devices(["8.8.8.8:1"])
    with pytest.raises(EngineError, match="as far as this"):  # and no warning, which is an error
        rpc.devices(["10.0.0.1:1"])


# -- servers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RpcServer]]:
    with RpcServer(port=0, threads=1) as a, RpcServer(port=0, threads=1) as b:
        yield [a, b]


def _requests(t: Tiny) -> list[Request]:
    """Captures of all sites, and an edit of each kind of them."""
    prompt, edits = t.prompt(7), []
    layers = range(t.model.n_layer)
    for i in layers:
        value = t.vector(f"resid_post.{i}")
        edits.append(Edit(Site("resid_post", i), "add", value, tokens=[1, -1]))
        edits.append(Edit(Site("head_out", i), "zero", heads=[0], tokens=-1))
        edits.append(Edit(Site("q", i), lambda h: 2 * h, tokens=2))
    sites = list(t.model.unfused_topology.sites)
    return [
        Request(prompt, captures=[Capture(sites)], logits="all", n_predict=4),
        Request(prompt, edits, [Capture(sites)], n_predict=4),
        *(Request(prompt, [edit], n_predict=3, logits="all") for edit in edits),
    ]


def _same(a: Any, b: Any) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.tokens == other.tokens
        if one.logits is not None:
            assert np.array_equal(one.logits, other.logits)
        assert one.captures.keys() == other.captures.keys()
        for site, array in one.captures.items():
            assert np.array_equal(array, other.captures[site], equal_nan=True), site


@needs_rpc
@pytest.mark.parametrize(("n", "gpu_layers"), [(1, None), (2, None), (1, 2), (2, 2), (1, 0)])
@pytest.mark.parametrize("name", ["llama", "gemma2-window", "gpt2", "qwen2moe"])
def test_servers_give_what_the_processor_gives(
    name: str, n: int, gpu_layers: int | None, servers: list[RpcServer], tiny: Any
) -> None:
    t = tiny(name)
    endpoints = [s.endpoint for s in servers[:n]]
    with Model(t.path, threads=1, rpc=endpoints, gpu_layers=gpu_layers) as remote:
        assert remote.rpc == endpoints
        assert remote.topology.sites.keys() == t.model.topology.sites.keys()
        requests = _requests(t)
        _same(t.model.run(requests), remote.run(requests))


@needs_rpc
def test_no_batches_side_by_side(servers: list[RpcServer], llama: Tiny) -> None:
    """Several devices would take turns with copies of each input, at other addresses each time."""
    lib, lines = library(), list[str]()
    log = lib.L.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    lib.L.llama_log_set(log, None)
    try:
        with Model(llama.path, threads=1, rpc=[s.endpoint for s in servers]) as m:
            m.run([Request([5, 6, 7])])
    finally:
        lib.L.llama_log_set(lib._log, None)
    assert re.findall(r"sched copies = (\d+)", "".join(lines)) == ["1"]


@needs_rpc
def test_models_of_one_process(servers: list[RpcServer], llama: Tiny) -> None:
    """Two on one server, which serves one connection; one on another; and one on none, for which a
    dead server is nothing."""
    request = Request(llama.prompt(5), captures=[Capture("l_out")], n_predict=2)
    plain = llama.model.run([request])
    with RpcServer(port=0, threads=1) as own:
        with (
            Model(llama.path, threads=1, rpc=servers[0].endpoint) as a,
            Model(llama.path, threads=1, rpc=servers[0].endpoint) as b,
            Model(llama.path, threads=1, rpc=own.endpoint) as c,
            Model(llama.path, threads=1, gpu_layers=-1) as none,
        ):
            for m in (a, b, c, a, none):
                _same(plain, m.run([request]))
        # closed and opened again: another connection
        with Model(llama.path, threads=1, rpc=own.endpoint) as c:
            _same(plain, c.run([request]))
    with Model(llama.path, threads=1, gpu_layers=-1) as none:
        _same(plain, none.run([request]))


@needs_rpc
def test_a_machine_that_is_gone_is_noticed(servers: list[RpcServer], llama: Tiny) -> None:
    endpoints = [s.endpoint for s in servers]
    with Model(llama.path, threads=1, rpc=endpoints):
        sockets = list(rpc._sockets(endpoints))
        assert sorted("{}:{}".format(*s.getpeername()) for s in sockets) == sorted(endpoints)
        for s in sockets:
            with s:
                assert s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    before = set(Path("/dev/fd").iterdir())
    assert not list(rpc._sockets(endpoints))
    assert set(Path("/dev/fd").iterdir()) <= before


@needs_rpc
def test_a_server_that_comes_back(llama: Tiny) -> None:
    request = Request(llama.prompt(5), n_predict=2)
    plain = llama.model.run([request])
    with RpcServer(port=0, threads=1) as first:
        port = int(first.endpoint.rpartition(":")[2])
        with Model(llama.path, threads=1, rpc=first.endpoint) as m:
            _same(plain, m.run([request]))
    with pytest.raises(EngineError, match="cannot be reached"):
        Model(llama.path, threads=1, rpc=first.endpoint)
    with RpcServer(port=port, threads=1), Model(llama.path, threads=1, rpc=first.endpoint) as m:
        _same(plain, m.run([request]))


@needs_rpc
def test_a_port_that_is_taken(servers: list[RpcServer]) -> None:
    port = int(servers[0].endpoint.rpartition(":")[2])
    with pytest.raises(EngineError, match=f"cannot listen at 127.0.0.1:{port}: Address already"):
        RpcServer(port=port)


_BUSY = """
import sys
from mia import Model
from mia.llama import rpc
rpc.PATIENCE = 0.5
rpc.check.__kwdefaults__["patience"] = 0.5
Model(sys.argv[1], threads=1, rpc=sys.argv[2])
"""


@needs_rpc
def test_a_server_serves_one_process_at_a_time(servers: list[RpcServer], llama: Tiny) -> None:
    with Model(llama.path, threads=1, rpc=servers[0].endpoint):
        done = _python(_BUSY, llama.path, servers[0].endpoint)
    assert done.returncode == 1
    assert "serves another client (it serves one at a time)" in done.stderr.splitlines()[-1]


# -- servers that die -----------------------------------------------------------------------------


def _python(code: str, *words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        **more,
    )


_LIBRARY = """
import os, signal, sys
from mia import Edit, Model
from mia.models.server import RpcServer
server = RpcServer(port=0, threads=1)
m = Model(sys.argv[1], threads=1, rpc=server.endpoint)
def kill(h):
    os.kill(server.pid, signal.SIGKILL)
    return h
print("so far", end="")  # in the buffer
if sys.argv[2] == "run":
    m.generate([5, 6, 7], 4, edits=[Edit("l_out-1", kill, tokens=-1)])
elif sys.argv[2] == "open":
    server.close()
    m.unfused_topology
print(", so good", end="")
server.close()
"""


@needs_rpc
@pytest.mark.parametrize("when", ["run", "open"])
def test_a_server_that_dies_ends_the_process_in_one_line(llama: Tiny, when: str) -> None:
    done = _python(_LIBRARY, llama.path, when)
    assert done.returncode == 1
    assert done.stdout == "so far"
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mia.errors.EngineError: RPC server 127.0.0.1:")
    assert "died or ended the connection" in done.stderr


@needs_rpc
def test_a_server_that_ends_first_is_no_fault_at_the_end(llama: Tiny) -> None:
    done = _python(_LIBRARY, llama.path, "never")
    assert (done.returncode, done.stdout, done.stderr) == (0, "so far, so good", "")


_COMMAND = """
import os, signal, sys
from mia.cli import main
from mia.llama import Context
server = int(sys.argv.pop())
plain, decodes = Context.decode, []
def decode(self, *batch):
    decodes.append(batch)
    if len(decodes) == 8:
        os.kill(server, signal.SIGKILL)
    return plain(self, *batch)
Context.decode = decode
main()
"""


@needs_rpc
@pytest.mark.parametrize("words", [["-o", "out.json"], ["--json"]])
def test_a_command_whose_server_dies(llama: Tiny, tmp_path: Path, words: list[str]) -> None:
    with RpcServer(port=0, threads=1) as s:
        command = ["run", "-m", llama.path, "-t", "1", "-p", "The cat", "-n", "60", *words]
        done = _python(_COMMAND, *command, "--rpc", s.endpoint, s.pid, cwd=tmp_path)
    assert done.returncode == 1
    line = f"RPC server {s.endpoint} died or ended the connection"
    assert done.stderr.startswith(f"mia: {line}") and done.stderr.count("\n") == 1
    if "--json" in words:
        assert f'"message": "{line}' in done.stdout
    else:
        assert done.stdout == "" and not list(tmp_path.iterdir())


# -- what a result says of servers ----------------------------------------------------------------


def test_a_replay_connects_to_nobody() -> None:
    made = Run("run", {"prompt": "x", "rpc": "10.0.0.1:1"}, {}, None, {}, {"rpc": ["10.0.0.1:1"]})
    assert command_line(made) == ["run", "--prompt", "x"]


@needs_rpc
def test_a_result_names_its_servers(
    llama: Tiny, servers: list[RpcServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIA_RPC", servers[0].endpoint)
    words = ["run", "-m", str(llama.path), "-p", "The cat", "-n", "3"]
    made = document(*words)
    assert made["run"]["setup"]["rpc"] == [servers[0].endpoint]
    monkeypatch.delenv("MIA_RPC")
    plain = document(*words)
    assert "rpc" not in plain["run"]["setup"] and {**plain, "run": made["run"]} == made
    (tmp_path / "made.json").write_text(json.dumps(made))
    again = run("replay", str(tmp_path / "made.json"))
    said = again.stdout + again.stderr
    assert f"the list of RPC servers was ['{servers[0].endpoint}'], is empty" in said


# -- mia rpc-server -------------------------------------------------------------------------------


@needs_rpc
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_command(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "mia", "rpc-server", "--port", "0", "-t", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("mia: serving at 127.0.0.1:") and "no authentication" in said
        endpoint = said.split()[3]
        rpc.check(endpoint)
        os.kill(process.pid, number)
        code = process.wait(20)
    assert code in ({signal.SIGINT: [130], signal.SIGTERM: [-15, 143]}.get(number, [-9]))
    end = time.monotonic() + 20
    while rpc._listens(endpoint):
        assert time.monotonic() < end
        time.sleep(0.05)
