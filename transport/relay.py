"""A relay: bytes handed on between two processes that cannot reach each other, or reach each other faster this way.

    python -m transport.relay HOST BYTES_PER_S

is told by JSON lines on its standard input, and ends with it:

    {"id": 1, "open": ["10.0.0.7", 4711], "cookie": HEX}   -> {"id": 1, "port": 50123}
    {"id": 1, "keep": true}                                   (is wanted for longer)

A *forward* is a port of its own that hands on each connection to one place. What it hands on is sealed by the two
ends, by TLS or `transport.seal`, and the relay has no key to it. With a cookie (that of a `TcpListener`'s address) a
connection must show it in its first bytes before the relay connects onward, so that strangers reach nobody.

Everything is bounded: forwards, connections, bytes on the way, bytes per second of all together, the time to connect,
and the time that a forward stays open when nobody uses it. A half that closes is closed on the other side, a half that
breaks is broken there.
"""

from __future__ import annotations

import hmac
import json
import math
import socket
import struct
import sys
from typing import Any, Final

import trio

from transport.base import AddressError
from transport.deadlines import allowance_s
from transport.tcp import _ADDRESS, _COOKIE_BYTES, _MAGIC, _PREFIX

#: Forwards at once, and connections through all of them: a channel has up to 32.
MAX_FORWARDS, MAX_CONNECTIONS = 64, 512
#: Bytes on the way in one direction of a connection, beside what the kernel holds.
BUFFER_BYTES: Final = 256 * 1024
#: How long a connection may take to show its cookie, and the relay to connect onward.
CONNECT_S: Final = 10.0
#: A forward that nobody uses is closed after this.
UNUSED_S: Final = 60.0
#: A neighbour that has vanished without a word is noticed after 25 seconds: see `deadlines.LINK_S`.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


def endpoint(address: bytes) -> tuple[str, int, bytes]:
    """Host, port and cookie of a TCP listener's address. Raises AddressError for anything else."""
    try:
        if not address.startswith(_PREFIX):
            raise ValueError
        cookie, port = _ADDRESS.unpack_from(address, len(_PREFIX))
        host = address[len(_PREFIX) + _ADDRESS.size :].decode("ascii")
        if not host or not port:
            raise ValueError
    except (ValueError, UnicodeDecodeError, struct.error):
        raise AddressError(f"not a tcp address: {address[:16]!r}; give one from TcpFabric.listen") from None
    return host, port, cookie


def readdressed(address: bytes, host: str, port: int) -> bytes:
    """The same listener's address, reached through `host` and `port`. Raises AddressError."""
    return _PREFIX + _ADDRESS.pack(endpoint(address)[2], port) + host.encode("ascii")


