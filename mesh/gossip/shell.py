"""The trio shell around `core`: one UDP socket (`udp`), one timer, and streams that others carry.

Two small tasks drive the core: one waits for the socket, one for the next deadline. Before a deadline counts,
everything that lies in the socket is read, so that an answer which arrived while this process was busy is never
overlooked.
"""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from mesh.errors import ConfigError
from mesh.gossip.absent import Known
from mesh.gossip.config import GossipConfig, valid_address
from mesh.gossip.coordinates import Coordinate
from mesh.gossip.core import Event, GossipCore, StreamRequest
from mesh.gossip.links import LinkReport
from mesh.gossip.members import Member
from mesh.gossip.proof import Prover
from mesh.gossip.rtt import Rtt
from mesh.gossip.sealing import REFUSALS, Sealer
from mesh.gossip.udp import Udp, bind, duplicate

__all__ = ["Event", "Gossip", "GossipConfig", "Member", "Rtt", "SiteNameTaken", "open_gossip"]

#: A reader of events that is further behind than this misses "updated" events; what it looks up is current anyway.
EVENTS_BEHIND = 4096
#: Streams of ours under way at once, and how long one may take: 256 KiB over a slow path.
STREAMS_AT_ONCE = 8
STREAM_TIMEOUT_S = 10.0

#: Carries one request to (address, site) over an authenticated stream and gives the answer. Any exception means none.
Exchange = Callable[[str, str, bytes], Awaitable[bytes]]


class SiteNameTaken(ConfigError):
    """Another living peer of the mesh has the same site name."""


