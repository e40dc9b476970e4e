"""The UDP socket of a gossip peer: datagrams to and from "host:port".

Names are looked up beside everything else, and what waits for them goes when they are known. For drills, distance is
emulated (what is sent is held back), and so are paths that do not work.
"""

from __future__ import annotations

import errno
import heapq
import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import trio

from mesh.address import join_address, split_address
from mesh.errors import AddressInUse, ConfigError
from mesh.gossip.config import MAX_DATAGRAM_BYTES

#: How long the numeric form of a host name is trusted, and how many are remembered.
RESOLVED_S, MAX_RESOLVED = 30.0, 4096
#: How long a name server may take.
RESOLVE_TIMEOUT_S = 5.0
#: Datagrams read in a row before other tasks get their turn.
READ_BURST = 64
#: An alarm of epoll is whole milliseconds, rounded up. A datagram held back for an emulated distance would be half of
#: one late at each end, so its last millisecond is spent asking the clock.
EARLY_S = 0.001


class Udp:
    """See the module. Use from trio's thread only."""

    def __init__(
        self,
        sock: socket.socket,
        clock: Callable[[], float],
        *,
        delays: Mapping[str, float],
        cut: Collection[str],
    ) -> None:
        """`sock` is bound and belongs to this from now on. `delays`: address -> seconds by which what is sent there is
        held back; with the addresses in `cut` nothing is exchanged."""
        sock.setblocking(False)
        self.errors: Counter[str] = Counter()
        self._sock = sock
        self._clock = clock
        self._delays = dict(delays)
        self._cut = cut
        self._held: list[tuple[float, int, str, bytes]] = []
        self._count = 0
        self._resolved: dict[str, tuple[float, tuple[Any, ...]]] = {}
        self._resolving: set[str] = set()
        self._nursery: trio.Nursery | None = None

    @property
    def address(self) -> str:
        """The "host:port" it is bound to."""
        name = self._sock.getsockname()
        return join_address(name[0], name[1])

    def run_in(self, nursery: trio.Nursery) -> None:
        """Look names up in this nursery. Before this, what is sent to a name is lost."""
        self._nursery = nursery

    def close(self) -> None:
        """Close the socket. What is held back is lost."""
        self._sock.close()

    # ---------------------------------------------------------------- receiving

    async def readable(self) -> None:
        """Wait until something is there."""
        await trio.lowlevel.wait_readable(self._sock)

    def received(self) -> Iterator[tuple[bytes, str]]:
        """What lies in the socket, with where it came from; `READ_BURST` datagrams at most. Does not wait."""
        for _ in range(READ_BURST):
            try:
                data, source = self._sock.recvfrom(MAX_DATAGRAM_BYTES + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # the kernel reports an earlier datagram of ours as undeliverable; probes notice that too
                self.errors["send_errors"] += 1
                continue
            address = join_address(source[0], source[1])
            if address not in self._cut:
                yield data, address

    # ---------------------------------------------------------------- sending

    def send(self, address: str, data: bytes) -> None:
        """Send, or hold back, a datagram. Failures are counted, nothing is raised."""
        if address in self._cut:
            return
        delay_s = self._delays.get(address, 0.0)
        if delay_s > 0.0:
            self._count += 1
            heapq.heappush(self._held, (self._clock() + delay_s, self._count, address, data))
        else:
            self._send(address, data)

    def due_s(self) -> float:
        """When `send_held` wants to be called; never, where nothing is held back."""
        return self._held[0][0] - EARLY_S if self._held else math.inf

    async def send_held(self) -> None:
        """Send what was held back long enough."""
        while self.due_s() <= self._clock():
            now = self._clock()
            while self._held and self._held[0][0] <= now:
                _, _, address, data = heapq.heappop(self._held)
                self._send(address, data)
            await trio.lowlevel.checkpoint()

    def _send(self, address: str, data: bytes) -> None:
        known = self._resolved.get(address)
        if known is None:
            numeric = _numeric(address, self._sock.family)
            if numeric is not None:
                known = self._resolved[address] = (math.inf, numeric)
        if known is None or known[0] < self._clock():
            if address not in self._resolving and self._nursery is not None:
                self._resolving.add(address)
                self._nursery.start_soon(self._resolve, address, data)
            return
        try:
            self._sock.sendto(data, known[1])
        except OSError:  # no route, no buffer: like a datagram lost on the way
            self.errors["send_errors"] += 1

    async def _resolve(self, address: str, data: bytes) -> None:
        """Look a host name up beside everything else, then send what waited for it."""
        host, port = split_address(address)
        found = None
        try:
            with trio.move_on_after(RESOLVE_TIMEOUT_S):
                found = await trio.socket.getaddrinfo(host, port, family=self._sock.family, type=socket.SOCK_DGRAM)
        except OSError:
            pass
        self._resolving.discard(address)
        if not found:
            self.errors["unresolved"] += 1
            return
        if len(self._resolved) > MAX_RESOLVED:
            self._resolved.clear()
        self._resolved[address] = (self._clock() + RESOLVED_S, found[0][4])
        self._send(address, data)


def bind(address: str) -> socket.socket:
    """A UDP socket at "host:port". Raises AddressInUse if the port is taken, ConfigError if it cannot be."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
        )[0]
        own = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"listen {address}: {error.strerror or error}") from None
    try:
        own.bind(place)
    except OSError as error:
        own.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{address}/udp is taken: stop the other peer or choose another --listen") from None
        raise ConfigError(f"listen {address}: {error.strerror or error}") from None
    return own


def duplicate(sock: socket.socket | trio.socket.SocketType) -> socket.socket:
    """Another handle of the same socket; whoever has the first keeps it."""
    return socket.socket(fileno=os.dup(sock.fileno()))


def _numeric(address: str, family: int) -> tuple[Any, ...] | None:
    """The socket address of a numeric "host:port" of this family, or None."""
    host, port = split_address(address)
    try:
        socket.inet_pton(family, host)
    except OSError:
        return None
    return (host, port)
