"""A virtual datagram network that runs the real gossip cores: latency per pair, jitter, loss, crashes and partitions.

Everything that happens follows from the seed. Chance comes from generators derived from the seed and the names, time
from a `VirtualClock`; two runs with one seed leave the same `trace`.

    net = VirtualNetwork(seed=7, latency=0.04)
    for name in ("ams", "fra", "nyc"):
        net.spawn(name, seeds=["ams"])
    net.run_until(lambda: net.agreed(), 5.0)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from mesh.gossip.config import GossipConfig, Timing
from mesh.gossip.core import Event, GossipCore
from simulations.clock import VirtualClock

#: One-way latency of an ordered pair of sites, in seconds.
Latency = Callable[[str, str], float]


class StillWrong(AssertionError):
    """What had to come true within a bound did not. Names the seed and the time."""


@dataclass
class Node:
    """One running peer. `events` are all it has reported, with the time of each."""

    site: str
    address: str
    core: GossipCore
    events: list[tuple[float, Event]] = field(default_factory=list)
    wake_s: float | None = None

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
        latency: float | Latency = 0.001,
        jitter: float = 0.0,
        loss: float = 0.0,
        timing: Timing | None = None,
    ) -> None:
        """`latency`: one way, seconds, for all pairs or as a function of two sites.

        `jitter`: share of it that is added at most. `loss`: probability that a datagram vanishes.
        """
        self.seed = seed
        self.clock = VirtualClock(1000.0)
        self.nodes: dict[str, Node] = {}
        self.loss = loss
        self.datagrams = 0
        self.bytes = 0
        self._latency: Latency = latency if callable(latency) else lambda _source, _target: latency
        self._jitter = jitter
        self._timing = timing or Timing()
        self._chance = random.Random(f"{seed}/network")
        self._places: dict[str, Node] = {}
        self._sides: dict[str, int] = {}
        self._cut: set[tuple[str, str]] = set()
        self._paused: dict[str, list[tuple[bytes, str]]] = {}
        self._trace = blake2b(digest_size=16)
        self._starts: dict[str, int] = {}

    # ---------------------------------------------------------------- peers

    def spawn(self, site: str, *, seeds: Iterable[str] = (), address: str | None = None, incarnation: int = 0) -> Node:
        """Start a peer. `seeds` are sites or addresses; `incarnation` 0 counts this site's starts."""
        starts = self._starts[site] = self._starts.get(site, 0) + 1
        place = address or self.address(site)
        config = GossipConfig(
            site=site,
            address=place,
            incarnation=incarnation or starts,
            seeds=[seed if ":" in seed else self.address(seed) for seed in seeds],
            rng=random.Random(f"{self.seed}/{site}/{starts}"),
            timing=replace(self._timing),
        )
        node = Node(site, place, GossipCore(config))
        self.nodes[site] = node
        self._places[place] = node
        node.core.start(self.clock())
        self._settle(node)
        return node

    def crash(self, site: str) -> Node:
        """A peer vanishes without a word. What it sent before still arrives."""
        node = self.nodes.pop(site)
        if self._places.get(node.address) is node:
            del self._places[node.address]
        return node

    def leave(self, site: str) -> Node:
        """A peer says farewell; it stops once everybody has confirmed, at the latest after 2 s."""
        node = self.nodes[site]
        node.core.leave(self.clock())
        self._settle(node)
        try:
            self.run_until(lambda: node.core.left, 2.0)
        except StillWrong:
            pass
        return self.crash(site)

    def publish(self, site: str, key: str, value: dict[str, object]) -> None:
        """Have a peer publish an entry."""
        node = self.nodes[site]
        node.core.publish(key, value, self.clock())
        self._settle(node)

    def pause(self, site: str, duration_s: float) -> None:
        """A peer's process gets no processor for a while: it neither reads nor acts; its socket keeps what arrives."""
        node = self.nodes[site]
        resume_s = self.clock() + duration_s
        backlog: list[tuple[bytes, str]] = []
        self._paused[node.address] = backlog

        def resume() -> None:
            del self._paused[node.address]
            for data, source in backlog:
                node.core.receive(data, source, self.clock())
            self._settle(node)

        self.clock.at(resume_s, resume)

    @staticmethod
    def address(site: str) -> str:
        """Where a site listens unless told otherwise."""
        return f"{site}:7700"

    # ---------------------------------------------------------------- paths

    def partition(self, *sides: Collection[str]) -> None:
        """Cut the network: only sites on the same side hear each other. Sites not named are on the first side."""
        self._sides = {site: number for number, side in enumerate(sides) for site in side}

    def cut(self, one: str, other: str) -> None:
        """Cut the path between two sites, both ways."""
        self._cut |= {(one, other), (other, one)}

    def heal(self) -> None:
        """Undo every partition and cut."""
        self._sides = {}
        self._cut = set()

    # ---------------------------------------------------------------- time

    def run_for(self, duration_s: float) -> None:
        """Let virtual time pass."""
        until_s = self.clock() + duration_s
        while self.clock.step(until_s):
            pass

    def run_until(self, done: Callable[[], bool], within_s: float) -> float:
        """Let time pass until `done()`. Returns the seconds it took; raises StillWrong after `within_s`."""
        start_s = self.clock()
        while not done():
            if not self.clock.step(start_s + within_s):
                if done():
                    break
                raise StillWrong(f"seed {self.seed}: not true {within_s} s after {start_s:.3f}: {self.views()}")
        return self.clock() - start_s

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
        """A hash of every delivery and event so far."""
        return self._trace.hexdigest()

    # ---------------------------------------------------------------- inside

    def _settle(self, node: Node) -> None:
        """After a core was called: send what it wants sent, note its events, set its alarm."""
        now = self.clock()
        for address, data in node.core.datagrams(now):
            self._send(node, address, data)
        for event in node.core.events():
            node.events.append((now, event))
            self._note(f"{node.site} {event}")
        wake_s = node.core.next_timer()
        if wake_s is not None and (node.wake_s is None or wake_s < node.wake_s):
            node.wake_s = wake_s
            self.clock.at(wake_s, lambda: self._wake(node, wake_s))

    def _wake(self, node: Node, wake_s: float) -> None:
        if self.nodes.get(node.site) is not node or node.wake_s != wake_s:
            return
        if node.address in self._paused:
            self.clock.at(self.clock() + 0.01, lambda: self._wake(node, wake_s))
            return
        node.wake_s = None
        node.core.handle_timer(self.clock())
        self._settle(node)

    def _send(self, node: Node, address: str, data: bytes) -> None:
        self.datagrams += 1
        self.bytes += len(data)
        target = self._places.get(address)
        if self._chance.random() < self.loss or target is None:
            return
        delay_s = self._latency(node.site, target.site) * (1.0 + self._jitter * self._chance.random())
        self.clock.at(self.clock() + delay_s, lambda: self._deliver(node, target, data))

    def _deliver(self, source: Node, target: Node, data: bytes) -> None:
        """Hand over what survived; a partition also eats what was under way when it began."""
        if self._places.get(target.address) is not target or (source.site, target.site) in self._cut:
            return
        if self._sides.get(source.site, 0) != self._sides.get(target.site, 0):
            return
        if target.address in self._paused:
            self._paused[target.address].append((data, source.address))
            return
        self._note(f"{source.site} {target.site} {len(data)}")
        self._trace.update(data)
        target.core.receive(data, source.address, self.clock())
        self._settle(target)

    def _note(self, line: str) -> None:
        self._trace.update(f"{self.clock():.9f} {line}\n".encode())
