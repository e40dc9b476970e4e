"""The far ends of `benchmarks.transport.faults`: processes that can be stopped, killed, or made to misbehave.

`python -m benchmarks.transport.fault_ends SOCKET` imports what ends need, once, and forks one for each line on its
standard input; the line says what it is to be: `end`, or `relay`, which is `transport.relay` as it stands. Each
connects to the Unix socket, says its process id, and is driven by lines of JSON from there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transport import Acceptor, Channel, DeadlineExceeded, Fabric, TransportError, connect_channel, open_fabric

#: Messages each way in one meeting, collectives in one, and how long they are.
COUNT, ROUNDS = 5, 8
_SIZES = (0, 100, 5000, 70_000, 600_000)
_BULK_SIZES = (300_000, 1_500_000, 4_000_000)
_TENSORS = (1, 576, 20_000, 300_000)
#: What payloads are cut from: drawing them anew would cost more than sending them.
_BLOCK = random.Random(0).randbytes(8 << 20)
HELLO = b"fault"
HOST = "127.0.0.1"
_READY_S = 10.0


def payload(seed: int, way: str, index: int, work: str) -> bytes:
    """What one end sends as its message number `index`; both ends know it."""
    rng = random.Random(f"{seed}/{way}/{index}")
    size = rng.choice(_BULK_SIZES if work == "bulk" and way == "near" else _SIZES)
    at = rng.randrange(len(_BLOCK) - size)
    return _BLOCK[at : at + size]


def prepare(fabric: Fabric) -> Fabric:
    """Goodbyes that are not answered are not waited for, or they would count as left over."""
    if hasattr(fabric, "linger_s"):
        fabric.linger_s = 0.05
    return fabric


def wide_everywhere() -> None:
    """Have bulk take streams of its own inside a machine too."""
    import transport.tcp_streams

    transport.tcp_streams.WIDE_RTT_S = 0.0


def descriptors() -> int:
    """How many are open in this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Limits:
    """Times operations against what they are allowed: `over_s` is the most that one took beyond it."""

    def __init__(self) -> None:
        self.over_s = 0.0

    def took(self, began: float, allowed_s: float) -> None:
        """An operation that began then has ended now."""
        self.over_s = max(self.over_s, time.monotonic() - began - allowed_s)


class Wrong(Exception):
    """What must never happen has happened."""


def check(message: Any, order: dict[str, Any], way: str, seen: set[int]) -> None:
    """Raises Wrong unless the message is what the other end sent."""
    index = int(message.meta)
    if index in seen or bytes(message.payload) != payload(order["seed"], way, index, order["work"]):
        raise Wrong(f"message {index} is not what was sent")
    seen.add(index)


# -- an end


def _serve(sock: socket.socket) -> None:
    wide_everywhere()
    fabrics: dict[str, Fabric] = {}
    lines = sock.makefile("r")

    def say(document: object) -> None:
        sock.sendall(json.dumps(document).encode() + b"\n")

    say({"pid": os.getpid()})
    for line in lines:
        order: dict[str, Any] = json.loads(line)
        fabric = fabrics.get(order["backend"])
        if fabric is None:
            fabric = fabrics[order["backend"]] = prepare(open_fabric(order["backend"]))
        limits = Limits()
        outcome, wrong = "delivered", ""
        channel: Channel | None = None
        try:
            channel = _channel(fabric, order, say)
            _WORK[order["work"]](channel, order, limits)
        except Wrong as error:
            wrong = str(error)
        except TransportError as error:
            outcome = type(error).__name__
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if channel is not None and outcome == "delivered" and not wrong:
            channel.close()  # the other rank may still read the last of it
        elif channel is not None:
            channel.abort()
        _settle(fabric)
        say({"outcome": outcome, "wrong": wrong, "over_s": limits.over_s, "descriptors": descriptors()})


