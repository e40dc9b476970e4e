"""What the kernel knows of a TCP connection (`struct tcp_info`, linux/tcp.h). Elsewhere nothing is known."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

#: Offsets of the fields that are read; the structure only ever grows at its end.
_BACKOFF, _UNACKED, _HEARD_DATA, _HEARD_ACK = 4, 24, 52, 56
_RTT, _RETRANSMITTED, _ACKED, _MIN_RTT, _SEGMENTS, _DELIVERY = 68, 100, 120, 148, 156, 160
_SIZE = 232
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_OPTION = getattr(socket, "TCP_INFO", None)


class TcpInfo(NamedTuple):
    """Round trips in seconds, of the last few segments and the least seen; bytes acknowledged; segments.

    bytes_per_s: what was delivered last. heard_s: seconds since anything came from the other end's kernel. probing: the
    other end takes nothing, so the kernel asks more and more seldom whether it does again.
    """

    rtt_s: float
    min_rtt_s: float
    acked_bytes: int
    sent_segments: int
    retransmitted: int
    bytes_per_s: float
    heard_s: float
    probing: bool


def tcp_info(sock: socket.socket) -> TcpInfo | None:
    """The figures of a connection, or None where the kernel gives none."""
    if _OPTION is None:
        return None
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, _OPTION, _SIZE)
    except OSError:
        return None
    if len(data) < _DELIVERY + 8:
        return None
    (rtt_us,) = _U32.unpack_from(data, _RTT)
    (min_rtt_us,) = _U32.unpack_from(data, _MIN_RTT)
    (acked,) = _U64.unpack_from(data, _ACKED)
    (segments,) = _U32.unpack_from(data, _SEGMENTS)
    (retransmitted,) = _U32.unpack_from(data, _RETRANSMITTED)
    (rate,) = _U64.unpack_from(data, _DELIVERY)
    (unacked,) = _U32.unpack_from(data, _UNACKED)
    heard_ms = min(_U32.unpack_from(data, _HEARD_DATA)[0], _U32.unpack_from(data, _HEARD_ACK)[0])
    return TcpInfo(
        rtt_us * 1e-6,
        min(min_rtt_us, rtt_us) * 1e-6,
        acked,
        segments,
        retransmitted,
        float(rate),
        heard_ms * 1e-3,
        data[_BACKOFF] > 0 and unacked == 0,
    )
