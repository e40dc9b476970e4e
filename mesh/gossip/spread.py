"""News of entries: pushed at once, from peer to peer, until everybody should have it (an epidemic, Demers et al. 1987).

Whoever gets a page that is news to it passes it on to `fanout` members, `ROUNDS` times, as long as it has hops left. A
member that is told sends six copies in all; with six, 99.7 % of a large mesh are reached (the share s that an epidemic
of c copies reaches solves s = 1 - exp(-c s)), in about log6(n) hops. Meanwhile the news also rides on whatever else is
sent, where there is room. Anti-entropy finds the rest. What is not urgent is left to anti-entropy altogether, which
carries it to every peer about once instead of six times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mesh.gossip.codec import MAX_HOPS, pack_message
from mesh.gossip.messages import Page

#: Pushes by each peer that is told, `fanout` (three) copies each.
ROUNDS = 2
#: Datagrams sent anyway that take a page along, per peer that is told; and the largest page that rides.
RIDES, RIDE_BYTES = 4, 500
#: Hops beyond the logarithm: the last members are reached by later ones.
SPARE_HOPS = 2
#: Places of news under way at most; the oldest gives way, and is left to anti-entropy.
MAX_HOT = 256


@dataclass(slots=True)
class _News:
    packed: list[bytes]
    pushes: int
    rides: int
    origin: str


class Spread:
    """The entries that are news here and still have to travel."""

    def __init__(self, fanout: int, pages: Callable[[str, str, int], list[Page]]) -> None:
        """`pages(owner, key, hops)` gives the pages of an entry."""
        self._fanout = fanout
        self._pages = pages
        self._hot: dict[tuple[str, str], _News] = {}
        self._rides = 0
        self._pushes = 0

    @property
    def pushing(self) -> bool:
        """Whether there is something to push."""
        return self._pushes > 0

    def publish(self, owner: str, key: str, others: int, *, urgent: bool) -> None:
        """An entry was written here. `others` are the live members."""
        if others <= self._fanout:
            self._add(owner, key, 0, pushes=1, origin="")
        elif urgent:
            hops = math.ceil(math.log(others + 1, 2 * self._fanout)) + SPARE_HOPS
            self._add(owner, key, min(hops, MAX_HOPS), pushes=ROUNDS, origin="")

    def told(self, page: Page, source: str) -> None:
        """A page that was pushed completed an entry that was news to us."""
        if page.hops > 0:
            self._add(page.owner, page.key, page.hops - 1, pushes=ROUNDS, origin=source)

    def forget(self, owner: str) -> None:
        """The owner is gone."""
        for place in [place for place in self._hot if place[0] == owner]:
            self._drop(place)

    def push(self) -> list[tuple[str, str, list[bytes]]]:
        """One round: (owner, who told us, packed pages) of everything that is to be pushed now."""
        pushed = []
        for place, news in list(self._hot.items()):
            if news.pushes > 0:
                news.pushes -= 1
                self._pushes -= 1
                pushed.append((place[0], news.origin, news.packed))
                if not news.pushes and not news.rides:
                    self._drop(place)
        return pushed

    def ride(self, room_bytes: int) -> list[bytes]:
        """Packed pages that a datagram with so much room takes along."""
        taken: list[bytes] = []
        if not self._rides:
            return taken
        for place, news in list(self._hot.items()):
            if news.rides > 0 and len(news.packed[0]) <= room_bytes:
                room_bytes -= len(news.packed[0])
                taken.append(news.packed[0])
                news.rides -= 1
                self._rides -= 1
                if not news.pushes and not news.rides:
                    self._drop(place)
        return taken

    def _add(self, owner: str, key: str, hops: int, *, pushes: int, origin: str) -> None:
        packed = [pack_message(page) for page in self._pages(owner, key, hops)]
        rides = RIDES if hops and len(packed) == 1 and len(packed[0]) <= RIDE_BYTES else 0
        self._drop((owner, key))
        while len(self._hot) >= MAX_HOT:
            self._drop(next(iter(self._hot)))
        self._hot[owner, key] = _News(packed, pushes, rides, origin)
        self._pushes += pushes
        self._rides += rides

    def _drop(self, place: tuple[str, str]) -> None:
        news = self._hot.pop(place, None)
        if news is not None:
            self._pushes -= news.pushes
            self._rides -= news.rides
