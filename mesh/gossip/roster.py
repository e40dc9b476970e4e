"""The other members one peer knows, with what is asked of them at every datagram answered from memory."""

from __future__ import annotations

from mesh.gossip.config import Randomness
from mesh.gossip.members import ALIVE, DEAD, LEFT, Peer


class Roster:
    """Site -> peer. Whoever changes a peer's state does it through here; asking then costs nothing in a large mesh."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self._live: list[Peer] | None = []

    def __len__(self) -> int:
        return len(self.peers)

    def get(self, site: str) -> Peer | None:
        """The peer of that name, in whatever state; or None."""
        return self.peers.get(site)

    def add(self, peer: Peer) -> None:
        """A new peer."""
        self.peers[peer.site] = peer
        self._live = None

    def remove(self, peer: Peer) -> None:
        """A peer is forgotten."""
        del self.peers[peer.site]
        self._live = None

    def set_state(self, peer: Peer, state: str) -> None:
        """A peer is in another state from now on."""
        if peer.live != (state not in (DEAD, LEFT)):
            self._live = None
        peer.state = state

    def live(self) -> list[Peer]:
        """Those that count, suspects included, in the order of their names. Not to be changed."""
        if self._live is None:
            self._live = [peer for _, peer in sorted(self.peers.items()) if peer.live]
        return self._live

    def is_alive(self, site: str) -> bool:
        """Whether a site is there and not even suspected."""
        peer = self.peers.get(site)
        return peer is not None and peer.state == ALIVE

    def draw(self, rng: Randomness, count: int, but: str) -> list[Peer]:
        """At most `count` random alive peers, `but` not among them."""
        live = self.live()
        # Few are suspected, so a few more draws than wanted are enough; where many are, all are looked at.
        few = rng.sample(live, min(len(live), 2 * count + 4))
        able = [peer for peer in few if peer.state == ALIVE and peer.site != but]
        if len(able) < count and len(few) < len(live):
            all_able = [peer for peer in live if peer.state == ALIVE and peer.site != but]
            able = rng.sample(all_able, min(count, len(all_able)))
        return able[:count]
