"""Whose turn it is to be probed: round-robin over a reshuffled list (SWIM, section 4.3).

So every member is probed within 2n - 1 ticks, and the cost of a tick does not grow with the mesh.
"""

from __future__ import annotations

from mesh.gossip.members import Peer
from mesh.gossip.own import Own


class Turns:
    """See the module."""

    def __init__(self, own: Own) -> None:
        """`own` has the roster, and the source of chance."""
        self._own = own
        self._order: list[str] = []
        self._listed: set[str] = set()
        self._last_target = ""

    def enlist(self, peer: Peer) -> None:
        """Probe a member from now on, from a random place in this round."""
        if peer.site not in self._listed:
            self._listed.add(peer.site)
            place = int(self._own.rng.random() * (len(self._order) + 1))
            self._order.append(peer.site)
            self._order[place], self._order[-1] = self._order[-1], self._order[place]

    def next(self) -> Peer | None:
        """The next member to probe, never the same one twice in a row where there are two; None where there is none."""
        roster = self._own.roster
        for _ in range(2):
            while self._order:
                site = self._order.pop()
                self._listed.discard(site)
                peer = roster.get(site)
                if peer is not None and peer.live:
                    self._last_target = site
                    return peer
            self._order = [peer.site for peer in roster.live()]
            self._listed = set(self._order)
            self._own.rng.shuffle(self._order)
            if len(self._order) > 1 and self._order[-1] == self._last_target:
                self._order[0], self._order[-1] = self._order[-1], self._order[0]
        return None
