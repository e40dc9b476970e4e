"""Claims that still have to travel: each rides on a bounded number of datagrams (SWIM's dissemination component)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mesh.gossip.members import SUSPECT, Claim

#: Rides of a claim, times the logarithm of the number of members (memberlist's retransmit multiplier).
RIDES = 4
#: Claims that wait for a ride at most; the oldest give way, and the exchange of digests brings what they said.
MAX_RUMOURS = 4096
#: Claims too long for what is left of a datagram that are passed over before it is closed.
MAX_MISFITS = 4

Key = tuple[str, str]


@dataclass(slots=True)
class _Rumour:
    claim: Claim
    packed: bytes
    rides: int


class Rumours:
    """The claims that still have rides left, the least travelled first."""

    def __init__(self) -> None:
        self._by_site: dict[str, dict[str, _Rumour]] = {}
        self._by_rides: dict[int, dict[Key, _Rumour]] = {}
        self._count = 0

    def add(self, claim: Claim, packed: bytes, members: int) -> None:
        """Spread `claim`, `packed` for the wire, among `members` sites. Replaces what was being said of that site.

        Only accusers of one and the same incarnation stand side by side.
        """
        said = self._by_site.get(claim.site, {})
        for accuser, old in list(said.items()):
            if accuser == claim.accuser or self._outdated(old, claim):
                self._drop((claim.site, accuser))
        while self._count >= MAX_RUMOURS:
            self._drop(next(iter(self._by_rides[min(self._by_rides)])))
        rumour = _Rumour(claim, packed, RIDES * math.ceil(math.log10(members + 1)))
        self._by_site.setdefault(claim.site, {})[claim.accuser] = rumour
        self._by_rides.setdefault(rumour.rides, {})[claim.site, claim.accuser] = rumour
        self._count += 1

    @property
    def pushing(self) -> bool:
        """Whether some claim should not wait for the next probe to ride on."""
        return self._count > 0

    def take(self, room_bytes: int) -> list[bytes]:
        """Packed claims that fit into `room_bytes`, each losing a ride."""
        if not self._count:
            return []
        taken: list[_Rumour] = []
        misfits = 0
        for rides in sorted(self._by_rides, reverse=True):
            for rumour in self._by_rides[rides].values():
                if len(rumour.packed) <= room_bytes:
                    room_bytes -= len(rumour.packed)
                    taken.append(rumour)
                else:
                    misfits += 1
                if misfits > MAX_MISFITS:
                    break
            if misfits > MAX_MISFITS:
                break
        for rumour in taken:
            key = (rumour.claim.site, rumour.claim.accuser)
            self._drop(key)
            rumour.rides -= 1
            if rumour.rides > 0:
                self._by_site.setdefault(key[0], {})[key[1]] = rumour
                self._by_rides.setdefault(rumour.rides, {})[key] = rumour
                self._count += 1
        return [rumour.packed for rumour in taken]

    def _drop(self, key: Key) -> None:
        said = self._by_site[key[0]]
        rumour = said.pop(key[1])
        if not said:
            del self._by_site[key[0]]
        equals = self._by_rides[rumour.rides]
        del equals[key]
        if not equals:
            del self._by_rides[rumour.rides]
        self._count -= 1

    @staticmethod
    def _outdated(old: _Rumour, new: Claim) -> bool:
        both_suspect = old.claim.state == SUSPECT and new.state == SUSPECT
        return not (both_suspect and old.claim.incarnation == new.incarnation)