class Gossip:
    """A running gossip peer; see `open_gossip`. Use from trio's thread only."""

    def __init__(self, config: GossipConfig, udp: Udp, core: GossipCore, exchange: Exchange | None) -> None:
        """Made by `open_gossip`."""
        self._core = core
        self._exchange = exchange
        self._streams = trio.CapacityLimiter(STREAMS_AT_ONCE)
        self._clock = config.clock or trio.current_time
        self._udp = udp
        self._sleep = trio.CancelScope()
        self._subscribers: dict[trio.MemorySendChannel[Event], trio.MemoryReceiveChannel[Event]] = {}
        self._changed = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._errors: Counter[str] = Counter()

    # ---------------------------------------------------------------- asking

    @property
    def address(self) -> str:
        """The "host:port" that others are told."""
        return self._core.address

    def members(self) -> tuple[Member, ...]:
        """Everybody known, ourselves included, sorted by name. `state` is "alive", "suspect", "dead" or "left"."""
        return self._core.members()

    def entry(self, site: str, key: str) -> dict[str, Any] | None:
        """What `site` last published under `key`, kept after its death until it is forgotten; or None. A fresh copy."""
        return self._core.entry(site, key)

    def entries(self, key: str) -> dict[str, dict[str, Any]]:
        """Site -> value under `key`, for every alive or suspect site, ourselves included. Fresh copies."""
        return self._core.entries(key)

    def rtts(self) -> dict[str, Rtt]:
        """Site -> measured round trip, for every live site that has answered a probe."""
        return self._core.rtts()

    def links(self) -> dict[str, LinkReport]:
        """Site -> what is known of the link to it, for every live site: round trips, loss, directions, bandwidth."""
        return self._core.links(self._clock())

    def coordinate(self) -> Coordinate:
        """Where this site is among the others: `mesh.gossip.coordinates.estimate_s` of two gives their round trip."""
        return self._core.coordinate()

    def transferred(self, site: str, size_bytes: int, seconds: float) -> None:
        """So many bytes reached `site` in so many seconds: the bandwidth of its link is taken from such transfers."""
        self._core.transferred(site, size_bytes, seconds, self._clock())

    def bandwidth_probe(self) -> str | None:
        """A site to which a short transfer should be timed now (rarely), or None; answer with `transferred`, or
        `probe_failed`."""
        return self._core.bandwidth_probe(self._clock())

    def probe_failed(self, site: str) -> None:
        """The transfer that `bandwidth_probe` asked for came to nothing; that site is left alone for a while."""
        self._core.probe_failed(site, self._clock())

    def chose(self, site: str, transport: str | None) -> None:
        """Which transport proved best to `site`, where several were measured; None takes that back."""
        self._core.chose(site, transport)

    def counters(self) -> Mapping[str, int]:
        """For metrics, all that were counted: sent, sent_bytes, received, syncs, stalls, send_errors, unresolved,
        streams_asked, streams_served, streams_failed; and what was refused: malformed, foreign, forged, replayed,
        revoked, skewed, stale (these are always there).
        """
        counted = Counter(dict.fromkeys(REFUSALS, 0))
        counted.update(self._core.counters)
        counted.update(self._errors)
        counted.update(self._udp.errors)
        return counted

    @property
    def dropped(self) -> int:
        """What arrived and was refused: noise, strangers, forgeries, replays."""
        return sum(self._core.counters[kind] for kind in REFUSALS)

    # ---------------------------------------------------------------- telling

    def publish(self, key: str, value: dict[str, Any], *, urgent: bool = True) -> None:
        """Write an entry of our own and spread it. Publishing what is already there costs nothing.

        What is not urgent is left to anti-entropy in all but tiny meshes, which is cheaper and slower.

        Raises ValueError: key too long, value not a plain document, deeper than 8, or larger than 32 KiB packed.
        """
        self._core.publish(key, value, self._clock(), urgent=urgent)
        self._pump()

    def serve_stream(self, data: bytes, source: str, site: str | None = None) -> bytes:
        """Answer another peer's request over a stream. `site` is who provably asks, None where nobody proves it.

        Raises Malformed for what no honest peer of this mesh asks.
        """
        answer = self._core.serve_stream(data, source, self._clock(), site)
        self._pump()
        return answer

    def publish_cluster(self, key: str, value: dict[str, Any], version: int, proof: bytes) -> bool:
        """Install and spread an entry that the cluster's authority has signed (owner "@cluster"). False: not news.

        Raises ValueError: the value is out of bounds, or the proof is not the authority's.
        """
        news = self._core.publish_cluster(key, value, version, proof, self._clock())
        self._pump()
        return news

    def remember(self, known: Iterable[Known]) -> None:
        """Call whom an earlier start of this site knew, until they answer. Call once, at the start."""
        self._core.remember(known, self._clock())
        self._pump()

    def known(self) -> list[Known]:
        """Whom to remember over a restart: everybody, ourselves and the forgotten included, sorted by name."""
        return self._core.known()

    def join(self, addresses: Iterable[str]) -> None:
        """Call these "host:port" until somebody answers, with back-off, and again whenever they are lost.

        Raises ConfigError for what is not an address.
        """
        addresses = list(addresses)
        for address in addresses:
            if not valid_address(address):
                raise ConfigError(f"join: {address!r} is not host:port, like 10.0.0.1:7700")
        self._core.join(addresses, self._clock())
        self._pump()

    async def joined(self, timeout_s: float) -> bool:
        """Wait for the first contact with any other member. False if there was none in time.

        Raises SiteNameTaken if another living peer has our site name.
        """
        with trio.move_on_after(timeout_s):
            while not self._core.contacted and self._core.taken_by is None:
                await self._changed.wait()
        self._check_name()
        return self._core.contacted

    async def leave(self, timeout_s: float) -> bool:
        """Say farewell to every live member and wait until they confirmed. False if some had not in time. Final."""
        self._core.leave(self._clock())
        self._pump()
        with trio.move_on_after(timeout_s):
            while not self._core.left:
                await self._changed.wait()
        return self._core.left

    @contextmanager
    def events(self) -> Iterator[trio.MemoryReceiveChannel[Event]]:
        """Everything that changes from now on. The channel ends when the gossip ends."""
        send, receive = trio.open_memory_channel[Event](math.inf)
        self._subscribers[send] = receive
        try:
            yield receive
        finally:
            self._subscribers.pop(send, None)
            send.close()
            receive.close()

    # ---------------------------------------------------------------- running

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._udp.run_in(nursery)
            self._core.start(self._clock())
            nursery.start_soon(self._read)
            nursery.start_soon(self._keep_time)
            self._pump()
            task_status.started()

    async def _read(self) -> None:
        while True:
            await self._udp.readable()
            self._receive_waiting()
            self._pump()

    async def _keep_time(self) -> None:
        while True:
            with trio.CancelScope(deadline=self._deadline()) as self._sleep:
                await trio.sleep_forever()
            await self._udp.send_held()
            due = self._core.next_timer()
            if due is not None and due <= self._clock():
                self._receive_waiting()
                self._core.handle_timer(self._clock())
            self._pump()
            await trio.lowlevel.checkpoint()

    def _receive_waiting(self) -> None:
        for data, source in self._udp.received():
            self._core.receive(data, source, self._clock())

    def _pump(self) -> None:
        """After the core was called: send, report, and set the alarm."""
        for address, data in self._core.datagrams(self._clock()):
            self._udp.send(address, data)
        for request in self._core.streams():
            if self._nursery is not None:
                self._nursery.start_soon(self._stream, request)
        for event in self._core.events():
            for send in list(self._subscribers):
                if event.kind != "updated" or send.statistics().current_buffer_used < EVENTS_BEHIND:
                    send.send_nowait(event)
        if self._core.contacted or self._core.left or self._core.taken_by is not None:
            self._changed.set()
            self._changed = trio.Event()
        deadline = self._deadline()
        if deadline != self._sleep.deadline:
            self._sleep.deadline = deadline

    def _deadline(self) -> float:
        """When there is something to do, in trio's time."""
        timer_s, held_s = self._core.next_timer(), self._udp.due_s()
        due_s = held_s if timer_s is None else min(timer_s, held_s)
        return math.inf if due_s == math.inf else trio.current_time() + max(0.0, due_s - self._clock())

    async def _stream(self, request: StreamRequest) -> None:
        """Carry out one request of the core's, within its time."""
        answer: bytes | None = None
        if self._exchange is not None:
            with trio.move_on_after(STREAM_TIMEOUT_S):
                async with self._streams:
                    try:
                        answer = bytes(await self._exchange(request.address, request.site, request.data))
                    except Exception:  # whatever the carrier raises, to us it means that nobody answered
                        self._errors["stream_errors"] += 1
        self._core.stream_answered(request.token, answer, self._clock())
        self._pump()

    def _check_name(self) -> None:
        if self._core.taken_by is not None:
            raise SiteNameTaken(
                f"site {self._core.site!r} is already in the mesh, at {self._core.taken_by}: choose another --site"
            )

    def _close(self) -> None:
        for send in list(self._subscribers):
            send.close()
        self._subscribers.clear()
        self._udp.close()


