"""How long an operation may take, from its size and the link. Pure."""

from __future__ import annotations

#: What any operation is given: a machine may be busy, a route may change.
_PATIENCE_S = 10.0
#: Slow start of a connection, losses, a handshake: round trips that pass whatever the size.
_ROUND_TRIPS = 20
#: A link slower than 1 Mbit/s is not one that a model is served over.
_LEAST_BYTES_PER_S = 125_000.0
#: Of a known rate, what a link may fall to before it counts as stalled.
_SHARE = 0.1


def allowance_s(size_bytes: int, rtt_s: float = 0.0, bytes_per_s: float | None = None) -> float:
    """Seconds after which an operation that moves `size_bytes` has failed.

    rtt_s: the link's round trip. bytes_per_s: what it is known to carry, or None.
    """
    rate = max(_LEAST_BYTES_PER_S, _SHARE * (bytes_per_s or 0.0))
    return _PATIENCE_S + _ROUND_TRIPS * rtt_s + size_bytes / rate
