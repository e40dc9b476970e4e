"""Which peer a client talks to: an argument, else `$MESH_PEER`, else the loopback default of `mesh up`."""

from __future__ import annotations

import os

from mesh.address import DEFAULT_ADDRESS, split_address
from mesh.errors import ConfigError


def resolve(address: str | None) -> str:
    """The peer's `HOST:PORT`. Raises ConfigError where the argument or `$MESH_PEER` is not of that form."""
    if address is not None:
        return checked(address, "peer")
    return checked(os.environ.get("MESH_PEER") or DEFAULT_ADDRESS, "MESH_PEER")


def checked(address: str, key: str) -> str:
    """`address` itself if it is `HOST:PORT` (IPv6 in brackets), else ConfigError naming `key`."""
    try:
        port = split_address(address)[1]
    except ValueError:
        port = 0
    if port == 0:
        raise ConfigError(f"{key}: {address!r} is not HOST:PORT, as in {DEFAULT_ADDRESS}")
    return address
