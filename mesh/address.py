"""`HOST:PORT`, taken apart and put together: the one place that knows how an address is written."""

from __future__ import annotations

import re

#: Where `mesh up` listens when it is told nothing.
DEFAULT_ADDRESS = "127.0.0.1:7700"

_NOT_A_HOST = re.compile(r"[\s/\[\]]")
_PORT = re.compile(r"[0-9]{1,5}")


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPV6]:PORT`. Raises ValueError, one line, where it is neither.

    Whether a host of that name can exist is not looked into.
    """
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare) != (bare != host) or _NOT_A_HOST.search(bare):
        raise ValueError(f"write HOST:PORT, such as {DEFAULT_ADDRESS} or [::1]:7700")
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError(f"port {port!r} is not a number from 0 to 65535; write HOST:PORT, such as {DEFAULT_ADDRESS}")
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
