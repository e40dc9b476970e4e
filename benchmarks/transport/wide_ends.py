"""The two ends of a wide-area measurement, each a process in its own namespace.

`python -m benchmarks.transport.wide_ends far|near NAMESPACE`, driven by lines of JSON on standard input. The far end
counts what arrives, in the last part of a run; both ends read the machine's monotonic clock, so delays are one way.
"""

from __future__ import annotations

import json
import socket
import statistics
import struct
import sys
import time
from typing import Any

from simulations.wide_area import FAR_HOST, enter
from transport import Acceptor, Channel, TransportError, connect_channel, open_fabric

_KEY = bytes(range(32))
_PLAIN_PORT = 5001
_TOKEN, _BULK, _END = 1, 2, 3
_STAMP = struct.Struct("<Q")
_TOKEN_BYTES = 64
_TOKEN_EVERY_S = 0.05
_AHEAD_BYTES = 32 << 20


def main() -> None:
    """Answer orders until standard input ends."""
    role, space = sys.argv[1:]
    enter(space)
    (_far if role == "far" else _near)()


def _orders() -> Any:
    for line in sys.stdin:
        yield json.loads(line)


def _say(document: Any) -> None:
    print(json.dumps(document), flush=True)


# -- the far end


def _far() -> None:
    plain = socket.create_server((FAR_HOST, _PLAIN_PORT))
    fabric = open_fabric("tcp")
    acceptor = Acceptor(fabric, fabric.listen(FAR_HOST))
    _say({"address": acceptor.address.hex()})
    for number, order in enumerate(_orders()):
        if order["what"] == "plain":
            _say({"ready": True})
            _say({"bytes_per_s": _sink(plain, order["last_s"])})
            continue
        hello = b"%d" % number
        acceptor.expect(hello, name="near", key=_KEY)
        _say({"hello": hello.hex()})
        channel = None
        while channel is None:
            for _, made in acceptor.poll():
                channel = made
            fabric.wait(0.1)
        _say(_count(channel, order["last_s"]))
        channel.close()


def _sink(listener: socket.socket, last_s: float) -> float:
    sock, _ = listener.accept()
    arrived = []
    buffer = bytearray(1 << 20)
    with sock:
        try:
            while count := sock.recv_into(buffer):
                arrived.append((time.monotonic(), count))
        except ConnectionResetError:
            pass  # how the near end stops
    return _rate(arrived, last_s)


def _count(channel: Channel, last_s: float) -> dict[str, Any]:
    arrived, delays = [], []
    while True:
        message = channel.receive(60)
        now = time.monotonic()
        if message.kind == _TOKEN:
            delays.append((now, now - _STAMP.unpack(message.meta[: _STAMP.size])[0] * 1e-9))
        elif message.kind == _BULK:
            arrived.append((now, message.payload.nbytes))
        else:
            break
    last = [delay for at, delay in delays if at >= now - last_s]
    return {
        "bytes_per_s": _rate(arrived, last_s) if arrived else None,
        "delay_s": statistics.median(last) if last else None,
        "late_s": sorted(last)[int(0.95 * len(last))] if last else None,
    }


def _rate(arrived: list[tuple[float, int]], last_s: float) -> float:
    """Bytes a second over the last seconds, from one arrival to another."""
    end = arrived[-1][0]
    chosen = [(at, count) for at, count in arrived if at >= end - last_s]
    span = chosen[-1][0] - chosen[0][0]
    return sum(count for _, count in chosen[1:]) / span if span > 0 else 0.0


# -- the near end


def _near() -> None:
    fabric = open_fabric("tcp")
    for order in _orders():
        if order["what"] == "plain":
            _pour(order["congestion"], order["seconds"])
            _say({})
            continue
        address, hello = bytes.fromhex(order["address"]), bytes.fromhex(order["hello"])
        channel = connect_channel(fabric, address, name="far", key=_KEY, hello=hello)
        try:
            _say(_send(channel, order))
        except TransportError as error:
            _say({"error": str(error)})


def _pour(congestion: str, seconds: float) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        sock.connect((FAR_HOST, _PLAIN_PORT))
        data, end = bytes(1 << 18), time.monotonic() + seconds
        sock.settimeout(1.0)
        while time.monotonic() < end:
            try:
                sock.send(data)
            except TimeoutError:
                continue
        # What waits in the kernel is not worth waiting for.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _send(channel: Channel, order: dict[str, Any]) -> dict[str, Any]:
    end = time.monotonic() + order["seconds"]
    payload = bytes(order["size"])
    token_at = time.monotonic()
    streams = 0
    while (now := time.monotonic()) < end:
        if order["bulk"]:
            while channel.bulk_pending_bytes < _AHEAD_BYTES // 4 + order["size"]:
                channel.send(b"", payload, kind=_BULK, bulk=True)
        if order["tokens"] and now >= token_at:
            channel.send(_STAMP.pack(time.monotonic_ns()).ljust(_TOKEN_BYTES, b"."), kind=_TOKEN)
            token_at = max(token_at + _TOKEN_EVERY_S, now)
        channel.check()
        channel.fabric.wait(min(0.01, max(0.0, token_at - now) if order["tokens"] else 0.01))
        streams = max(streams, 1 + len(channel._pipe._bundle.streams))  # type: ignore[attr-defined]
    channel.send(b"", kind=_END)
    while channel.pending_bytes:
        channel.check()
        channel.fabric.wait(0.01)
    leave = time.monotonic() + 1.0
    while time.monotonic() < leave:
        try:
            channel.check()
        except TransportError:
            break
        channel.fabric.wait(0.05)
    channel.abort()
    return {"streams": streams}


if __name__ == "__main__":
    main()
