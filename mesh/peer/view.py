"""The mesh as gossip tells it: the snapshot that plans are made from, and the way to every peer.

Nothing here trusts a number because it arrived: an entry that is not what an honest peer publishes is left out, and the
site with it, until a good one comes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol

from mesh.errors import ModelError, PeerUnreachable
from mesh.gossip.distances import COORDINATES, LINKS, read_coordinate
from mesh.gossip.links import LinkReport, read
from mesh.jobs.peers import PeerCalls
from mesh.peer.calls import RemotePeer
from mesh.peer.holdings import HELD, read_held
from mesh.peer.pace import MOST_PACE
from mesh.peer.pairs import links_between
from topology.displace import RunningJob
from topology.picture import MAX_TOGETHER
from topology.relays import relays
from topology.snapshot import Decoding, Device, Held, Link, Site, Snapshot

logger = logging.getLogger(__name__)

#: Bounds of what a peer may say of itself: beyond them lies a mistake or a lie.
MAX_DEVICES, MAX_BYTES, MAX_SPEED = 64, 1 << 46, 1e18
MAX_LAYER_S, MAX_LOCAL_RTT_S = 1.0, 1.0
MAX_PRIORITY = 100
#: More than any model has: what lies on a disk lies there whole.
MAX_HEADS, MAX_COLUMNS = 1 << 20, 1 << 30
#: What reading a document that is not what it should be can raise.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
#: Relays are looked for at most so often: the answer takes 50 ms in a mesh of 64.
RELAYS_S = 2.0
#: Looking again and again takes at most this share of the daemon's time: a snapshot of 64 sites takes 85 ms.
LOOKING = 0.05
#: States of a member whose devices may be planned on; a suspect may yet refute.
PRESENT = frozenset({"alive", "suspect"})


class Gossip(Protocol):
    """The part of the gossip shell that a view reads."""

    def members(self) -> Any: ...
    def entries(self, key: str) -> Mapping[str, Any]: ...
    def links(self) -> Mapping[str, LinkReport]: ...


def plain(site: str, address: str) -> RemotePeer:
    """A connection between peers without identities."""
    return RemotePeer(address)


class MeshView:
    """One peer's picture of the mesh. `local` are the calls of this peer itself, which need no network."""

    def __init__(
        self,
        site: str,
        gossip: Gossip,
        local: PeerCalls,
        dial: Callable[[str, str], RemotePeer] = plain,
        offer: Callable[[str], Awaitable[bytes]] | None = None,
        *,
        cut: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cut` are addresses that this peer does not reach, in a drill."""
        self._offer = offer
        self.site = site
        self._gossip = gossip
        self._local = local
        self._dial = dial
        self._cut = cut
        self._clock = clock
        self._relays: dict[tuple[str, str], str] = {}
        self._relays_s = -math.inf
        self._detours: dict[str, str] = {}
        self._told_s: dict[str, float] = {}
        self._peers: dict[str, RemotePeer] = {}
        self._former: list[RemotePeer] = []
        self._recent: tuple[float, Snapshot] | None = None

    def snapshot(self) -> Snapshot:
        """Every present site whose capabilities are known, and the links between them, measured or estimated."""
        present = {member.site for member in self._gossip.members() if member.state in PRESENT} | {self.site}
        loads, weights = self._gossip.entries("load"), self._gossip.entries(HELD)
        sites = []
        for name, entry in self._gossip.entries("capabilities").items():
            if name in present:
                try:
                    sites.append(_site(name, entry, loads.get(name, {}), _held(weights.get(name))))
                except MALFORMED as error:
                    logger.warning("the capabilities that %s publishes are left out: %s", name, error)
        reports = {site: self._aged(site, read(entry)) for site, entry in self._gossip.entries(LINKS).items()}
        entries = self._gossip.entries(COORDINATES).items()
        coordinates = {site: at for site, entry in entries if (at := read_coordinate(entry)) is not None}
        names = [site.name for site in sites]
        links = links_between(names, self.site, reports, coordinates)
        if self._clock() - self._relays_s >= RELAYS_S:
            self._relays_s = self._clock()
            self._relays = relays(Snapshot(tuple(sites), links), self._relays)
        return Snapshot(tuple(sites), tuple(self._routed(link) for link in links))

    def recent(self) -> Snapshot:
        """As `snapshot`, but some seconds old: for those who look again and again."""
        now = self._clock()
        if self._recent is None or now >= self._recent[0]:
            found = self.snapshot()
            took_s = self._clock() - now
            self._recent = (now + max(RELAYS_S, took_s / LOOKING), found)
        return self._recent[1]

    def _routed(self, link: Link) -> Link:
        via = self._via(link.source, link.target)
        return replace(link, via=via) if via else link

    def _via(self, one: str, other: str) -> str:
        return self._relays.get((min(one, other), max(one, other)), "")

    def via(self, one: str, other: str) -> str:
        """The site through which a pair of sites meets; empty where directly."""
        self.snapshot()
        return self._via(one, other)

    def reaches(self, one: str, other: str) -> bool:
        """Whether two sites can exchange traffic directly, as far as is known."""
        pair = {one, other}
        return all(link.reachable for link in self.snapshot().links if {link.source, link.target} == pair)

    def detour(self, site: str, address: str) -> None:
        """Reach a site's peer at another address than its own, or directly again where it is empty."""
        if address:
            self._detours[site] = address
        else:
            self._detours.pop(site, None)

    def told(self, site: str) -> None:
        """A site has just told anew of its links."""
        self._told_s[site] = self._clock()

    def _aged(self, site: str, reports: Mapping[str, LinkReport]) -> dict[str, LinkReport]:
        """What a site said of its links, as old as it is by now. What we measure ourselves we know to the moment."""
        if site == self.site:
            own = self._gossip.links()
            return {to: said._replace(age_s=own[to].age_s) if to in own else said for to, said in reports.items()}
        since_s = self._clock() - self._told_s.setdefault(site, self._clock())
        return {
            to: said if said.age_s is None else said._replace(age_s=said.age_s + since_s)
            for to, said in reports.items()
        }

    def running(self) -> Mapping[str, tuple[str, RunningJob]]:
        """The jobs that present peers tell of: owner and what it says of the job, by job id."""
        found = {}
        for site, jobs in self._gossip.entries("jobs").items():
            if self.alive(site) and isinstance(jobs, Mapping):
                for name, entry in jobs.items():
                    try:
                        found[str(name)] = (site, _running(str(name), entry))
                    except MALFORMED as error:
                        logger.warning("the job %s that %s tells of is left out: %s", name, site, error)
        return found

    def alive(self, site: str) -> bool:
        """Whether gossip holds the site for present."""
        return site == self.site or any(
            member.site == site and member.state in PRESENT for member in self._gossip.members()
        )

    def address(self, site: str) -> str:
        """`HOST:PORT` where a site's peer is reached. Raises PeerUnreachable where gossip knows none."""
        at = self._detours.get(site) or self.own_address(site)
        if at in self._cut:
            raise PeerUnreachable(f"{site} is not to be reached from here (a drill), and nobody relays to it yet")
        return at

    def own_address(self, site: str) -> str:
        """`HOST:PORT` of a site's peer itself. Raises PeerUnreachable where gossip knows none."""
        for member in self._gossip.members():
            if member.site == site:
                return str(member.address)
        raise PeerUnreachable(f"no peer of a site named {site} is known here: see `mesh status`")

    async def offer(self, model: str) -> bytes:
        """What a site that lacks this model must know to fetch it. Raises ModelError."""
        if self._offer is None:
            raise ModelError(f"{self.site} gives no weights away: the model {model} must be at every site")
        return await self._offer(model)

    def peer(self, site: str) -> PeerCalls:
        """The calls of a site's peer."""
        return self._local if site == self.site else self.remote(site)

    def remote(self, site: str) -> RemotePeer:
        """The connection to another site's peer, opened once for each address.

        What is under way over a former one goes on there: the reports of a job's workers, say, which are a lease.
        """
        address = self.address(site)
        known = self._peers.get(site)
        if known is None or known.address != address:
            if known is not None:
                self._former.append(known)
            known = self._peers[site] = self._dial(site, address)
        for old in [old for old in self._former if not old.busy]:
            self._former.remove(old)
            old.close()
        return known

    def stream(self, site: str, address: str) -> RemotePeer:
        """A connection for gossip's reliable path, which may have to reach a peer where the members do not show it."""
        known = self._peers.get(site)
        if known is not None and known.address == address:
            return known
        if address in self._cut:
            raise PeerUnreachable(f"{site} is not to be reached from here (a drill)")
        key = f"{site}@{address}"
        if key not in self._peers:
            self._peers[key] = self._dial(site, address)
        return self._peers[key]

    def close(self) -> None:
        """Close every connection."""
        for peer in (*self._peers.values(), *self._former):
            peer.close()


def _running(name: str, entry: Mapping[str, Any]) -> RunningJob:
    held = entry.get("held", {})
    priority = int(_number(entry.get("priority", 0) + MAX_PRIORITY, 2 * MAX_PRIORITY)) - MAX_PRIORITY
    return RunningJob(name, priority, {str(key): int(_number(size, MAX_BYTES)) for key, size in held.items()})


def _number(value: Any, high: float) -> float:
    number = float(value)
    if not math.isfinite(number) or not 0 <= number <= high:
        raise ValueError(f"{value!r} is not between 0 and {high:g}")
    return number


def _site(name: str, entry: Mapping[str, Any], load: Mapping[str, Any], held: tuple[Held, ...] = ()) -> Site:
    devices = entry["devices"]
    if not isinstance(devices, list) or not 0 < len(devices) <= MAX_DEVICES:
        raise ValueError(f"a site has 1 to {MAX_DEVICES} devices")
    free, paces = ((load.get(key) if isinstance(load, Mapping) else None) for key in ("free", "pace"))
    found = tuple(replace(_device(device, _mapping(free), _mapping(paces)), held=held) for device in devices)
    site = Site(name, str(entry["region"]), found, relays=entry.get("relays") is True)
    if entry.get("local_rtt_s") is None:
        return site
    return replace(site, local_rtt_s=_number(entry["local_rtt_s"], MAX_LOCAL_RTT_S))


def _held(entry: Any) -> tuple[Held, ...]:
    """What a site has on its disk, as every device of it sees that: whole layers, to be loaded in any dtype."""
    return tuple(
        Held(row["name"], "", start, end, (0, MAX_HEADS), (0, MAX_COLUMNS))
        for row in read_held(entry)
        for start, end in row["layers"]
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _device(entry: Mapping[str, Any], free: Mapping[str, Any], paces: Mapping[str, Any]) -> Device:
    memory = int(_number(entry["memory_bytes"], MAX_BYTES))
    name = str(entry["name"])
    return Device(
        name=name,
        kind=str(entry["kind"]),
        vendor=str(entry["vendor"]),
        memory_bytes=memory,
        free_bytes=min(memory, int(_number(free.get(name, entry["free_bytes"]), MAX_BYTES))),
        flops={str(dtype): _number(speed, MAX_SPEED) for dtype, speed in entry["flops"].items()},
        memory_bandwidth=_number(entry["memory_bandwidth"], MAX_SPEED),
        reserve=_number(entry["reserve"], 1.0),
        pace=_pace(paces.get(name, 1.0)),
        decoding={str(dtype): _decoding(figures) for dtype, figures in entry.get("decoding", {}).items()},
    )


def _pace(value: Any) -> float:
    pace = _number(value, MOST_PACE)
    if pace < 1:
        raise ValueError(f"a pace of {pace}: no device is told to be faster than it was measured")
    return pace


def _decoding(figures: Mapping[str, Any]) -> Decoding:
    return Decoding(
        layer_s=_number(figures["layer_s"], MAX_LAYER_S),
        row_s=_number(figures["row_s"], MAX_LAYER_S),
        bandwidth=_number(figures["bandwidth"], MAX_SPEED),
        together=max(1.0, _number(figures.get("together", 1.0), MAX_TOGETHER)),
        waking_s=_number(figures.get("waking_s", 0.0), MAX_LAYER_S),
    )
