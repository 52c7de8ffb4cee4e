"""A server for the blocks of models that other processes, or other machines, run.

with RpcServer(threads=4) as server:
    model = Model("smollm2", rpc=server.endpoint)

It is llama.cpp's own RPC server, in a child process, with this machine's GPUs or, without one, its
processors. It has no encryption and no authentication: loopback and private networks only.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import suppress

from mia.errors import EngineError, UsageError
from mia.llama import child
from mia.llama.c_numbers import c_int, usable_threads

PORT = 50052


class RpcServer:
    """A running server. It ends with `close()`, at the end of a `with` block, or with this process.

    Attributes:
        endpoint: "address:port", what `Model(rpc=…)` takes.
        warning: what everyone who starts one should know.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = PORT,
        *,
        threads: int | None = None,
        expose: bool = False,
    ):
        """Starts one, and waits until it answers.

        Args:
            host: the address to listen at: whoever reaches it can use the server.
            port: 0 for any that is free.
            threads: by default, and at most, all processors this process may use.
            expose: allow an address that is not of this machine or of a private network.

        Raises:
            UsageError: such an address without `expose`, or no address at all.
            EngineError: llama.cpp was built without RPC, or cannot listen there.
        """
        from mia.llama import rpc

        self.warning = rpc.WARNING
        address = rpc.address(host)
        if not expose and not rpc.is_private(address):
            raise UsageError(
                f"{host} is not an address of this machine or of a private network. {rpc.WARNING}. "
                "Take the private address of one network card"
            )
        port = c_int(port, "port", 0, 65535) or _free_port(address)
        self.endpoint = f"{address}:{port}"
        self._process = subprocess.Popen(
            child.python("mia.llama.rpc_server", self.endpoint, str(usable_threads(threads))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=os.sep,  # the working folder may have a file named like a module
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        from mia.llama import rpc

        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise self._end()
        end = time.monotonic() + 30
        while self._process.poll() is None:
            with suppress(EngineError):
                rpc.check(self._reachable)
                return
            if time.monotonic() > end:
                raise EngineError(f"llama.cpp's server at {self.endpoint} does not answer")
            time.sleep(0.02)
        raise self._end()

    @property
    def _reachable(self) -> str:
        host, _, port = self.endpoint.rpartition(":")
        return f"127.0.0.1:{port}" if host == "0.0.0.0" else self.endpoint

    def _end(self) -> EngineError:
        """What to say of a server that has ended."""
        _, said = self._process.communicate()
        lines = said.strip().splitlines()
        return EngineError(lines[-1] if lines else f"the server at {self.endpoint} ended")

    @property
    def pid(self) -> int:
        """The process of the server."""
        return self._process.pid

    def wait(self) -> None:
        """Waits for ever: for a Ctrl-C, or for the server's end, which is an `EngineError`."""
        while self._process.poll() is None:
            with suppress(subprocess.TimeoutExpired):  # Windows hears Ctrl-C in between only
                self._process.wait(1)
        raise self._end()

    def close(self) -> None:
        """Ends the server, with whatever a client has on it."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> RpcServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_port(address: str) -> int:
    with socket.socket() as s:
        try:
            s.bind((address, 0))
        except OSError as err:
            raise EngineError(f"cannot listen at {address}: {err.strerror or err}") from err
        return int(s.getsockname()[1])
