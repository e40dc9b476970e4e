"""Bytes that crossed each TCP connection of this machine, as the kernel counts them (Linux, `sock_diag(7)`).

Nothing in the measured processes takes part, so the figures hold for what was really sent: frames, seals, heartbeats.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

import psutil

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _NLMSG_DONE, _NLMSG_ERROR = 20, 3, 2
_REQUEST_AND_DUMP = 0x301
_INET_DIAG_INFO = 2
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
#: Family, protocol, extensions, padding, states, and an empty socket id.
_QUERY = struct.Struct("=BBBxI48x")
#: `struct inet_diag_msg`, of which the ports matter; they are in network order.
_MESSAGE_BYTES = 72
_PORTS = struct.Struct("!4xHH")
#: Offset of tcpi_bytes_acked in `struct tcp_info` (linux/tcp.h, since Linux 4.1).
_BYTES_ACKED = 120
_ESTABLISHED = 1
_TIMEOUT_S = 5.0


def sent_bytes() -> dict[tuple[int, int], int]:
    """Bytes sent and acknowledged on each established IPv4 connection, by (local port, remote port).

    Raises OSError where the kernel has no such interface.
    """
    query = _QUERY.pack(socket.AF_INET, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), 1 << _ESTABLISHED)
    counts: dict[tuple[int, int], int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        netlink.send(_HEADER.pack(_HEADER.size + len(query), _SOCK_DIAG_BY_FAMILY, _REQUEST_AND_DUMP, 1, 0) + query)
        while True:
            datagram = memoryview(netlink.recv(1 << 16))
            while datagram:
                length, kind, *_ = _HEADER.unpack_from(datagram)
                if kind == _NLMSG_DONE:
                    return counts
                if kind == _NLMSG_ERROR:
                    raise OSError("the kernel refuses to list its connections")
                ports, acked = _connection(datagram[_HEADER.size : length])
                counts[ports] = acked
                datagram = datagram[_aligned(length) :]


def links(workers: dict[str, Iterable[int]]) -> dict[tuple[int, int], tuple[str, str]]:
    """Who talks to whom: (local port, remote port) to (sender, receiver), for connections between two of the workers.

    `workers` holds process numbers by the name to call them.
    """
    ends: dict[tuple[int, int], str] = {}
    for name, pids in workers.items():
        for pid in pids:
            for connection in psutil.Process(pid).net_connections("tcp4"):
                if connection.raddr:
                    ends[connection.laddr.port, connection.raddr.port] = name
    return {ports: (name, ends[ports[::-1]]) for ports, name in ends.items() if ports[::-1] in ends}


def _connection(message: memoryview) -> tuple[tuple[int, int], int]:
    source, target = _PORTS.unpack_from(message)
    acked = 0
    attributes = message[_MESSAGE_BYTES:]
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _INET_DIAG_INFO and length >= _ATTRIBUTE.size + _BYTES_ACKED + 8:
            (acked,) = struct.unpack_from("=Q", attributes, _ATTRIBUTE.size + _BYTES_ACKED)
        attributes = attributes[_aligned(length) :]
    return (source, target), acked


def _aligned(length: int) -> int:
    return (length + 3) & ~3
