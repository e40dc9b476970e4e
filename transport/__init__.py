"""Bytes and tensors between two processes, and collectives over them. Knows no sites, jobs or models.

Start at `open_fabric`, then `connect_channel` and `Acceptor`; `base` describes the seam that the backends stand behind.
"""

from __future__ import annotations

import importlib.util

from transport.accept import Acceptor
from transport.base import (
    AddressError,
    Buffer,
    ChannelBroken,
    ChannelClosed,
    DeadlineExceeded,
    Fabric,
    FrameError,
    Listener,
    Pipe,
    Ticket,
    TransportError,
)
from transport.channel import Channel, Message, connect_channel
from transport.waiting import SPIN_S, wait_any

__all__ = [
    "Acceptor",
    "AddressError",
    "Buffer",
    "Channel",
    "ChannelBroken",
    "ChannelClosed",
    "DeadlineExceeded",
    "Fabric",
    "FrameError",
    "Listener",
    "Message",
    "Pipe",
    "Ticket",
    "TransportError",
    "available",
    "connect_channel",
    "open_fabric",
    "wait_any",
]


def available() -> tuple[str, ...]:
    """The backends that work between processes on this machine, best first: ("ucx", "tcp") or ("tcp",)."""
    return ("ucx", "tcp") if importlib.util.find_spec("ucxx") is not None else ("tcp",)


def open_fabric(name: str, *, spin_s: float = SPIN_S) -> Fabric:
    """A fresh fabric: "tcp", "ucx" or, within one process, "memory".

    spin_s: how long a wait polls before it sleeps. Raises TransportError, saying what to do, for an unknown name or
    when UCX is not installed.
    """
    if name == "memory":
        from transport.memory import MemoryFabric

        return MemoryFabric(spin_s=spin_s)
    if name == "tcp":
        from transport.tcp import TcpFabric

        return TcpFabric(spin_s=spin_s)
    if name == "ucx":
        try:
            from transport.ucx import UcxFabric
        except ImportError as error:
            raise TransportError(f"UCX is not available ({error}); install the extra `ucx`, or use tcp") from None
        return UcxFabric(spin_s=spin_s)
    raise TransportError(f"no transport named {name!r}; use one of tcp, ucx, memory")