@asynccontextmanager
async def open_gossip(
    config: GossipConfig,
    *,
    sock: socket.socket | trio.socket.SocketType | None = None,
    sealer: Sealer | None = None,
    prover: Prover | None = None,
    exchange: Exchange | None = None,
) -> AsyncIterator[Gossip]:
    """Run a gossip peer as long as the block lasts.

    `sock` is an already bound UDP socket (trio's or the standard library's; a duplicate is used, the caller keeps and
    closes the original); without it one is bound to `config.address`. `sealer` protects the datagrams, `prover` signs
    what this site says and checks what others say. `exchange(address, site, request)` carries a request over a stream
    and gives the answer; without it everything goes over datagrams.

    Leaving the block is a crash as far as the others are concerned; call `leave` first to say farewell.
    Raises AddressInUse if the port is taken, ConfigError if the address cannot be listened on.
    """
    own = bind(config.address) if sock is None else duplicate(sock)
    udp = Udp(own, config.clock or trio.current_time, delays=config.delays, cut=config.cut)
    core = GossipCore(config, udp.address, sealer, prover, streaming=exchange is not None)
    gossip = Gossip(config, udp, core, exchange)
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(gossip._run)
            try:
                yield gossip
            except BaseException as error:
                raised = error
                raise
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # What the block itself raised goes out as it is: that there is a nursery in here is nobody's business.
        if raised is not None and group.exceptions == (raised,):
            raise raised from None
        raise
    finally:
        gossip._close()
