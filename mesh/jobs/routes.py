"""How the two ends of a channel meet: over which transport, and directly or through a relay.

Between sites whose pair goes through a third one (`topology.relays`) that site's peer hands bytes on; the workers see
an address like any other, and seal end to end as ever. Elsewhere the transport is the one that proved best on the link,
or the one that a configuration left: see `mesh.peer.measuring`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mesh.errors import JobFailed, MeshError
from mesh.jobs.peers import View
from mesh.wire.v1 import peer_pb2
from topology.snapshot import Snapshot

logger = logging.getLogger(__name__)

#: UCX where both ends offer it and nothing was measured: they do where they have accelerators, or were told to.
PREFERENCE: Final = ("ucx", "tcp")

Offers = Mapping[str, bytes]
#: Two sites, the lesser name first.
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Route:
    """What a connector needs: transport, the address to connect to, and of a relay its site and its emulated delay."""

    backend: str
    address: bytes
    via: str = ""
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Way:
    """How a channel between two sites goes, where a relay may take part: its ends and `via`, empty where directly."""

    connector: str
    acceptor: str
    wanted: Offers
    offered: Offers
    via: str

    @property
    def pair(self) -> Pair:
        """Its sites."""
        return pair_of(self.connector, self.acceptor)


def pair_of(one: str, other: str) -> Pair:
    """The two as a pair."""
    return (min(one, other), max(one, other))


def bytes_per_s(snapshot: Snapshot, source: str, target: str) -> float:
    """What the way from one site to another carries, as far as is known; 0 within a site and where it is not."""
    links = {(link.source, link.target): link for link in snapshot.links}
    link = links.get((source, target))
    if source == target or link is None:
        return 0.0
    if not link.via:
        return link.bandwidth
    legs = (links.get((source, link.via)), links.get((link.via, target)))
    return min((leg.bandwidth if leg is not None else 0.0) for leg in legs)


class Routes:
    """The routes of one deployment. Each pair of sites is measured once.

    `kept` are relays (empty: none) that pairs keep for now, whatever the view says. `ways` is what was found.
    """

    def __init__(self, view: View, kept: Mapping[Pair, str] | None = None) -> None:
        self.ways: list[Way] = []
        self._view = view
        self._kept = dict(kept or {})
        self._best: dict[tuple[str, str, tuple[str, ...]], str] = {}

    async def find(self, connector: str, acceptor: str, wanted: Offers, offered: Offers) -> Route:
        """From a worker of the site `connector`, which offers `wanted`, to one of `acceptor`, which offers `offered`.

        Raises JobFailed where they share no transport, MeshError where a relay they cannot do without is of no use.
        """
        common = tuple(name for name in PREFERENCE if name in offered and name in wanted)
        if not common:
            raise JobFailed(
                f"workers at {connector} and {acceptor} share no transport: "
                f"one offers {', '.join(wanted) or 'none'}, the other {', '.join(offered) or 'none'}"
            )
        route = await self._between(connector, acceptor, offered, common)
        if connector != acceptor and "tcp" in common:
            self.ways.append(Way(connector, acceptor, wanted, offered, route.via))
        return route

    async def _between(self, connector: str, acceptor: str, offered: Offers, common: tuple[str, ...]) -> Route:
        via = self._via(connector, acceptor)
        if via and "tcp" in common:
            request = peer_pb2.RelayRequest(site=acceptor, other=connector, address=offered["tcp"])
            try:
                reply = await self._view.peer(via).relay(request)
                return Route("tcp", reply.address, via, reply.delay_s)
            except MeshError as error:
                if not self._view.reaches(connector, acceptor):
                    raise
                logger.warning("%s does not relay from %s to %s: %s", via, connector, acceptor, error)
        backend = await self._choose(connector, acceptor, common)
        return Route(backend, offered[backend])

    def _via(self, connector: str, acceptor: str) -> str:
        if connector == acceptor:
            return ""
        kept = self._kept.get(pair_of(connector, acceptor))
        return self._view.via(connector, acceptor) if kept is None else kept

    async def _choose(self, connector: str, acceptor: str, common: tuple[str, ...]) -> str:
        if len(common) == 1:
            return common[0]
        key = (connector, acceptor, common)
        if key not in self._best:
            try:
                chosen = await self._view.peer(connector).measure(acceptor, common)
            except MeshError as error:
                logger.warning("the transports from %s to %s were not compared: %s", connector, acceptor, error)
                chosen = ""
            self._best[key] = chosen if chosen in common else common[0] if connector == acceptor else "tcp"
        return self._best[key]
