"""Claims that still have to travel: each rides on a bounded number of datagrams (SWIM's dissemination component)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mesh.gossip.members import SUSPECT, Claim


@dataclass(slots=True)
class _Rumour:
    claim: Claim
    packed: bytes
    rides: int
    pushes: int


class Rumours:
    """The claims that still have rides left, the least travelled first."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str], _Rumour] = {}

    def add(self, claim: Claim, packed: bytes, members: int) -> None:
        """Spread `claim`, `packed` for the wire, among `members` sites. Replaces what was being said of that site."""
        for key in [key for key, old in self._by_key.items() if key[0] == claim.site and self._outdated(old, claim)]:
            del self._by_key[key]
        spread = math.ceil(math.log10(members + 1))
        self._by_key[claim.site, claim.accuser] = _Rumour(claim, packed, 4 * spread, spread + 1)

    @property
    def pushing(self) -> bool:
        """Whether some claim is so fresh that it should not wait for the next probe to ride on."""
        return any(rumour.pushes > 0 for rumour in self._by_key.values())

    def pushed(self) -> None:
        """One round of pushes went out."""
        for rumour in self._by_key.values():
            rumour.pushes -= 1

    def take(self, room_bytes: int) -> list[bytes]:
        """Packed claims that fit into `room_bytes`, each losing a ride."""
        taken: list[bytes] = []
        if not self._by_key:
            return taken
        for key, rumour in sorted(self._by_key.items(), key=lambda item: -item[1].rides):
            if len(rumour.packed) > room_bytes:
                continue
            room_bytes -= len(rumour.packed)
            taken.append(rumour.packed)
            rumour.rides -= 1
            if rumour.rides <= 0:
                del self._by_key[key]
        return taken

    @staticmethod
    def _outdated(old: _Rumour, new: Claim) -> bool:
        both_suspect = old.claim.state == SUSPECT and new.state == SUSPECT
        return not (both_suspect and old.claim.incarnation == new.incarnation)
