"""What one site knows of its distances, and tells the mesh: its measured links, and its coordinate.

Answers to probes carry the packed coordinate of who answers; with the round trip that moves ours. The coordinate is
also published, now and then, so that everybody can estimate every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from mesh.gossip.config import Randomness
from mesh.gossip.coordinates import Coordinate, Coordinates, estimate_s
from mesh.gossip.links import LinkReport, Links, Pace, read
from mesh.gossip.members import Peer

#: The entries: "links" (see `links`), and {"at": packed coordinate}.
LINKS: Final = "links"
COORDINATES: Final = "coordinates"
#: Links looked through a second where they are many: twice a minute for 490.
LOOKED_A_SECOND: Final = 16
#: What all coordinates together may cost each receiver, and what one costs on the wire.
BUDGET_BYTES_S, COORDINATE_BYTES = 600.0, 400
#: A coordinate is published after so many probes (or as many as there are others), and again when it has moved by this
#: share of the median round trip, and at least so much.
FIRST_PROBES, MOVED_SHARE, MOVED_S = 16, 0.1, 3e-3


class Distances:
    """See the module."""

    def __init__(self, site: str, rng: Randomness) -> None:
        """`site` is our own name; `rng` chooses where our coordinate starts."""
        self._rng = rng
        self.links = Links(site)
        self.coordinates = Coordinates(rng)
        self._told: Coordinate | None = None
        self._packed = (-1, b"")
        self._pace = Pace(BUDGET_BYTES_S, site)

    def where(self) -> bytes:
        """Our packed coordinate."""
        if self._packed[0] != self.coordinates.probes:
            self._packed = (self.coordinates.probes, self.coordinates.own().pack())
        return self._packed[1]

    def answered(self, site: str, where: bytes, rtt_s: float, now: float) -> None:
        """A probe of a site that is at `where` (packed and sound, or empty) took `rtt_s`."""
        if where:
            self.coordinates.observe(site, Coordinate.unpack(where), rtt_s, now)

    def heard(self, site: str, value: Mapping[str, Any] | None) -> None:
        """Another's entry of its coordinate came. One that cannot be is left out."""
        at = read_coordinate(value)
        if at is not None:
            self.coordinates.heard(site, at)

    def estimate_s(self, value: object) -> float | None:
        """The round trip to the site that published this coordinate, as likely as can be told from two coordinates."""
        at = read_coordinate(value)
        return None if at is None or not self.coordinates.probes else estimate_s(self.coordinates.own(), at)

    def forget(self, site: str) -> None:
        """A site is gone."""
        self.links.forget(site)
        self.coordinates.forget(site)

    def reports(self, live: list[Peer], now: float) -> dict[str, LinkReport]:
        """What is known of the link to every live site."""
        return {peer.site: self._report(peer, now) for peer in live}

    def _report(self, peer: Peer, now: float) -> LinkReport:
        links, reach = self.links, peer.reach
        age_s = max(0.0, now - reach.answered_s) if reach.answered_s > float("-inf") else None
        bandwidth, transport = links.bandwidth(peer.site), links.transport(peer.site)
        return LinkReport.of(peer.rtt.summary(), reach.out, reach.into, bandwidth, age_s=age_s, transport=transport)

    def look_gap_s(self, others: int, least_s: float) -> float:
        """Seconds between two calls of `news`: drawn anew each time where sites are many, so that none keep step."""
        usual_s = others / LOOKED_A_SECOND
        return least_s if usual_s <= least_s else max(least_s, usual_s * (0.5 + self._rng.random()))

    def news(
        self, live: list[Peer], now: float, fellows: Callable[[str], int] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """What has changed enough to be published: key and value. `fellows(key)`: sites that have not published any."""
        broken = {peer.site for peer in live if peer.reach.misses and peer.reach.broken}
        if not self.links.idle(broken.__contains__, len(live), now):
            waiting = fellows(LINKS) if fellows is not None and self.links.untold else None
            known = {peer.site: self._report(peer, now) for peer in live if peer.rtt.measured or peer.site in broken}
            links = self.links.changed(known, now, waiting, len(live))
            if links is not None:
                yield LINKS, links
        if (
            self.coordinates.probes >= min(FIRST_PROBES, len(live)) > 0
            and not self._pace.waits(len(live) + 1, now)
            and (self._told is None or self.coordinates.moved(self._told, MOVED_SHARE, MOVED_S))
            and self._pace.pay(COORDINATE_BYTES, len(live) + 1, now, fellows=self._waiting(fellows))
        ):
            self._told = self.coordinates.own()
            yield COORDINATES, {"at": self._told.pack()}

    def _waiting(self, fellows: Callable[[str], int] | None) -> int | None:
        return fellows(COORDINATES) if fellows is not None and self._told is None else None


def read_coordinate(value: object) -> Coordinate | None:
    """The coordinate in an entry; None where it holds none that can be."""
    try:
        return Coordinate.unpack(value["at"]) if isinstance(value, Mapping) else None
    except (KeyError, ValueError):
        return None


def reaches(links: object, target: str) -> bool | None:
    """Whether the site that published `links` says that it reaches the target; None where it does not say."""
    said = read(links).get(target)
    return None if said is None else not said.cut
