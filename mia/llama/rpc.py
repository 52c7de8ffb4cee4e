"""A second machine: models whose blocks lie on servers of llama.cpp's RPC backend.

A server owns memory and computes graphs; here is its client, and how one is started. The protocol
has no encryption and no authentication: who reaches the port reads prompts and weights, and can
make the server write wherever a damaged message leads it. Loopback and private networks only.

llama.cpp's client ends the process when a server is gone (`GGML_ABORT`, which cannot be caught).
What can be seen beforehand is an error: `check` asks each server before a model is opened. What
happens later ends the process with one line and exit status 1 (`_last_words`).
"""

from __future__ import annotations

import contextlib
import ctypes as C
import ipaddress
import os
import socket
import stat
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mia.errors import EngineError, UsageError
from mia.llama.library import GPUS, Library, library
from mia.notices import notice

#: the protocol's major and minor version, by llama-cpp-python's; of others only llama.cpp knows
_PROTOCOLS = {"0.3.36": (7, 0)}
#: RPC_CMD_HELLO of ggml-rpc.cpp, "must be always 14", and the bytes of capabilities it carries
_HELLO, _CAPS = 14, 24
#: `enum ggml_backend_dev_type` of ggml-backend.h
_CPU = 0
#: seconds to wait for a server's first answer
PATIENCE = 5.0
WARNING = (
    "RPC has no encryption and no authentication: whoever reaches the port reads prompts and "
    "weights and can run code there"
)
NO_RPC = (
    "this llama.cpp was built without RPC: build llama-cpp-python with "
    "CMAKE_ARGS=\"-DGGML_RPC=ON -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'\""
)

#: how many open models hold a connection to a server, which serves one client at a time
_connections: Counter[str] = Counter()
#: the servers of the model that was opened last, which may not have come so far
_latest: list[str] = []


def parse(servers: str | Sequence[str]) -> list[str]:
    """The servers of `host:port[,host:port]`, or of several such texts, as `address:port`.

    Raises:
        UsageError: a text that is no `host:port`, a host without an IPv4 address, or one server
            twice.
    """
    texts = [servers] if isinstance(servers, str) else list(servers)
    out = [_endpoint(part) for text in texts for part in text.split(",")]
    for endpoint, n in Counter(out).items():
        if n > 1:
            raise UsageError(f"RPC server {endpoint} is given {n} times")
    return out


def _endpoint(text: str) -> str:
    host, colon, port = text.strip().rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"{text!r} is no RPC server: host:port, as 192.168.0.7:50052")
    return f"{address(host)}:{int(port)}"


def address(host: str) -> str:
    """The IPv4 address of a host, as llama.cpp takes no others. Raises `UsageError`."""
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise UsageError(f"{host!r} has no IPv4 address: {reason}") from err


def is_private(host: str) -> bool:
    """Whether an IPv4 address is of this machine or of a private network (RFC 1918, link-local);
    0.0.0.0, every network that the machine is in, is not."""
    ip = ipaddress.IPv4Address(host)
    return ip.is_private and not ip.is_unspecified


# -- the client -----------------------------------------------------------------------------------


