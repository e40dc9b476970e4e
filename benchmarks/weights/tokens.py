"""A token's way beside weights: `python -m benchmarks.weights.tokens NAMESPACE far HOST | near ADDRESS`.

Two processes that talk as the workers of neighbouring stages do, over a channel of their own. `-` is no namespace. The
far end prints its address; the near end is given that, and sends 64 bytes every 50 ms until its standard input ends.
The far end then prints what it saw: when each message was sent, and how long it took, seconds of the machine's
monotonic clock. The classes are for whoever measures.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import time
from types import TracebackType
from typing import NamedTuple, Self

from simulations.wide_area import enter
from transport import Acceptor, Channel, TransportError, connect_channel, open_fabric

_KEY, _HELLO = bytes(range(32)), b"tokens"
_STAMP = struct.Struct("<q")
_BYTES, _EVERY_S = 64, 0.05
_END_S = 10.0


class Seen(NamedTuple):
    """One message."""

    sent_at: float
    delay_s: float


class Tokens:
    """Both ends, running. After `stop`, `seen` has what arrived."""

    def __init__(self, near: str | None, far: str | None, host: str) -> None:
        self._spaces = (near or "-", far or "-")
        self._host = host
        self.seen: list[Seen] = []

    def __enter__(self) -> Self:
        near, far = self._spaces
        self._far = _start(far, "far", self._host)
        assert self._far.stdout is not None
        self._near = _start(near, "near", self._far.stdout.readline().strip())
        return self

    def stop(self) -> None:
        """Let them end, and take what was seen."""
        try:
            self._near.communicate(timeout=_END_S)
            said, _ = self._far.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            return
        self.seen = [Seen(*pair) for pair in json.loads(said or "[]")]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (self._near, self._far):
            if process.poll() is None:
                process.kill()
                process.communicate()


def _start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.weights.tokens", *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _far(host: str) -> None:
    fabric = open_fabric("tcp")
    acceptor = Acceptor(fabric, fabric.listen(host))
    acceptor.expect(_HELLO, name="near", key=_KEY)
    print(acceptor.address.hex(), flush=True)
    made: list[tuple[bytes, Channel]] = []
    while not made:
        fabric.wait(0.1)
        made = acceptor.poll()
    channel = made[0][1]
    seen = []
    try:
        while True:
            (sent_ns,) = _STAMP.unpack(channel.receive(60.0).meta[: _STAMP.size])
            seen.append(Seen(sent_ns / 1e9, (time.monotonic_ns() - sent_ns) / 1e9))
    except TransportError:
        print(json.dumps(seen), flush=True)
    os._exit(0)


def _near(address: str) -> None:
    fabric = open_fabric("tcp")
    channel = connect_channel(fabric, bytes.fromhex(address), name="far", key=_KEY, hello=_HELLO)
    due = time.monotonic()
    while not select.select([0], [], [], 0)[0]:
        channel.send(_STAMP.pack(time.monotonic_ns()).ljust(_BYTES, b"."))
        due += _EVERY_S
        while (left_s := due - time.monotonic()) > 0:
            channel.check()
            fabric.wait(left_s)
    channel.close()
    fabric.close()


if __name__ == "__main__":
    space, role, what = sys.argv[1:]
    if space != "-":
        enter(space)
    (_far if role == "far" else _near)(what)
