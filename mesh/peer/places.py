"""Where a peer listens, and where others reach it."""

from __future__ import annotations

import errno
import socket

from mesh.address import join_address
from mesh.errors import AddressInUse, ConfigError

#: Random ports tried until one is free for UDP and for TCP.
PORT_TRIES = 20


def reachable(host: str) -> str:
    """An address of this machine that others may reach, where it listens on all of them: that of its own way out."""
    if host not in ("0.0.0.0", "::"):
        return host
    family, far = (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((far, 9))  # of the ranges for documentation (RFC 5737, RFC 3849); nothing is sent
        except OSError:
            raise ConfigError(f"listen={host}: this machine has no way out; give --advertise HOST:PORT") from None
        return str(probe.getsockname()[0])


def local_host(host: str) -> str:
    """Where a command on this machine reaches a peer that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def free_port(host: str, port: int) -> tuple[str, int]:
    """The port to listen on, free for UDP and TCP; 0 picks one. Raises AddressInUse, or ConfigError for a bad host.

    The sockets are closed again before gossip and gRPC take the number; the check is there to fail early and in words.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(PORT_TRIES):
        with socket.socket(family, socket.SOCK_STREAM) as tcp, socket.socket(family, socket.SOCK_DGRAM) as udp:
            try:
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tcp.bind((host, port))
                number = int(tcp.getsockname()[1])
                udp.bind((host, number))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(f"listen={join_address(host, port)}: {error.strerror or error}") from None
                if port:
                    break
            else:
                return host, number
    raise AddressInUse(
        f"listen={join_address(host, port)}: the port is taken; stop what listens there or give another --listen"
    )
