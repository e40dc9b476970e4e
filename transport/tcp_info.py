"""What the kernel knows of a TCP connection (`struct tcp_info`, linux/tcp.h). Elsewhere nothing is known."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

#: Offsets of the fields that are read; the structure only ever grows at its end.
_RTT, _RETRANSMITTED, _ACKED, _MIN_RTT, _SEGMENTS = 68, 100, 120, 148, 156
_SIZE = 232
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_OPTION = getattr(socket, "TCP_INFO", None)


class TcpInfo(NamedTuple):
    """Round trips in seconds, of the last few segments and the least seen; bytes acknowledged; segments."""

    rtt_s: float
    min_rtt_s: float
    acked_bytes: int
    sent_segments: int
    retransmitted: int


def tcp_info(sock: socket.socket) -> TcpInfo | None:
    """The figures of a connection, or None where the kernel gives none."""
    if _OPTION is None:
        return None
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, _OPTION, _SIZE)
    except OSError:
        return None
    if len(data) < _SEGMENTS + 4:
        return None
    (rtt_us,) = _U32.unpack_from(data, _RTT)
    (min_rtt_us,) = _U32.unpack_from(data, _MIN_RTT)
    (acked,) = _U64.unpack_from(data, _ACKED)
    (segments,) = _U32.unpack_from(data, _SEGMENTS)
    (retransmitted,) = _U32.unpack_from(data, _RETRANSMITTED)
    return TcpInfo(rtt_us * 1e-6, min(min_rtt_us, rtt_us) * 1e-6, acked, segments, retransmitted)