def check(endpoint: str, *, patience: float = PATIENCE) -> None:
    """Asks a server who it is. Raises `EngineError` if it is not there, does not answer, or speaks
    another version of the protocol."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), patience) as connection:
            connection.settimeout(patience)
            connection.sendall(struct.pack("<BQ", _HELLO, _CAPS) + bytes(_CAPS))
            answer = _read(connection, 8 + 4)
    except TimeoutError as err:
        raise EngineError(
            f"RPC server {endpoint} gives no answer in {patience:g} s: it hangs, or serves another "
            "client (it serves one at a time)"
        ) from err
    except OSError as err:
        reason = err.strerror or err
        raise EngineError(f"RPC server {endpoint} cannot be reached: {reason}") from err
    size, major, minor = struct.unpack("<QBB", answer[:10]) if len(answer) == 12 else (0, 0, 0)
    if not 4 <= size <= 1024:
        raise EngineError(
            f"{endpoint} is no RPC server of llama.cpp, or of a version before protocol 7: "
            "it does not answer a greeting"
        )
    ours = _PROTOCOLS.get(library().version)
    if ours is not None and (major != ours[0] or minor > ours[1]):
        raise EngineError(
            f"RPC server {endpoint} speaks version {major}.{minor} of the protocol, this "
            f"llama.cpp {ours[0]}.{ours[1]}: install the same llama-cpp-python on both machines"
        )


def _read(connection: socket.socket, n: int) -> bytes:
    """n bytes, or fewer where the other side ends the connection."""
    data = b""
    while len(data) < n and (part := connection.recv(n - len(data))):
        data += part
    return data


def devices(endpoints: Sequence[str]) -> Any:
    """The servers' devices, as `llama_model_params.devices` wants them: this model's alone, as no
    server is registered for all.

    Raises:
        EngineError: this llama.cpp was built without RPC, or a server cannot be used.
    """
    lib = library()
    base = _functions(lib)
    found: list[int] = []
    _latest[:] = endpoints
    for endpoint in endpoints:
        if not is_private(endpoint.rpartition(":")[0]):
            notice(f"RPC server {endpoint} is not in a private network. {WARNING}")
        if not _connections[endpoint]:  # which would wait behind our own connection
            check(endpoint)
        base.ggml_set_abort_callback(_callback)
        registry = lib.call(base.ggml_backend_rpc_add_server, endpoint.encode(), device=True)
        if not registry:
            raise EngineError(f"RPC server {endpoint} offers no device: {lib.last_error()}")
        n = base.ggml_backend_reg_dev_count(registry)
        found += [base.ggml_backend_reg_dev_get(registry, i) for i in range(n)]
    return (C.c_void_p * (len(found) + 1))(*found, None)


def connect(endpoints: Sequence[str]) -> None:
    """Counts a model that is open on these servers, and has the system end their connections if
    their machines are gone without a word."""
    _connections.update(endpoints)
    for connection in _sockets(endpoints):
        with connection, contextlib.suppress(OSError, AttributeError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_KEEPIDLE", 15)):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            # no TCP_USER_TIMEOUT: a server that computes for long takes no data meanwhile either


def _sockets(endpoints: Sequence[str]) -> Iterator[socket.socket]:
    """The sockets of this process that are connected to these servers: llama.cpp opens them
    without keepalive. None on Windows, which does not list them."""
    try:
        numbers = [int(entry.name) for entry in Path("/dev/fd").iterdir()]
    except (OSError, ValueError):
        return
    for number in numbers:
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(number))
        except OSError:  # the one that the folder was listed with
            continue
        try:
            name = connection.getpeername()
        except OSError:
            name = None
        if isinstance(name, tuple) and f"{name[0]}:{name[1]}" in endpoints:
            yield connection
        else:
            connection.close()


def disconnect(endpoints: Sequence[str]) -> None:
    _connections.subtract(endpoints)


def serve(endpoint: str, threads: int) -> None:
    """llama.cpp's own server, which comes back only if it fails: this machine's GPUs, or without
    one its processors. What it says goes where stdout goes."""
    lib = library()
    base = _functions(lib)
    all_devices = [base.ggml_backend_dev_get(i) for i in range(base.ggml_backend_dev_count())]
    kinds = [base.ggml_backend_dev_type(d) for d in all_devices]
    used = [d for d, kind in zip(all_devices, kinds, strict=True) if kind in GPUS]
    used = used or [d for d, kind in zip(all_devices, kinds, strict=True) if kind == _CPU]
    devices = (C.c_void_p * len(used))(*used)
    lib.call(
        base.ggml_backend_rpc_start_server,
        endpoint.encode(),
        None,
        threads,
        len(used),
        devices,
        threads=threads,
    )


def supported() -> bool:
    """Whether this llama.cpp was built with RPC."""
    return hasattr(library().base, "ggml_backend_rpc_add_server")


def _functions(lib: Library) -> Any:
    """The functions of the RPC backend. Raises `EngineError` if there is none."""
    base = lib.base
    try:
        add, start = base.ggml_backend_rpc_add_server, base.ggml_backend_rpc_start_server
    except AttributeError as err:
        raise EngineError(NO_RPC) from err
    p, size = C.c_void_p, C.c_size_t
    base.ggml_backend_dev_type.restype, base.ggml_backend_dev_type.argtypes = C.c_int, [p]
    base.ggml_backend_dev_count.restype, base.ggml_backend_dev_count.argtypes = size, []
    base.ggml_backend_dev_get.restype, base.ggml_backend_dev_get.argtypes = p, [size]
    add.restype, add.argtypes = p, [C.c_char_p]
    start.restype, start.argtypes = None, [C.c_char_p, C.c_char_p, size, size, C.POINTER(p)]
    base.ggml_backend_reg_dev_count.restype, base.ggml_backend_reg_dev_count.argtypes = size, [p]
    base.ggml_backend_reg_dev_get.restype = p
    base.ggml_backend_reg_dev_get.argtypes = [p, size]
    base.ggml_set_abort_callback.restype, base.ggml_set_abort_callback.argtypes = p, [_ABORT]
    return base


# -- the end of a server --------------------------------------------------------------------------

_ABORT = C.CFUNCTYPE(None, C.c_char_p)


def _on_abort(message: bytes) -> None:
    """llama.cpp is about to end the process, from whichever thread saw the reason."""
    text = message.decode(errors="replace")
    if "rpc" in text.lower():
        _last_words(text.partition(": ")[2])
    os.write(2, f"{text}\n".encode())  # as llama.cpp would, without the debugger's backtrace


_callback = _ABORT(_on_abort)


def _last_words(reason: str) -> None:
    """Ends the process as an uncaught exception would. What it wrote stays written, and files are
    whole, as all of mia writes beside them and renames."""
    servers = dict.fromkeys([*(e for e, n in _connections.items() if n > 0), *_latest])
    dead = [e for e in servers if not _listens(e)] or servers
    names = " or ".join(dead)
    error = EngineError(
        f"RPC server {names} died or ended the connection, and llama.cpp cannot go on without it "
        f"({reason.strip()})"
    )
    with contextlib.suppress(BaseException):
        sys.excepthook(EngineError, error, None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(1)


def _listens(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()
    except OSError:
        return False
    return True
