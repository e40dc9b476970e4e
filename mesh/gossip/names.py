"""Whose a name is when two processes use it: the first one's, as long as it answers.

A site's address changes only when its old address stays silent. A newcomer that is told that its name is taken gives
way; whoever was there first goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.gossip.members import Peer
from mesh.gossip.messages import Sender, Taken
from mesh.gossip.own import Own
from mesh.gossip.probing import Prober

#: A process that was told that its name is taken gives way while it is this new; later it is the one that was there.
NEWCOMER_S = 10.0
#: After a site answered for its name, other claims to it are not looked into for so long.
CONTEST_GAP_S = 5.0
#: A namesake that we only heard of is asked at most this often.
ASK_GAP_S = 0.2
#: How often the old address is asked.
QUESTIONS = 3


class Names:
    """Contests of names."""

    def __init__(self, own: Own, prober: Prober, *, condemn: Callable[[Peer, float], None]) -> None:
        """`condemn(peer, now)`: nobody answers there any more."""
        self._own = own
        self._prober = prober
        self._condemn = condemn
        self._started_s = 0.0
        self._asked_s = float("-inf")

    def start(self, now: float) -> None:
        """We are new from now on."""
        self._started_s = now

    def contest(self, peer: Peer, claimant: str | None, now: float) -> None:
        """Somebody claims the name of a living member from another address: ask whoever holds it."""
        if peer.contest is not None or now - peer.defended_s < CONTEST_GAP_S:
            return
        patience_s = self._prober.patience_s(peer)
        asked = 0

        def ask(then: float) -> None:
            nonlocal asked
            if asked < QUESTIONS and peer.live:
                asked += 1
                self._prober.ping(peer.address, peer.site, then, "contest", claimant=claimant)
                peer.contest = self._own.timers.at(then + patience_s, ask, patient=True)
                return
            peer.contest = None
            if peer.live:
                self._condemn(peer, then)

        ask(now)

    def defended(self, peer: Peer, claimant: str | None, now: float) -> None:
        """The holder of a contested name has answered."""
        if peer.contest is not None:
            peer.contest.cancel()
            peer.contest = None
            peer.defended_s = now
            if claimant:
                self._own.send(claimant, Taken(peer.address))

    def namesake(self, sender: Sender, source: str) -> None:
        """Another process with our name pings us, from another address: the name is taken."""
        if sender.address != self._own.address and not sender.left and not self._own.left:
            self._own.send(source, Taken(self._own.address))

    def taken(self, sender: Sender, message: Taken, now: float) -> None:
        """Another living peer has our name. A newcomer gives way; who was there first goes on.

        Only the namesake's own word counts, which its head proves. Hearsay is a reason to ask it, and nothing more.
        """
        if message.address == self._own.address:
            return
        if sender.site != self._own.site or sender.address != message.address:
            if now - self._asked_s >= ASK_GAP_S:
                self._asked_s = now
                self._prober.ping(message.address, self._own.site, now, "plain")
            return
        self._own.emit("conflict", self._own.site)
        if now - self._started_s < NEWCOMER_S:
            self._own.taken_by = message.address