def _channel(fabric: Fabric, order: dict[str, Any], say: Any) -> Channel:
    key, patience_s = bytes.fromhex(order["key"]), order["patience_s"]
    if "address" in order:
        address = bytes.fromhex(order["address"])
        channel = connect_channel(fabric, address, name="far", key=key, hello=HELLO, patience_s=patience_s)
        say({"connected": True})
        return channel
    acceptor = Acceptor(fabric, fabric.listen(HOST))
    acceptor.expect(HELLO, name="near", key=key, patience_s=patience_s)
    say({"address": acceptor.address.hex()})
    deadline = time.monotonic() + patience_s
    try:
        while time.monotonic() < deadline:
            for _, channel in acceptor.poll():
                return channel
            fabric.wait(0.02)
        raise DeadlineExceeded("nobody came")
    finally:
        acceptor.close()


def _settle(fabric: Fabric) -> None:
    deadline = time.monotonic() + 2.0
    pipes: Any = getattr(fabric, "_pipes", ())
    while pipes and time.monotonic() < deadline:
        fabric.wait(0.01)


def _talk(channel: Channel, order: dict[str, Any], limits: Limits) -> None:
    """Send all, receive all, then wait for the goodbye."""
    seed, work = order["seed"], order["work"]
    seen: set[int] = set()
    for index in range(COUNT):
        if order.get("corrupt_at") == index:
            corrupt(channel, random.Random(seed))
        channel.send(b"%d" % index, payload(seed, "far", index, work))
        _misbehave(channel, order, index)
    for index in range(COUNT):
        _misbehave(channel, order, COUNT + index)
        check(_receive(channel, limits, 4_000_000), order, "near", seen)
    try:
        _receive(channel, limits, 0)
    except TransportError as error:
        if type(error).__name__ != "ChannelClosed":
            raise


def _receive(channel: Channel, limits: Limits, size: int) -> Any:
    allowed_s, began = channel.allowance_s(size), time.monotonic()
    try:
        return channel.receive(size_bytes=size)
    finally:
        limits.took(began, allowed_s)


def _misbehave(channel: Channel, order: dict[str, Any], at: int) -> None:
    if order.get("abort_at") == at:
        channel.abort()
    if order.get("deaf_at") == at:
        time.sleep(2 * order["patience_s"])


def _reduce(channel: Channel, order: dict[str, Any], limits: Limits) -> None:
    import torch

    from transport.collectives import Group

    rank, seed = order["rank"], order["seed"]
    group = Group(rank, 2, {1 - rank: channel})
    for index in range(ROUNDS):
        size = random.Random(f"{seed}/{index}").choice(_TENSORS)
        parts = [
            torch.frombuffer(bytearray(_BLOCK[: size * 2]), dtype=torch.int16).to(torch.float32) + each
            for each in (seed % 100 + index, 2 * index)
        ]
        _misbehave(channel, order, index)
        allowed_s, began = channel.allowance_s(2 * 4 * size), time.monotonic()
        try:
            found = group.all_reduce_(parts[rank].clone())
        finally:
            limits.took(began, allowed_s)
        if not torch.equal(found, parts[0] + parts[1]):
            raise Wrong(f"the sum of collective {index} is not that of what was given")


_WORK = {"messages": _talk, "bulk": _talk, "collective": _reduce}


def corrupt(channel: Channel, rng: random.Random) -> None:
    """Change one bit of the next frame."""
    pipe: Any = channel._pipe
    genuine = pipe.send

    def send(parts: Sequence[Any]) -> Any:
        pipe.send = genuine
        message = bytearray(b"".join(parts))
        message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
        return genuine((bytes(message),))

    pipe.send = send


# -- the process that forks


def _relay(sock: socket.socket) -> None:
    import trio

    import transport.relay

    sock.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
    os.dup2(sock.fileno(), 0)
    os.dup2(sock.fileno(), 1)
    trio.run(transport.relay._main, HOST, 1e10)


def main() -> None:
    """Fork until standard input ends."""
    import torch

    import transport.collectives
    import transport.relay
    import transport.tcp  # noqa: F401

    torch.set_num_threads(1)
    path = sys.argv[1]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that are killed
    for line in sys.stdin:
        if os.fork():
            continue
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                (_relay if line.strip() == "relay" else _serve)(sock)
        except (OSError, KeyboardInterrupt):
            pass  # whoever drove it is gone
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
