"""Where a server may listen."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from mia.errors import UsageError
from mia.values import whole

#: letters of a key that cannot be guessed in a while
_KEY = 8


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def check_address(host: str, key: str | None) -> None:
    """Raises `UsageError` for an address that other machines can reach, without a key."""
    if key is not None and (not key.isascii() or not key.isprintable() or len(key) < _KEY):
        raise UsageError(f"a key has at least {_KEY} letters, digits or signs of ASCII")
    if key is not None and key != key.strip():
        raise UsageError("a key has no space at its ends")
    if not is_loopback(host) and not key:
        raise UsageError(f"other machines can reach {host}: a server there needs a key")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UsageError`."""
    port = whole(port, "port")
    if not 0 <= port < 65536:
        raise UsageError(f"port {port} is not in 0 to 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise UsageError(f"cannot listen at {host}:{port}: {reason}") from err
    return listener
