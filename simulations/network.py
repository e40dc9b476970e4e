"""A virtual network that runs the real gossip cores: latency per pair, jitter, loss, crashes, partitions, bad sites.

Everything that happens follows from the seed. Chance comes from generators derived from the seed and the names, time
from a `VirtualClock`; two runs with one seed leave the same `trace`. It carries datagrams, and where a core asks for
them the request and answer of a stream (`streams`), over the same paths with the same faults.

    net = VirtualNetwork(seed=7, latency=0.04)
    for name in ("ams", "fra", "nyc"):
        net.spawn(name, seeds=["ams"])
    net.run_until(lambda: net.agreed(), 5.0)
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256

from mesh.gossip.config import GossipConfig, Timing
from mesh.gossip.core import Event, GossipCore
from mesh.gossip.proof import Prover
from mesh.gossip.sealing import Sealer
from simulations.clock import VirtualClock
from simulations.latency import Matrix
from simulations.streams import Streams

#: One-way latency of an ordered pair of sites, in seconds.
Latency = Callable[[str, str], float]

#: What a socket keeps for a process that does not read: Linux's default receive buffer (net.core.rmem_default).
SOCKET_BYTES = 212_992
#: What the kernel counts beside the payload of each datagram that waits there.
SOCKET_OVERHEAD_BYTES = 512
#: Deliveries whose traces are hashed at once.
TRACE_BATCH = 2048

_DELIVERY = struct.Struct("<dHH")


class StillWrong(AssertionError):
    """What had to come true within a bound did not. Names the seed and the time."""


@dataclass(eq=False, slots=True)
class Node:
    """One running peer and what its machine suffers from.

    `events` are all it has reported, with the time of each (unless the network does not `record`). `loss` is the share
    of datagrams lost on its own access, each way; `deaf`: nothing comes in. `backlog` is what its socket holds while
    its process is paused, None while it runs.
    """

    site: str
    address: str
    number: int
    core: GossipCore
    events: list[tuple[float, Event]] = field(default_factory=list)
    wake_s: float | None = None
    running: bool = True
    loss: float = 0.0
    deaf: bool = False
    backlog: list[tuple[bytes, str]] | None = None
    backlog_bytes: int = 0
    overdue: bool = False
    sent_datagrams: int = 0
    sent_bytes: int = 0

    def states(self) -> dict[str, str]:
        """Site -> state, as this node sees it."""
        return {member.site: member.state for member in self.core.members()}

    def when(self, kind: str, site: str) -> float | None:
        """When this node first reported `kind` of `site`, in virtual seconds, or None."""
        return next((time_s for time_s, event in self.events if event.kind == kind and event.site == site), None)


class VirtualNetwork:
    """Peers and the paths between them."""

    def __init__(
        self,
        *,
        seed: int,
        latency: float | Latency | Matrix = 0.001,
        jitter: float = 0.0,
        loss: float = 0.0,
        timing: Timing | None = None,
        record: bool = True,
        on_event: Callable[[float, str, Event], None] | None = None,
    ) -> None:
        """`latency`: one way, seconds, for all pairs or as a function of two sites; or a matrix that names all sites.

        `jitter`: share of it that is added at most. `loss`: probability that a datagram vanishes. `on_event` is called
        with the time, the site and the event for everything a peer reports.
        """
        self.seed = seed
        self.clock = VirtualClock(1000.0)
        self.nodes: dict[str, Node] = {}
        self.loss = loss
        self.datagrams = 0
        self.bytes = 0
        self.record = record
        self._latency: Latency = latency if callable(latency) else lambda _source, _target: float(latency)  # type: ignore[arg-type]
        self._rows: list[list[float]] | None = None
        self._numbers: dict[str, int] = {}
        if isinstance(latency, Matrix):
            self._rows = latency.one_way_s().tolist()
            self._numbers = {name: number for number, name in enumerate(latency.names)}
        self._jitter = jitter
        self._timing = timing or Timing()
        self._on_event = on_event
        self._chance = random.Random(f"{seed}/network")
        self._places: dict[str, Node] = {}
        self._sides: dict[str, int] = {}
        self._cut: set[tuple[str, str]] = set()
        self._impaired = False
        self._hash = sha256()
        self._log: list[bytes] = []
        self._starts: dict[str, int] = {}
        self._streams = Streams(self, random.Random(f"{seed}/streams"))

    # ---------------------------------------------------------------- peers

    def spawn(
        self,
        site: str,
        *,
        seeds: Iterable[str] = (),
        address: str | None = None,
        incarnation: int = 0,
        cluster: str = "isthmus",
        sealer: Sealer | None = None,
        prover: Prover | None = None,
    ) -> Node:
        """Start a peer. `seeds` are sites or addresses; `incarnation` 0 counts this site's starts."""
        starts = self._starts[site] = self._starts.get(site, 0) + 1
        place = address or self.address(site)
        config = GossipConfig(
            site=site,
            address=place,
            cluster=cluster,
            incarnation=incarnation or starts,
            seeds=[seed if ":" in seed else self.address(seed) for seed in seeds],
            rng=random.Random(f"{self.seed}/{site}/{starts}"),
            timing=replace(self._timing),
        )
        if self._rows is None:
            self._numbers.setdefault(site, len(self._numbers))
        node = Node(site, place, self._numbers[site], GossipCore(config, None, sealer, prover, streaming=True))
        self.nodes[site] = node
        self._places[place] = node
        node.core.start(self.clock.now_s)
        self.settle(node)
        return node

    def crash(self, site: str) -> Node:
        """A peer vanishes without a word. What it sent before still arrives."""
        node = self.nodes.pop(site)
        node.running = False
        if self._places.get(node.address) is node:
            del self._places[node.address]
        return node

    def leave(self, site: str) -> Node:
        """A peer says farewell; it stops once everybody has confirmed, at the latest after 2 s."""
        node = self.nodes[site]
        node.core.leave(self.clock.now_s)
        self.settle(node)
        try:
            self.run_until(lambda: node.core.left, 2.0)
        except StillWrong:
            pass
        return self.crash(site)

    def publish(self, site: str, key: str, value: dict[str, object]) -> None:
        """Have a peer publish an entry."""
        node = self.nodes[site]
        node.core.publish(key, value, self.clock.now_s)
        self.settle(node)

    def pause(self, site: str, duration_s: float) -> None:
        """A peer's process gets no processor for a while: it neither reads nor acts; its socket keeps what it can."""
        node = self.nodes[site]
        if node.backlog is None:
            node.backlog = []
            self.clock.at(self.clock.now_s + duration_s, self._resume, node)

    @staticmethod
    def address(site: str) -> str:
        """Where a site listens unless told otherwise."""
        return f"{site}:7700"

    def at(self, address: str) -> Node | None:
        """The running peer that listens there."""
        return self._places.get(address)

    # ---------------------------------------------------------------- paths

    def partition(self, *sides: Collection[str]) -> None:
        """Cut the network: only sites on the same side hear each other. Sites not named are on the first side."""
        self._sides = {site: number for number, side in enumerate(sides) for site in side}
        self._impaired = True

    def cut(self, one: str, other: str) -> None:
        """Cut the path between two sites, both ways."""
        self._cut |= {(one, other), (other, one)}
        self._impaired = True

    def cut_one_way(self, source: str, target: str) -> None:
        """Nothing that `source` sends reaches `target`; the other way works."""
        self._cut.add((source, target))
        self._impaired = True

    def impair(self, site: str, *, loss: float | None = None, deaf: bool | None = None) -> None:
        """Change what a running site suffers from: the share of datagrams it loses each way, and whether it hears."""
        node = self.nodes.get(site)
        if node is not None:
            node.loss = node.loss if loss is None else loss
            node.deaf = node.deaf if deaf is None else deaf
            self._impaired = True

    def heal(self) -> None:
        """Undo every partition and cut, and what sites suffer from."""
        self._sides = {}
        self._cut = set()
        self._impaired = False
        for node in self.nodes.values():
            node.loss, node.deaf = 0.0, False

    def delay_s(self, source: Node, target: Node) -> float:
        """How long something sent now takes, jitter included."""
        way_s = self._rows[source.number][target.number] if self._rows else self._latency(source.site, target.site)
        return way_s * (1.0 + self._jitter * self._chance.random())

    def blocked(self, source: Node, target: Node) -> bool:
        """Whether nothing at all gets from one site to the other now."""
        if not target.running:
            return True
        if not self._impaired:
            return False
        return (
            target.deaf
            or (source.site, target.site) in self._cut
            or self._sides.get(source.site, 0) != self._sides.get(target.site, 0)
        )

    def loss_between(self, source: Node, target: Node) -> float:
        """The probability that a packet between two sites vanishes."""
        if source.loss or target.loss:
            return 1.0 - (1.0 - self.loss) * (1.0 - source.loss) * (1.0 - target.loss)
        return self.loss

    # ---------------------------------------------------------------- time

    def run_for(self, duration_s: float) -> None:
        """Let virtual time pass."""
        self.clock.run(self.clock.now_s + duration_s)

    def run_until(self, done: Callable[[], bool], within_s: float) -> float:
        """Let time pass until `done()`. Returns the seconds it took; raises StillWrong after `within_s`."""
        start_s = self.clock.now_s
        while not done():
            if not self.clock.step(start_s + within_s):
                if done():
                    break
                raise StillWrong(f"seed {self.seed}: not true {within_s} s after {start_s:.3f}: {self.views()}")
        return self.clock.now_s - start_s

    # ---------------------------------------------------------------- what came of it

    def views(self) -> dict[str, dict[str, str]]:
        """Site -> what it sees: site -> state."""
        return {site: node.states() for site, node in sorted(self.nodes.items())}

    def agreed(self, *, gone: Collection[str] = ()) -> bool:
        """Whether every running peer sees exactly the running ones alive, and those `gone` as dead, left or unknown."""
        return all(
            {site for site, state in node.states().items() if state == "alive"} == set(self.nodes)
            and all(node.states().get(site, "left") in ("dead", "left") for site in gone)
            for node in self.nodes.values()
        )

    def same_entries(self, key: str) -> bool:
        """Whether every running peer holds the same values under `key`."""
        values = [node.core.entries(key) for node in self.nodes.values()]
        return all(value == values[0] for value in values)

    def trace(self) -> str:
        """A SHA-256 of every delivery and event so far."""
        self._flush_log()
        return self._hash.hexdigest()

    # ---------------------------------------------------------------- inside

    def settle(self, node: Node) -> None:
        """After a core was called: send what it wants sent, note its events, set its alarm."""
        core, now = node.core, self.clock.now_s
        for address, data in core.datagrams(now):
            self._send(node, address, data, now)
        for request in core.streams():
            self._streams.ask(node, request)
        for event in core.events():
            if self.record:
                node.events.append((now, event))
            if self._on_event is not None:
                self._on_event(now, node.site, event)
            self.note(node, node, "|".join(event).encode())
        wake_s = core.next_timer()
        if wake_s is not None and (node.wake_s is None or wake_s < node.wake_s):
            node.wake_s = wake_s
            self.clock.at(wake_s, self._wake, node, wake_s)

    def note(self, source: Node, target: Node, data: bytes) -> None:
        """Put something that happened now into the trace."""
        self._log.append(_DELIVERY.pack(self.clock.now_s, source.number & 0xFFFF, target.number & 0xFFFF))
        self._log.append(data)
        if len(self._log) >= TRACE_BATCH:
            self._flush_log()

    def _flush_log(self) -> None:
        self._hash.update(b"".join(self._log))
        self._log.clear()

    def _wake(self, node: Node, wake_s: float) -> None:
        if node.wake_s != wake_s or not node.running:
            return
        if node.backlog is not None:
            node.overdue = True
            return
        node.wake_s = None
        node.core.handle_timer(self.clock.now_s)
        self.settle(node)

    def _resume(self, node: Node) -> None:
        backlog, node.backlog, node.backlog_bytes = node.backlog, None, 0
        if not node.running:
            return
        now = self.clock.now_s
        for data, source in backlog or ():
            node.core.receive(data, source, now)
        if node.overdue:
            node.overdue = False
            node.wake_s = None
            node.core.handle_timer(now)
        self.settle(node)

    def _send(self, node: Node, address: str, data: bytes, now: float) -> None:
        self.datagrams += 1
        self.bytes += len(data)
        node.sent_datagrams += 1
        node.sent_bytes += len(data)
        target = self._places.get(address)
        if target is None:
            return
        loss = self.loss_between(node, target) if self._impaired else self.loss
        if loss and self._chance.random() < loss:
            return
        self.clock.at(now + self.delay_s(node, target), self._deliver, node, target, data)

    def _deliver(self, source: Node, target: Node, data: bytes) -> None:
        """Hand over what survived; a partition also eats what was under way when it began."""
        if self.blocked(source, target):
            return
        if target.backlog is not None:
            size = len(data) + SOCKET_OVERHEAD_BYTES
            if target.backlog_bytes + size <= SOCKET_BYTES:
                target.backlog_bytes += size
                target.backlog.append((data, source.address))
            return
        self.note(source, target, data)
        target.core.receive(data, source.address, self.clock.now_s)
        self.settle(target)
