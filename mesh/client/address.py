"""Which peer a client talks to: an argument, else `$MESH_PEER`, else the loopback default of `mesh up`."""

from __future__ import annotations

import os
import re

from mesh.errors import ConfigError

#: Where `mesh up` listens when it is told nothing.
DEFAULT_ADDRESS = "127.0.0.1:7700"

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


def resolve(address: str | None) -> str:
    """The peer's `HOST:PORT`. Raises ConfigError where the argument or `$MESH_PEER` is not of that form."""
    if address is not None:
        return checked(address, "peer")
    return checked(os.environ.get("MESH_PEER") or DEFAULT_ADDRESS, "MESH_PEER")


def checked(address: str, key: str) -> str:
    """`address` itself if it is `HOST:PORT` (IPv6 in brackets), else ConfigError naming `key`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(f"{key}: {address!r} is not HOST:PORT, as in {DEFAULT_ADDRESS}")
    return address