class Rate:
    """A bound on bytes per second, shared by all: each waits until what was let through before has had its time.

    A tenth of a second may pass at once.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_s = -math.inf

    def wait_s(self, size: int, now: float) -> float:
        """How long to wait before `size` bytes may be handed on."""
        self._due_s = max(self._due_s, now - 0.1) + size / self._bytes_per_s
        return max(0.0, self._due_s - now)


class Forward:
    """One port that leads to one place."""

    def __init__(self, place: tuple[str, int], cookie: bytes | None, listener: trio.SocketListener) -> None:
        self.place = place
        self.cookie = cookie
        self.listener = listener
        self.connections = 0
        self.used_s = trio.current_time()

    def wanted_s(self, now: float) -> float:
        """How much longer it stays open if nobody uses it from now on; not above 0: it has been open long enough."""
        return UNUSED_S if self.connections else self.used_s + UNUSED_S - now

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.listener.socket.getsockname()[1])


class Relay:
    """The forwards of this process."""

    def __init__(self, host: str, bytes_per_s: float) -> None:
        self._host = host
        self._rate = Rate(bytes_per_s)
        self._forwards: dict[int, Forward] = {}
        self._connections = 0

    async def run(self, orders: trio.abc.ReceiveStream) -> None:
        """Until the orders end."""
        async with trio.open_nursery() as nursery:
            rest = b""
            while data := await orders.receive_some(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line), nursery)
            nursery.cancel_scope.cancel()

    def _obey(self, order: dict[str, Any], nursery: trio.Nursery) -> None:
        number = int(order["id"])
        if "open" not in order:
            if number in self._forwards:
                self._forwards[number].used_s = trio.current_time()
            return
        if len(self._forwards) >= MAX_FORWARDS:
            _say({"id": number, "error": f"{MAX_FORWARDS} forwards are open"})
            return
        try:
            sock = trio.socket.from_stdlib_socket(_listening(self._host))
        except OSError as error:
            _say({"id": number, "error": f"cannot listen on {self._host}: {error.strerror or error}"})
            return
        host, port = order["open"]
        cookie = bytes.fromhex(order["cookie"]) if order.get("cookie") else None
        forward = Forward((str(host), int(port)), cookie, trio.SocketListener(sock))
        self._forwards[number] = forward
        nursery.start_soon(self._serve, number, forward)
        _say({"id": number, "port": forward.port})

    async def _serve(self, number: int, forward: Forward) -> None:
        try:
            async with trio.open_nursery() as nursery, forward.listener:
                nursery.start_soon(self._accept, forward, nursery)
                while True:
                    left_s = forward.wanted_s(trio.current_time())
                    if left_s <= 0:
                        break
                    await trio.sleep(left_s)
                nursery.cancel_scope.cancel()
        finally:
            del self._forwards[number]
            _say({"id": number, "closed": True})

    async def _accept(self, forward: Forward, nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await forward.listener.accept()
            except OSError:  # hung up again, or descriptors ran out
                await trio.sleep(0.1)
                continue
            nursery.start_soon(self._connection, forward, stream)

    async def _connection(self, forward: Forward, near: trio.SocketStream) -> None:
        """One connection, from its first byte to its last."""
        if self._connections >= MAX_CONNECTIONS:
            await trio.aclose_forcefully(near)
            return
        self._connections += 1
        forward.connections += 1
        far: trio.SocketStream | None = None
        try:
            with trio.fail_after(CONNECT_S):
                begun = await _shown(near, forward.cookie)
                far = await trio.open_tcp_stream(*forward.place)
                await far.send_all(begun)
            for stream in (near, far):
                _tune(stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, near, far)
                nursery.start_soon(self._pump, far, near)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, AddressError):
            for one in (near, far):
                if one is not None:
                    _reset(one)
        finally:
            forward.connections -= 1
            forward.used_s = trio.current_time()
            self._connections -= 1
            with trio.CancelScope(shield=True):
                for one in (near, far):
                    if one is not None:
                        await trio.aclose_forcefully(one)

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        while data := await source.receive_some(BUFFER_BYTES):
            wait_s = self._rate.wait_s(len(data), trio.current_time())
            if wait_s > 0:
                await trio.sleep(wait_s)
            with trio.fail_after(allowance_s(len(data))):  # an end that takes nothing does not keep the other's place
                await target.send_all(data)
        await target.send_eof()


async def _shown(stream: trio.SocketStream, cookie: bytes | None) -> bytes:
    """The first bytes, once they hold the cookie. Raises AddressError where they do not."""
    begun = b""
    wanted = len(_MAGIC) + _COOKIE_BYTES
    while cookie is not None and len(begun) < wanted:
        data = await stream.receive_some(wanted - len(begun))
        if not data:
            raise AddressError("a stranger hung up")
        begun += data
    if cookie is not None and not hmac.compare_digest(begun[len(_MAGIC) :], cookie):
        raise AddressError("a stranger without the cookie")
    return begun


def _listening(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.bind((host, 0))
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def _tune(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _reset(stream: trio.SocketStream) -> None:
    """Have the other end see a break and not an end."""
    try:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # gone already


def _say(document: object) -> None:
    print(json.dumps(document), flush=True)


async def _main(host: str, bytes_per_s: float) -> None:
    await Relay(host, bytes_per_s).run(trio.lowlevel.FdStream(0))


if __name__ == "__main__":
    try:
        trio.run(_main, sys.argv[1], float(sys.argv[2]))
    except KeyboardInterrupt:  # the daemon decides what a terminal's Ctrl-C means
        pass
