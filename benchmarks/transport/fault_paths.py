"""What lies between the ends in `benchmarks.transport.faults`: a path that goes wrong; and the ends' processes."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import trio

from benchmarks.transport.fault_ends import HOST
from transport.relay import endpoint, readdressed

#: A forward of a relay stays open for a minute, and a relay has 64 at most: another one is taken before that.
_RELAY_USES = 40
_START_S = 60.0


class Bad:
    """A path to a TCP listener that does one thing wrong once so many bytes have gone one way.

    how: "swallow" takes everything and hands nothing on, "freeze" takes nothing more, "cut" resets, "flip" changes one
    bit and goes on. Neither of the first two ever ends a connection, so no end is told.
    """

    def __init__(self, how: str, after: int, way: int, rng: random.Random) -> None:
        self._how, self._after, self._way, self._rng = how, after, way, rng
        self._passed = 0
        self.happened = False

    @asynccontextmanager
    async def open(self, address: bytes) -> AsyncIterator[bytes]:
        """The address of the same listener, through this path, for the length of the block."""
        host, port, _ = endpoint(address)
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host=HOST)
            async with listener:
                nursery.start_soon(self._accept, listener, (host, port), nursery)
                try:
                    yield readdressed(address, HOST, listener.socket.getsockname()[1])
                finally:
                    nursery.cancel_scope.cancel()

    async def _accept(self, listener: trio.SocketListener, place: tuple[str, int], nursery: trio.Nursery) -> None:
        while True:
            nursery.start_soon(self._connection, await listener.accept(), place)

    async def _connection(self, near: trio.SocketStream, place: tuple[str, int]) -> None:
        async with near:
            try:
                far = await trio.open_tcp_stream(*place)
            except OSError:
                return
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, near, far, 0)
                nursery.start_soon(self._pump, far, near, 1)

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream, way: int) -> None:
        try:
            data: bytes | bytearray
            while data := await source.receive_some(1 << 18):
                if not self.happened and way == self._way:
                    self._passed += len(data)
                    if self._passed > self._after:
                        self.happened = True
                        if self._how == "flip":
                            data = _flipped(data, self._rng)
                if self.happened and self._how == "cut":
                    for stream in (source, target):
                        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        stream.socket.close()
                    return
                if self.happened and self._how == "freeze":
                    await trio.sleep_forever()
                if not (self.happened and self._how == "swallow"):
                    await target.send_all(data)
            if not (self.happened and self._how in ("swallow", "freeze")):
                await target.send_eof()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            if self.happened and self._how in ("swallow", "freeze"):
                return
            for stream in (source, target):  # a break at one side is one at the other
                try:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    stream.socket.close()
                except OSError:
                    pass


def _flipped(data: bytes | bytearray, rng: random.Random) -> bytearray:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return changed


class Helper:
    """A process at the far end of a Unix socket."""

    def __init__(self, what: str, stream: trio.SocketStream) -> None:
        self.what = what
        self.pid = 0
        self.uses = 0
        self.doomed = False
        self._stream = stream
        self._rest = b""

    async def say(self, document: object) -> None:
        """Give an order; a helper that is gone gets none."""
        try:
            await self._stream.send_all(json.dumps(document).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line; None where the process is gone. Raises trio.TooSlowError."""
        with trio.fail_after(timeout_s):
            while b"\n" not in self._rest:
                try:
                    data = await self._stream.receive_some(1 << 16)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    data = b""
                if not data:
                    return None
                self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.doomed = self.doomed or number == signal.SIGKILL
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def end(self) -> None:
        """Kill it."""
        self.signal(signal.SIGKILL)
        self._stream.socket.close()


class Pool:
    """Helpers by what they are: those that idle are given again."""

    def __init__(self, process: subprocess.Popen[bytes], listener: trio.SocketListener) -> None:
        self._process, self._listener = process, listener
        self._idle: dict[str, list[Helper]] = {"end": [], "relay": []}
        self._all: set[Helper] = set()
        self._lock = trio.Lock()
        self.started = 0

    @property
    def open(self) -> int:
        """Descriptors of this process that helpers account for."""
        return len(self._all)

    async def take(self, what: str) -> Helper:
        """One of `what`, for the caller alone until it is given back or dropped."""
        if self._idle[what]:
            return self._idle[what].pop()
        async with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(what.encode() + b"\n")
            self._process.stdin.flush()
            with trio.fail_after(_START_S):
                helper = Helper(what, await self._listener.accept())
        self._all.add(helper)
        self.started += 1
        helper.pid = int((await helper.hear(_START_S) or {})["pid"])
        return helper

    def give(self, helper: Helper) -> None:
        """It is free again."""
        helper.uses += 1
        if helper.what == "relay" and helper.uses >= _RELAY_USES:
            self.drop(helper)
        else:
            self._idle[helper.what].append(helper)

    def drop(self, helper: Helper) -> None:
        """It is of no more use."""
        helper.end()
        self._all.discard(helper)

    def close(self) -> None:
        """End all."""
        for helper in tuple(self._all):
            self.drop(helper)


@asynccontextmanager
async def open_pool() -> AsyncIterator[Pool]:
    """Helpers for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="isthmus-faults-") as folder:
        path = str(Path(folder) / "ends")
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.bind(path)
        sock.listen(64)
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "benchmarks.transport.fault_ends", path],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        pool = Pool(process, trio.SocketListener(sock))
        try:
            yield pool
        finally:
            pool.close()
            sock.close()
            process.kill()
            process.communicate()


class Relayed:
    """A path through a relay's process."""

    def __init__(self, helper: Helper) -> None:
        self.helper = helper

    async def open(self, address: bytes) -> bytes:
        """The address of the same listener, through the relay."""
        host, port, cookie = endpoint(address)
        number = self.helper.uses + 1
        await self.helper.say({"id": number, "open": [host, port], "cookie": cookie.hex()})
        while (answer := await self.helper.hear(_START_S)) is not None:
            if answer["id"] == number and "port" in answer:
                return readdressed(address, HOST, int(answer["port"]))
        raise OSError("the relay is gone")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.helper.signal(signal.SIGCONT)
