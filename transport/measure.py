"""What a link carries: a few short round trips and one burst over each backend, between two processes of their own.

    python -m transport.measure

reads one JSON line. Of a process that answers:

    {"answer": ["tcp", ...], "host": "127.0.0.1", "key": HEX, "limit_s": 10}   -> {"addresses": {"tcp": HEX, ...}}

and of the one that measures, which prints what it found and ends:

    {"addresses": {"tcp": HEX, ...}, "key": HEX, "limit_s": 10}
        -> {"tcp": {"rtt_s": 0.0001, "bytes": 262144, "seconds": 0.0002}, ...}

A process, so that a burst neither holds up a daemon nor has to wait for it, and because UCX is loaded where it is tried
and nowhere else. Both end by themselves after `limit_s`, and when their input ends.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from transport import Acceptor, Channel, Fabric, TransportError, available, connect_channel, open_fabric, wait_any

#: Round trips of a measurement, and how long more are begun: a distant pair is known after one.
PINGS, PINGS_S = 20, 0.05
#: The burst: so many bytes, in chunks, unless the link is so slow that they have not left within this time.
BURST_BYTES, CHUNK_BYTES, BURST_S = 1 << 20, 32 << 10, 0.15
#: Bytes that may wait in this process: the kernel's buffers hold more than enough to keep a link busy.
_QUEUED_BYTES = 256 << 10
#: The part of a burst that the rate is taken from. The last window of TCP's slow start holds about half of it.
TRAIN_BYTES: Final = BURST_BYTES // 4
_HELLO = b"measure"
_RATE = struct.Struct("<Qd")
_PING, _BURST, _END = b"ping", b"burst", b"end"
#: Longest a measurement may be told to take.
MAX_LIMIT_S: Final = 60.0


def train_rate(arrivals: Sequence[tuple[float, int]], least_bytes: int = TRAIN_BYTES) -> tuple[int, float]:
    """The fastest run of at least `least_bytes` within a burst: its bytes and its seconds.

    `arrivals` are the times at which chunks had arrived, and their sizes. A burst of TCP's is a train of packets for
    each round trip of slow start, with silence between them; what passes within a train passes at the rate of the
    narrowest place on the way (Dovrolis, Ramanathan and Moore, "Packet-dispersion techniques and a capacity-estimation
    methodology", ToN 2004). Where the burst is shorter than that, all of it counts. (0, 0.0) where nothing can be told.
    """
    best = (0, 0.0)
    start = run = 0
    for end in range(1, len(arrivals)):
        run += arrivals[end][1]
        while run - arrivals[start + 1][1] >= least_bytes:
            start += 1
            run -= arrivals[start][1]
        seconds = arrivals[end][0] - arrivals[start][0]
        whole = end == len(arrivals) - 1 and best == (0, 0.0)
        if (run >= least_bytes or whole) and seconds > 0 and run * best[1] >= best[0] * seconds:
            best = (run, seconds)
    return best


def answer(backends: Sequence[str], host: str, key: bytes, limit_s: float, say: Callable[[object], None]) -> None:
    """Answer one measurement over each of `backends` that works here, for at most `limit_s`."""
    deadline = time.monotonic() + limit_s
    fabrics: list[Fabric] = []
    acceptors: dict[str, Acceptor] = {}
    for backend in backends:
        if backend in available():
            fabric = open_fabric(backend)
            fabrics.append(fabric)
            acceptors[backend] = Acceptor(fabric, fabric.listen(host))
            acceptors[backend].expect(_HELLO, name="who measures", key=key)
    say({"addresses": {backend: acceptor.address.hex() for backend, acceptor in acceptors.items()}})
    waiting = set(acceptors)
    while waiting and time.monotonic() < deadline:
        for backend in sorted(waiting):
            for _, channel in acceptors[backend].poll():
                waiting.discard(backend)
                _serve(channel, deadline)
        wait_any(fabrics, 0.05)
    for fabric in fabrics:
        fabric.close()


def _serve(channel: Channel, deadline: float) -> None:
    arrivals: list[tuple[float, int]] = []
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            message = channel.receive(left_s)
            if message.meta == _PING:
                channel.send(_PING)
            elif message.meta == _BURST:
                arrivals.append((time.monotonic(), message.payload.nbytes))
            else:
                channel.send(_RATE.pack(*train_rate(arrivals)))
                arrivals.clear()
    except TransportError:
        pass  # the measurement is over, or it failed: who measures knows


def measure(addresses: Mapping[str, bytes], key: bytes, limit_s: float) -> dict[str, dict[str, float]]:
    """Measure the link to who answers, over each backend in turn. One that fails is left out."""
    found = {}
    for backend, address in addresses.items():
        if backend not in available():
            continue
        try:
            fabric = open_fabric(backend)
        except TransportError:
            continue
        try:
            channel = connect_channel(fabric, address, name="who answers", key=key, hello=_HELLO)
            found[backend] = over(channel, time.monotonic() + limit_s / len(addresses))
            channel.close()
        except TransportError:
            pass  # a backend that does not work between these two: the others do, or none
        finally:
            fabric.close()
    return found


def over(channel: Channel, deadline: float) -> dict[str, float]:
    """One measurement over an open channel: `rtt_s` (median), and `bytes` and `seconds` of the burst."""
    rtts: list[float] = []
    begun = time.monotonic()
    while len(rtts) < PINGS and (not rtts or time.monotonic() - begun < PINGS_S):
        sent = time.monotonic()
        channel.send(_PING)
        channel.receive(_left(deadline))
        rtts.append(time.monotonic() - sent)
    chunk = bytes(CHUNK_BYTES)
    begun = time.monotonic()
    for _ in range(BURST_BYTES // CHUNK_BYTES):
        channel.send(_BURST, chunk)
        while channel.pending_bytes > _QUEUED_BYTES and time.monotonic() - begun < BURST_S:
            channel.fabric.wait(0.001)
            channel.check()
        if time.monotonic() - begun >= BURST_S:
            break
    channel.send(_END)
    size, seconds = _RATE.unpack(channel.receive(_left(deadline)).meta)
    return {"rtt_s": statistics.median(rtts), "bytes": size, "seconds": seconds}


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def main() -> int:
    """Do what the first line of the input says."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    key = bytes.fromhex(order["key"])
    limit_s = float(order["limit_s"])
    if not (math.isfinite(limit_s) and 0 < limit_s <= MAX_LIMIT_S):
        raise SystemExit(f"limit_s is {limit_s}: use 0 to {MAX_LIMIT_S:g}")
    threading.Thread(target=_end_with_input, daemon=True).start()
    # A link that swallows everything, or a library that hangs: the deadline holds all the same.
    threading.Timer(limit_s + 1.0, lambda: os._exit(1)).start()
    if "answer" in order:
        answer(order["answer"], order["host"], key, limit_s, _say)
    else:
        addresses = {backend: bytes.fromhex(address) for backend, address in order["addresses"].items()}
        _say(measure(addresses, key, limit_s))
    os._exit(0)


def _say(document: object) -> None:
    print(json.dumps(document), flush=True)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
