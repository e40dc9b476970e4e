"""What is believed of whom: claims weighed, suspects, the dead, and what is said of ourselves (SWIM, Lifeguard).

A claim wins by (incarnation, state); see `Claim.beats`. What a site says of itself is taken at its word, because it is
proven. What others say of it is not: SUSPECT and DEAD are *accusations*. Who hears one checks for itself, counts the
accusers, and condemns only when the time is up, its own probe has failed, and its own sight is clear. A sign of life,
direct or through a helper, acquits. So one member cannot kill another at a third, whatever it says and as often as it
says so.

Who accuses needs a witness: a helper that did not reach the target either and said so. A site that is deaf or loses
most of its packets has none, because whoever it could ask reaches the target. It keeps its suspicions to itself, and
does not make the healthy ones look at each other (Rapid, Suresh et al., section 2, shows what becomes of a mesh in
which it does).

The accused is told, so that it can refute by raising its incarnation, at most once in `REFUTE_GAP_S`.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.gossip import config
from mesh.gossip.absent import Absentees
from mesh.gossip.members import ALIVE, DEAD, LEFT, SUSPECT, Claim, Peer
from mesh.gossip.messages import Rumour
from mesh.gossip.own import Own
from mesh.gossip.probing import Prober
from mesh.gossip.suspects import CLOUDED_VERDICTS, Suspects

#: A raised incarnation is told at most this often, so that false accusations cannot make a site flood the mesh
#: (foca issue 25). The check of every accuser acquits a living site anyway.
REFUTE_GAP_S = 1.0
#: A suspect is told what it is accused of at most this often by each of us, beside the buddy's pings.
TELL_GAP_S = 0.5
#: An accuser that our own check proved wrong is not heard again for so long, on the same incarnation.
ACQUITTED_S = 10.0
#: Beyond so many wrong accusers the others are not heard either: somebody makes them up.
MAX_ACQUITTED = 16
#: A site that is acquitted again and again is on a bad path: after the n-th time in a row it is spared 2**n seconds, up
#: to a bound. Its silence has then to last, and the mesh is spared the back and forth.
SPARED_MAX_S = 30.0
SPARED_FORGOTTEN_S = 120.0
#: A site that came back within this from its death was not dead; see `suspects` for what that earns it.
RETURN_S = 45.0
RETURNS_FORGOTTEN_S = 600.0


class Verdicts:
    """The state of every other member, and our answer to what is said of us."""

    def __init__(
        self,
        own: Own,
        prober: Prober,
        absent: Absentees,
        *,
        contest: Callable[[Peer, str | None, float], None],
        buried: Callable[[Peer], None],
        gone: Callable[[str], None],
    ) -> None:
        """`contest(peer, claimant, now)`: somebody claims the name of a living peer. `buried` and `gone` follow."""
        self._own = own
        self._prober = prober
        self._absent = absent
        self._contest = contest
        self._buried = buried
        self._gone = gone
        self._suspects = Suspects(own, prober, condemn=self.condemn)
        self._refuted_s = float("-inf")
        self._refuting = False
        self._claimed = 0

    def consider(self, claim: Claim, now: float) -> None:
        """Weigh a claim about anybody, from anybody."""
        if claim.site == self._own.site:
            self._about_us(claim, now)
            return
        peer = self._own.roster.get(claim.site)
        if peer is None:
            self._stranger(claim, now)
            return
        if claim.state in (SUSPECT, DEAD) and not self._own.t.fixed:
            self._accusation(peer, claim, now)
            return
        if claim.state == SUSPECT == peer.state and claim.incarnation == peer.incarnation:
            self._suspects.confirm(peer, claim.accuser, now)
            return
        if not claim.beats(peer.claim()):
            if peer.state == DEAD and claim.state == ALIVE:
                self._absent.hint(peer.site, now)
            return
        if claim.address != peer.address:
            if claim.state == ALIVE and peer.live:
                self._contest(peer, None, now)
                return
            if claim.state != ALIVE:
                return  # said of another process with that name; only a living one can take its place
        self._change(peer, claim, now)

    def condemn(self, peer: Peer, now: float) -> None:
        """We are sure that a peer is dead. Who has no witness for it keeps it to itself."""
        own, suspicion = self._own, peer.suspicion
        aloud = own.t.fixed or suspicion is None or (suspicion.witnessed and not own.clouded)
        self._change(peer, peer.claim(own.site)._replace(state=DEAD), now, aloud=aloud)

    # ---------------------------------------------------------------- said of us

    def _about_us(self, claim: Claim, now: float) -> None:
        own = self._own
        if own.left or claim.incarnation < own.incarnation or claim.incarnation >= config.MAX_COUNTER:
            return
        if claim.address == own.address and not claim.beats(own.claim()):
            return
        # Elsewhere it is said of a process that had our name before us, with a counter that we have to pass.
        self._claimed = max(self._claimed, claim.incarnation)
        if self._refuting:
            return
        if now < self._refuted_s + REFUTE_GAP_S:
            self._refuting = True
            own.timers.at(self._refuted_s + REFUTE_GAP_S, self._refute)
            return
        if claim.address == own.address and claim.state != ALIVE:
            own.unwell(1)  # we were too slow to answer
        self._refute(now)

    def _refute(self, now: float) -> None:
        own = self._own
        self._refuting = False
        if not own.quiet:
            self._refuted_s = now
            own.incarnation = max(own.incarnation, self._claimed) + 1
            own.touched(own.site)
            own.tell(own.claim())

    # ---------------------------------------------------------------- said of others

    def _stranger(self, claim: Claim, now: float) -> None:
        if claim.state not in (ALIVE, SUSPECT) or len(self._own.roster) >= config.MAX_MEMBERS:
            return
        if not self._absent.admits(claim, now):
            return
        peer = Peer(claim.site, claim.address, ALIVE, claim.incarnation, claim.proof)
        self._own.roster.add(peer)
        self._own.touched(peer.site)
        self._enlist(peer, now)
        self._own.tell(peer.claim())
        if claim.state == SUSPECT:
            self.consider(claim, now)

    def _enlist(self, peer: Peer, now: float) -> None:
        """A member appeared, or came back: probe it from now on, and get to know the path quickly."""
        self._absent.found(peer.site)
        self._prober.turns.enlist(peer)
        self._own.emit("joined", peer.site)
        self._absent.greet(peer, now)

    def _accusation(self, peer: Peer, claim: Claim, now: float) -> None:
        """Somebody says that a peer is silent, or dead."""
        if peer.address != claim.address or claim.incarnation < peer.incarnation or peer.state == LEFT:
            return
        if claim.incarnation > peer.incarnation:  # proven: it lived there
            if peer.state == DEAD and claim.state == DEAD:
                peer.incarnation, peer.proof = claim.incarnation, claim.proof
                return
            self._change(peer, claim._replace(state=ALIVE, accuser=""), now)
        if peer.state == DEAD or self._acquitted(peer, claim.accuser, now):
            return
        if peer.state == ALIVE and now < peer.spared_s:
            return
        if peer.state == SUSPECT:
            if peer.suspicion is not None and claim.state == DEAD and len(peer.suspicion.verdicts) < CLOUDED_VERDICTS:
                peer.suspicion.verdicts.add(claim.accuser)
            self._suspects.confirm(peer, claim.accuser, now)
        elif now - peer.alive_s <= 2 * self._prober.patience_s(peer):
            # We heard it after its accuser began to listen. It should know, and we look again.
            self._let_know(peer, now)
            if peer.probe is None:
                self._prober.probe(peer, now)
        else:
            self._change(peer, claim._replace(state=SUSPECT), now)

    def _acquitted(self, peer: Peer, accuser: str, now: float) -> bool:
        if now - peer.acquitted_s > ACQUITTED_S:
            peer.acquitted = frozenset()
        return accuser in peer.acquitted or len(peer.acquitted) >= MAX_ACQUITTED

    def _let_know(self, peer: Peer, now: float) -> None:
        """Tell a peer of its accusation, so that it can refute."""
        if now - peer.told_s >= TELL_GAP_S:
            peer.told_s = now
            self._own.send(peer.address, Rumour(peer.claim(self._own.site)._replace(state=SUSPECT)))

    # ---------------------------------------------------------------- changes of state

    def _change(self, peer: Peer, claim: Claim, now: float, *, aloud: bool = True) -> None:
        own, before = self._own, peer.state
        moved = peer.address != claim.address
        if moved:
            peer.rtt, peer.reach = type(peer.rtt)(), type(peer.reach)()
        renewed = claim.incarnation != peer.incarnation or moved
        if renewed:
            peer.acquitted = frozenset()
        peer.address, peer.incarnation, peer.proof = claim.address, claim.incarnation, claim.proof
        own.roster.set_state(peer, claim.state)
        if renewed or (before in (DEAD, LEFT)) != (claim.state in (DEAD, LEFT)):
            own.touched(peer.site)
        self._settle(peer)
        if aloud:
            own.tell(peer.claim(claim.accuser))
        if claim.state in (ALIVE, SUSPECT) and before in (DEAD, LEFT):
            if before == DEAD and now - peer.died_s < RETURN_S:
                peer.returns += 1
            self._enlist(peer, now)
        if claim.state == ALIVE:
            if before == SUSPECT:
                own.emit("refuted", peer.site)
        elif claim.state == SUSPECT:
            self._suspects.suspect(peer, claim.accuser, now, said=aloud and claim.accuser == own.site)
            if before != SUSPECT:
                own.emit("suspect", peer.site)
        else:
            self._bury(peer, before, now)

    def _settle(self, peer: Peer) -> None:
        """End what belonged to a peer's last state."""
        for timer in (peer.chore, peer.reaper, peer.suspicion.timer if peer.suspicion else None):
            if timer is not None:
                timer.cancel()
        peer.chore = peer.reaper = peer.suspicion = None

    def _bury(self, peer: Peer, before: str, now: float) -> None:
        own = self._own
        self._prober.drop(peer)
        if peer.recheck is not None:
            peer.recheck.cancel()
            peer.recheck = None
        self._buried(peer)
        if before != peer.state:
            own.emit(peer.state, peer.site)
        if now - peer.died_s > RETURNS_FORGOTTEN_S:
            peer.returns = 0
        peer.died_s = now
        keep_s = own.t.dead_reap_s if peer.state == DEAD else own.t.left_reap_s
        peer.reaper = own.timers.at(now + keep_s, lambda _: self._reap(peer))
        self._absent.lost(peer.claim(own.site), now, refuse_until_s=now + keep_s + own.t.grave_s)

    def _reap(self, peer: Peer) -> None:
        if self._own.roster.get(peer.site) is peer and not peer.live:
            self._own.roster.remove(peer)
            self._own.touched(peer.site)
            self._gone(peer.site)

    # ---------------------------------------------------------------- evidence of our own

    def alive(self, peer: Peer, now: float) -> None:
        """There is a sign of a peer's life."""
        peer.alive_s = now
        suspicion = peer.suspicion
        if peer.state != SUSPECT or suspicion is None or self._own.t.fixed:
            return
        self._let_know(peer, now)
        if now - peer.acquitted_s > SPARED_FORGOTTEN_S:
            peer.acquittals = 0
        peer.acquittals += 1
        if peer.acquittals > 1:
            peer.spared_s = now + min(SPARED_MAX_S, 2.0 ** min(peer.acquittals, 10))
        peer.acquitted |= suspicion.accusers - {self._own.site}
        peer.acquitted_s = now
        self._own.roster.set_state(peer, ALIVE)
        self._settle(peer)
        self._own.emit("refuted", peer.site)

    def silent(self, peer: Peer, witnessed: bool, now: float) -> None:
        """A whole probe of ours, helpers and all, found no sign of a peer's life.

        Without a witness we keep it to ourselves: a deaf site would else accuse the whole mesh.
        """
        own = self._own
        aloud = witnessed and not own.clouded
        if peer.state == ALIVE and now >= peer.spared_s:
            self._change(peer, peer.claim(own.site)._replace(state=SUSPECT), now, aloud=aloud)
        if peer.state == SUSPECT and peer.suspicion is not None:
            peer.suspicion.checked = True
            peer.suspicion.witnessed |= witnessed
            self._suspects.confirm(peer, own.site, now, aloud=aloud)
