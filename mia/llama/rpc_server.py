"""llama.cpp's RPC server in a process of its own, as `mia.models.server` starts it.

It is called with its address:port and how many threads it may use. It says "ready" on stdout once
the port is its own, and ends with its stdin.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

from mia.errors import EngineError, MiaError
from mia.llama import child


def main(endpoint: str, threads: str) -> int:
    child.prepare()
    # macOS and Windows end no child with its parent
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        from mia.llama import rpc

        if not rpc.supported():
            raise EngineError(rpc.NO_RPC)
        _try_port(endpoint)
        print("ready", flush=True)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # a line for each connection
        rpc.serve(endpoint, int(threads))
        raise EngineError(f"llama.cpp's server at {endpoint} ended")
    except MiaError as err:
        print(err, file=sys.stderr)
        return 1


def _try_port(endpoint: str) -> None:
    """llama.cpp does not say why it cannot listen. Raises `EngineError`."""
    host, _, port = endpoint.rpartition(":")
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, int(port)))
        except OSError as err:
            raise EngineError(f"cannot listen at {endpoint}: {err.strerror or err}") from err


def _end_with_stdin() -> None:
    while os.read(0, 1 << 12):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
